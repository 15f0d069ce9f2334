"""Operations that move elements about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused, trace

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
T, W = RNG.normal(size=(6, 5, 4)), RNG.normal(size=(4, 3))


def towers(x, y, w):
    """Two towers side by side, a layer for both, and apart again."""
    z = jax.nn.relu(jnp.concatenate([x, y]) @ w)
    a, b = jnp.split(z, 2)
    return a * b, z[: x.shape[0]], z[x.shape[0] :]


def towers_gradient(x, y, w):
    def loss(w):
        a, b = jnp.split(jax.nn.relu(jnp.concatenate([x, y]) @ w), 2)
        return jnp.sum(a * b) / a.size

    return jax.grad(loss)(w)


def time_major(t, w):
    """Steps first, merged with the examples: the examples are neither first nor last in the merged dimension."""
    z = t.transpose(1, 0, 2)
    merged = jax.nn.relu(z.reshape(-1, 4) @ w)
    return merged.reshape(z.shape[0], -1, 3).transpose(1, 0, 2), merged.sum(), merged


def nested_merge(t):
    z = t.transpose(1, 0, 2).reshape(-1)  # (5, n, 4)
    return z, jnp.tanh(z).reshape(5, -1, 2, 2), (z + jnp.ones_like(z)).sum()


LEGAL = {
    "merge with the next": (lambda t: t.reshape(-1, 4), (T,), (), [Batched]),
    "merge all": (lambda t: t.reshape(-1), (T,), (), [Batched]),
    "merge and split": (lambda t: (t.reshape(-1, 4) * 2).reshape(-1, 5, 2, 2), (T,), (), [Batched]),
    "split and merge another": (lambda t: t.reshape(-1, 20).reshape(-1, 2, 10), (T,), (), [Batched]),
    "partly split": (lambda x: x.reshape(-1, 2), (X,), (), [Batched]),
    "time major": (time_major, (T,), (W,), [Batched, Partial, Batched]),
    "three factors": (nested_merge, (T,), (), [Batched, Batched, Partial]),
    "time major, split differently": (lambda t: t.transpose(1, 0, 2).reshape(-1, 2, 4 // 2), (T,), (), [Batched]),
    "transpose": (lambda t: t.transpose(2, 0, 1), (T,), (), [Batched]),
    "squeeze and expand": (lambda x: jnp.squeeze(x[None, :, None], (0, 2))[..., None], (X,), (), [Batched]),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 3, 4)), (X,), (), [Batched]),
    "zeros of merged": (lambda t: t.reshape(-1, 4) + jnp.zeros((t.shape[0] * 5, 4)), (T,), (), [Batched]),
    "empty": (lambda x: x[:, :0].reshape(x.shape[0], 0, 3), (X,), (), [Batched]),
    "rev another": (lambda x: x[:, ::-1], (X,), (), [Batched]),
    "slice another": (lambda x: x[:, 1:4:2], (X,), (), [Batched]),
    "pad another": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), (X,), (), [Batched]),
    "pad another with interior": (lambda x: lax.pad(x, 1.0, ((0, 0, 0), (1, -1, 2))), (X,), (), [Batched]),
    "pad with a sum": (lambda x: lax.pad(x, x.mean(), ((0, 0, 0), (1, 1, 0))), (X,), (), [Batched]),
    "concatenate another": (lambda x, y: jnp.concatenate([x, y], 1), (X, Y), (), [Batched]),
    "stack": (lambda x, y: (jnp.stack([x, y]), jnp.stack([x, y], 1), jnp.stack([x, y], 2)), (X, Y), (), [Batched] * 3),
    "unstack": (lambda x: jnp.unstack(x, axis=1)[2], (X,), (), [Batched]),
    "split another": (lambda x: jnp.split(x, [1, 3], axis=1), (X,), (), [Batched] * 3),
    "tile": (
        lambda x: (jnp.tile(x, (1, 3)), jnp.tile(x, (2, 1)), jnp.tile(x, (2, 1)).reshape(2, -1, 4)[1]),
        (X,),
        (),
        [Batched] * 3,
    ),
    "repeat": (lambda x: (jnp.repeat(x, 3, axis=1), jnp.repeat(x, 3, axis=0)), (X,), (), [Batched] * 2),
    "two towers": (towers, (X, Y), (W,), [Batched] * 3),
    "two towers' gradient": (towers_gradient, (X, Y), (W,), [Partial]),
    "three towers of two": (
        lambda x, y: jnp.concatenate([jnp.concatenate([x, y]), y])[x.shape[0] :],
        (X, Y),
        (),
        [Batched],
    ),
    "towers of merged rows": (
        lambda t: jnp.split(jnp.concatenate([t.reshape(-1, 4), -t.reshape(-1, 4)]), 2)[1],
        (T,),
        (),
        [Batched],
    ),
    "zeros beside a tower": (lambda x: jnp.concatenate([x, jnp.zeros_like(x)])[x.shape[0] :], (X,), (), [Batched]),
    "only zeros": (lambda x: jnp.concatenate([jnp.zeros_like(x), jnp.ones_like(x)]), (X,), (), [Batched]),
    "pad by a tower": (
        lambda x: jnp.pad(x, ((x.shape[0], 2 * x.shape[0]), (0, 0)))[: 2 * x.shape[0]],
        (X,),
        (),
        [Batched],
    ),
    "one tower by slice": (lambda x, y: jnp.concatenate([x, y])[x.shape[0] : 2 * x.shape[0]], (X, Y), (), [Batched]),
    "iota along a tower": (
        lambda x, y: jnp.concatenate([x[:, 0], y[:, 0]]) + jnp.ones(2 * x.shape[0]),
        (X, Y),
        (),
        [Batched],
    ),
    # of partial reductions
    "all of partial": (lambda t: t.sum(0).T.reshape(2, 10)[:, ::-1][1:, 2:8][None], (T,), (), [Partial]),
    "pad partial": (lambda x: jnp.pad(x.sum(0), 2), (X,), (), [Partial]),
    "pad partial with ones": (lambda x: jnp.pad(x.sum(0), 2, constant_values=1), (X,), (), [Invariant]),
    "pad partial max": (lambda x: jnp.pad(x.max(0), 2), (X,), (), [Invariant]),
    "concatenate partial": (lambda x: jnp.concatenate([x.sum(0), x.mean(0), jnp.zeros(2)]), (X,), (), [Partial]),
    "concatenate partial and other": (lambda x: jnp.concatenate([x.sum(0), jnp.ones(2)]), (X,), (), [Invariant]),
    "concatenate maxima": (lambda x: jnp.concatenate([x.max(0), x.max(0)]), (X,), (), [Invariant]),
    "concatenate sum and max": (lambda x: jnp.concatenate([x.max(0), x.sum(0)]), (X,), (), [Invariant]),
    "stack partial": (lambda x: jnp.stack([x.sum(0), x.mean(0)]), (X,), (), [Partial]),
    "reshape maxima": (lambda x: x.max(0).reshape(2, 2).T, (X,), (), [Partial]),
    "broadcast partial": (lambda x: jnp.broadcast_to(x.sum(0), (3, 4)), (X,), (), [Partial]),
    "broadcast to the batch": (lambda x: x - jnp.broadcast_to(x.sum(0), x.shape), (X,), (), [Batched]),
    # where sizes of the batch meet invariant values
    "invariant rows by batch size": (lambda x, w: w[x.shape[0] - 4 :] + x.sum(), (X,), (RNG.normal(size=8),), None),
    "invariant row": (lambda x, w: w[x.shape[0] - 1] + x.sum(), (X,), (RNG.normal(size=8),), None),
    "partial row": (lambda t: t.sum(0)[t.shape[0] - 2 : t.shape[0] - 1], (T,), (), [Partial]),
    "pad invariant": (
        lambda x, w: lax.pad(w, 0.0, ((x.shape[0], 2 - x.shape[0], 0),)) + x.sum(),
        (X,),
        (RNG.normal(size=8),),
        None,
    ),
    "rows of a table": (lambda x, w: x + w[: x.shape[0]], (X,), (RNG.normal(size=(8, 4)),), [Batched]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect)


def reverse(x):
    return x[::-1]


def groups_of_two(x):
    return x.reshape(2, -1, 4)


def rows_of_several(t):
    return t.reshape(5, -1, 4)


def every_other_of_merged(x):
    return x.reshape(-1)[::2]


def every_other(x):
    return x[::2]


def first(x):
    return x[:1]


def first_half(x):
    return x.reshape(-1)[: 2 * x.shape[0]]


def feature_as_wide_as_batch(x):
    return x[:, None] + jnp.zeros((x.shape[0], x.shape[0], 4))


def slice_other_by_batch_size(t):
    return t[:, t.shape[0] - 2 : t.shape[0]]


def pad_rows(x):
    return jnp.pad(x, ((1, 0), (0, 0)))


def pad_other_by_batch_size(x):
    return lax.pad(x, 0.0, ((0, 0, 0), (x.shape[0], -x.shape[0], 0)))


def roll(x):
    return jnp.roll(x, 1, axis=0)


def class_token(x):
    return jnp.concatenate([jnp.zeros((1, 4)), x])


def unstack_batch(x):
    return jnp.stack(list(jnp.unstack(x, axis=0)[:2]))


def merged_in_two_orders(t):
    return t.reshape(-1, 4) * t.transpose(1, 0, 2).reshape(-1, 4)


def tile_by_batch_size(x):
    return jnp.tile(x, (1, x.shape[0]))


def towers_of_two_orders(t):
    return jnp.concatenate([t.reshape(-1, 4), t.transpose(1, 0, 2).reshape(-1, 4)])


ILLEGAL = {
    "rev": (reverse, (X,), (), "reverses the order"),
    "reshape": (groups_of_two, (X,), (), "as for groups of several examples"),
    "reshape to rows": (rows_of_several, (T,), (), "reshapes the batch so that one row holds several examples"),
    "strided": (every_other, (X,), (), "as for groups of several examples"),
    "strided in the merged": (every_other_of_merged, (X,), (), "every k-th example"),
    "first": (first, (X,), (), "particular examples"),
    "first half": (first_half, (X,), (), "particular examples"),
    "wide": (feature_as_wide_as_batch, (X,), (), "two batch dimensions"),
    "slice by size": (slice_other_by_batch_size, (RNG.normal(size=(6, 9)),), (), "depends on the number of examples"),
    "pad": (pad_rows, (X,), (), "particular examples"),
    "pad by size": (pad_other_by_batch_size, (X,), (), "depends on the number of examples"),
    "roll": (roll, (X,), (), "particular examples"),
    "class token": (class_token, (X,), (), "joins examples with other rows"),
    "merged in two orders": (merged_in_two_orders, (T,), (), "pairs examples with other examples"),
    "tile": (tile_by_batch_size, (X,), (), "depends on the number of examples (reps)"),
    "towers of two orders": (towers_of_two_orders, (T,), (), "joins examples with other rows"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    check_refused(*ILLEGAL[name])


def test_layouts():
    """Where the batch lies in a merged dimension."""
    traced = trace(time_major, (T,), (W,))
    assert traced.out_types()[2] == Batched(0, 5, 1)
    traced = trace(lambda t: t.transpose(1, 0, 2).reshape(-1), (T,))
    assert traced.out_types() == [Batched(0, 5, 4)]
    traced = trace(lambda x, y: jnp.concatenate([x.reshape(-1), y.reshape(-1)]), (X, Y))
    assert traced.out_types() == [Batched(0, 2, 4)]
