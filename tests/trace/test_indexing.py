"""Gather and scatter in their many forms, and slices at run-time positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused

RNG = np.random.default_rng(0)
X, V = RNG.normal(size=(6, 4)), RNG.normal(size=4)
T = RNG.normal(size=(6, 5, 4))
Y, Z = RNG.integers(0, 4, size=6), RNG.integers(-4, 4, size=(6, 3))
TOKENS, TABLE = RNG.integers(0, 7, size=(6, 5)), RNG.normal(size=(7, 3))
IDX = np.array([2, 0, 2])


def embedding_gradient(tokens, table):
    return jax.grad(lambda table: (table[tokens] ** 2).mean())(table)


def tied_embedding(tokens, table):
    def loss(table):
        logits = table[tokens] @ table.T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()

    return jax.value_and_grad(loss)(table)


def indexed_gradient(x, y):
    return jax.grad(lambda x: (x[jnp.arange(x.shape[0]), y] ** 2).sum())(x)


def one_example(t, y):
    """Slices and writes where each example says."""
    row = lax.dynamic_index_in_dim(t, y, 0, keepdims=False)
    return row, lax.dynamic_update_slice(t, row[None] * 2, (y, 0)), t.at[y].add(1.0), t.at[y, 1].set(0.0)


LEGAL = {
    "columns": (lambda x: (x[:, IDX], x[:, 1], x[:, None, IDX]), (X,), (), [Batched] * 3),
    "columns by take": (
        lambda x: (jnp.take(x, IDX, 1), jnp.take(x, IDX + 3, 1, mode="fill"), jnp.take(x, IDX + 3, 1, mode="clip")),
        (X,),
        (),
        [Batched] * 3,
    ),
    "columns by invariant": (lambda x, i: x[:, i], (X,), (IDX,), [Batched]),
    "take_along_axis": (lambda x, z: jnp.take_along_axis(x, z, 1), (X, Z), (), [Batched]),
    "take_along_axis of steps": (lambda t, z: jnp.take_along_axis(t, z[..., None], 1), (T, Z), (), [Batched]),
    "own row": (lambda x, y: x[jnp.arange(x.shape[0]), y], (X, Y), (), [Batched]),
    "own row, numpy": (lambda x, y: x[np.arange(x.shape[0]), y], (X, Y), (), [Batched]),
    "own row, only": (lambda x: x[jnp.arange(x.shape[0])], (X,), (), [Batched]),
    "own row, several columns": (lambda x, z: x[jnp.arange(x.shape[0])[:, None], z], (X, Z), (), [Batched]),
    "own row, the batch second": (
        lambda t, z: t.transpose(1, 0, 2)[1, jnp.arange(t.shape[0])[:, None], z],
        (T, Z),
        (),
        [Batched],
    ),
    "own row's gradient": (indexed_gradient, (X, Y), (), [Batched]),
    "own row, written": (
        lambda x, y: (x.at[jnp.arange(x.shape[0]), y].set(0.0), x.at[jnp.arange(x.shape[0]), y].max(0.5)),
        (X, Y),
        (),
        [Batched] * 2,
    ),
    "own row, int32": (lambda x, y: x[jnp.arange(x.shape[0], dtype=jnp.int32), y], (X, Y), (), [Batched]),
    "embedding": (lambda t, e: e[t], (TOKENS,), (TABLE,), [Batched]),
    "embedding by take": (lambda t, e: jnp.take(e, t, axis=0), (TOKENS,), (TABLE,), [Batched]),
    "embedding's gradient": (embedding_gradient, (TOKENS,), (TABLE,), [Partial]),
    "tied embedding": (tied_embedding, (TOKENS,), (TABLE,), [Partial, Partial]),
    "segment_sum": (lambda x, y: jax.ops.segment_sum(x, y, 4), (X, Y), (), [Partial]),
    "histogram": (lambda y: jnp.zeros(4).at[y].add(1.0), (Y,), (), [Partial]),
    "bincount": (lambda y: jnp.bincount(y, length=4), (Y,), (), [Partial]),
    "subtracted": (lambda y: jnp.zeros(4).at[y].subtract(1.0), (Y,), (), None),
    "scatter-sub": (
        lambda x, y: lax.scatter_sub(jnp.zeros((4, 4)), y[:, None], x, lax.ScatterDimensionNumbers((1,), (0,), (0,))),
        (X, Y),
        (),
        [Partial],
    ),
    "one_hot": (lambda y: (jax.nn.one_hot(y, 4), jax.nn.one_hot(y, 4).sum(0)), (Y,), (), [Batched, Partial]),
    "by vmap": (lambda t, y: jax.vmap(one_example)(t, y), (T, Y), (), [Batched] * 4),
    "by vmap's gradient": (
        lambda t, y: jax.grad(lambda t: sum((o**2).sum() for o in jax.vmap(one_example)(t, y)))(t),
        (T, Y),
        (),
        [Batched],
    ),
    "by vmap, table shared": (
        lambda y, e: jax.vmap(lambda i: lax.dynamic_slice(e, (i, 0), (2, 3)))(y),
        (Y,),
        (TABLE,),
        [Batched],
    ),
    "table's gradient": (
        lambda y, e: jax.grad(lambda e: (jax.vmap(lambda i: lax.dynamic_slice(e, (i, 0), (2, 3)))(y) ** 2).sum())(e),
        (Y,),
        (TABLE,),
        [Partial],
    ),
    "same place for all": (
        lambda t, i: (
            lax.dynamic_slice(t, (0, i, 0), (t.shape[0], 2, 4)),
            t.at[:, i].set(1.0),
            lax.dynamic_update_slice(t, t[:, :2] * 2, (0, i, 0)),
            t.at[:, i, 1].add(2.0),
        ),
        (T,),
        (2,),
        [Batched] * 4,
    ),
    "cache": (lambda t, x, i: t.at[:, i].set(x), (T, X), (3,), [Batched]),
    "merged rows": (
        lambda t, s: (t.reshape(-1, 4)[:, IDX], jnp.take_along_axis(t.reshape(-1, 4), s.reshape(-1, 1), 1)),
        (T, TOKENS % 4),
        (),
        [Batched] * 2,
    ),
    "zeros, then own values": (
        lambda z: jnp.zeros((z.shape[0], 4)).at[jnp.arange(z.shape[0])[:, None], z].add(1.0),
        (Z,),
        (),
        [Batched],
    ),
    "zeros by vmap": (lambda z: jax.vmap(lambda z: jnp.zeros(4).at[z].add(1.0))(z), (Z,), (), [Batched]),
    # of partial reductions
    "of a sum": (lambda x, i: (x.sum(0)[i], lax.dynamic_slice(x.sum(0), (i[1],), (2,))), (X,), (IDX,), [Partial] * 2),
    "of a sum, filled": (lambda x: jnp.take(x.sum(0), IDX + 3), (X,), (), [Partial]),
    "of a count, filled": (lambda y: jnp.take(jax.nn.one_hot(y, 4, dtype=int).sum(0), IDX + 3), (Y,), (), [Invariant]),
    "of a sum, filled by one": (lambda x: x.sum(0).at[IDX + 3].get(mode="fill", fill_value=1.0), (X,), (), [Invariant]),
    "of a sum, filled by zero": (lambda x: x.sum(0).at[IDX + 3].get(mode="fill", fill_value=0.0), (X,), (), [Partial]),
    "of a maximum": (lambda x: jnp.take(x.max(0), IDX), (X,), (), [Partial]),
    "of a sum, by examples": (lambda x, y: x.sum(0)[y], (X, Y), (), None),
    "by a sum": (lambda y, v: v[y.sum() % 4], (Y,), (V,), [Invariant]),
    "written with a sum": (lambda x: jnp.zeros((3, 4)).at[1].add(x.sum(0)), (X,), (), [Partial]),
    "set to a sum": (lambda x: jnp.zeros((3, 4)).at[1].set(x.sum(0)), (X,), (), None),
    "written over with a sum": (lambda x: jnp.ones((3, 4)).at[1].set(x.sum(0)), (X,), (), [Invariant]),
    "sum into a sum": (lambda x: lax.dynamic_update_slice(x.sum(0), x[:, :2].mean(0), (1,)), (X,), (), [Partial]),
    "maximum into zeros": (
        lambda x: lax.dynamic_update_slice(jnp.zeros(4), x[:, :2].max(0), (1,)),
        (X,),
        (),
        [Invariant],
    ),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect)


def first_examples(x):
    return x[jnp.array([0, 1])]


def take_examples(x, y):
    return x[y]


def example_at(x, i):
    return lax.dynamic_slice(x, (i, 0), (1, 4))


def diagonal(t):
    i = jnp.arange(t.shape[0])
    return t[i, i]


def permuted(x):
    return x[jnp.arange(x.shape[0])[::-1]]


def shifted_positions(x):
    return x[jnp.arange(x.shape[0]) - 1]


def write_example(x):
    return x.at[0].set(0.0)


def write_into_shared(x, y):
    return jnp.zeros((4, 4)).at[y].set(x)


def add_to_weights(x, y, v):
    return v.at[y].add(x[:, 0])


def counts_into_maximum(x, y):
    return x.max(0).at[y].add(1.0)


def largest_of_class(x, y):
    return jax.ops.segment_max(x, y, 4)


def take_by_batched_of_another_order(t, s):
    return jnp.take_along_axis(t.transpose(1, 0, 2).reshape(-1, 4), s.reshape(-1, 1), 1)


def window_of_batch_size(x, t):
    return lax.dynamic_slice(t, (0, 1), (4, x.shape[0]))


def last_in_batch_size(t, i):
    return lax.dynamic_slice(t, (0, t.shape[0] - 3, i), (t.shape[0], t.shape[0], 2))


ILLEGAL = {
    "first": (first_examples, (X,), (), "picks examples of the batch by their index"),
    "take": (take_examples, (X, Y), (), "picks examples of the batch by their index"),
    "at": (example_at, (X,), (2,), "particular examples"),
    "diagonal": (diagonal, (RNG.normal(size=(6, 8)),), (), "picks examples of the batch by their index"),
    "permuted": (permuted, (X,), (), "reverses the order"),
    "shifted": (shifted_positions, (X,), (), "picks examples of the batch by their index"),
    "write": (write_example, (X,), (), "writes to examples of the batch by their index"),
    "write into shared": (write_into_shared, (X, Y), (), "into a value that all of them share"),
    "add to weights": (add_to_weights, (X, Y), (V,), "isn't zero at first"),
    "counts into a maximum": (counts_into_maximum, (X, Y), (), "isn't zero at first"),
    "largest": (largest_of_class, (X, Y), (), "into a value that all of them share"),
    "other order": (take_by_batched_of_another_order, (T, TOKENS), (), "picks examples"),
    "two sizes": (
        last_in_batch_size,
        (RNG.normal(size=(6, 8, 3)),),
        (1,),
        "depends on the number of examples (slice_sizes)",
    ),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    check_refused(*ILLEGAL[name])


def test_columns_of_a_table_as_many_as_examples():
    check_law(lambda x, t: x @ jnp.ones((4, 4)) + window_of_batch_size(x, t).T, (X,), (RNG.normal(size=(4, 8)),))
