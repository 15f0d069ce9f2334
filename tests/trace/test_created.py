"""Examples' values that are made of none: constants, iotas, and what the batch's size stands in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused, trace

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4))
KEYS = jax.random.split(jax.random.key(0), 6)


def ranks(x):
    return jnp.arange(x.shape[0]) * 1.5


LEGAL = {
    "positions as data": (lambda x: (ranks(x), ranks(x).sum(), x * ranks(x)[:, None]), [Batched, Partial, Batched]),
    "positions returned": (lambda x: jnp.arange(x.shape[0]), [Batched]),
    "positions compared": (lambda x: jnp.arange(x.shape[0]) < 3, [Batched]),
    "positions from the end": (lambda x: x.shape[0] - 1 - jnp.arange(x.shape[0]), [Batched]),
    "positions as floats": (lambda x: jnp.arange(x.shape[0], dtype=float), [Batched]),
    "small positions": (
        lambda x: jnp.arange(x.shape[0], dtype=jnp.int8) + jnp.arange(x.shape[0]).astype(jnp.uint8),
        [Batched],
    ),
    "positions doubled": (lambda x: jnp.arange(x.shape[0] * 2), [Batched]),
    "positions from one": (lambda x: jnp.arange(1, x.shape[0] + 1), [Batched]),
    "positions of columns": (lambda x: jax.lax.broadcasted_iota(int, x.shape, 1), [Batched]),
    "positions of rows": (lambda x: jax.lax.broadcasted_iota(int, x.shape, 0), [Batched]),
    "positions merged": (lambda x: jax.lax.broadcasted_iota(int, x.shape, 0).reshape(-1), [Batched]),
    "positions negated": (lambda x: ~(jnp.arange(x.shape[0]) < 0), [Batched]),
    "positions selected": (lambda x: jnp.where(jnp.arange(x.shape[0]) < 0, 7, jnp.arange(x.shape[0])), [Batched]),
    "positions, two kinds": (lambda x: jnp.where(x[:, 0] < 0, 7, jnp.arange(x.shape[0])), [Batched]),
    "positions stacked": (lambda x: jnp.stack([jnp.arange(x.shape[0]), jnp.zeros(x.shape[0], int)], 1), [Batched]),
    "positions side by side": (lambda x: jnp.concatenate([jnp.arange(x.shape[0])] * 2), [Batched]),
    "grid": (lambda x: jnp.meshgrid(jnp.arange(x.shape[0]), jnp.arange(4), indexing="ij")[0], [Batched]),
    "numpy positions": (lambda x: np.arange(x.shape[0]) + x[:, 0], [Batched]),
    "numpy rows": (lambda x: np.sqrt(np.arange(x.shape[0] * 4.0)).reshape(-1, 4) * x, [Batched]),
    "numpy ones": (lambda x: (np.ones(x.shape[0]) @ x, np.ones(x.shape[0])), [Partial, Batched]),
    "numpy zeros": (lambda x: jnp.where(np.zeros(x.shape[0], bool), 1.0, x[:, 0]), [Batched]),
    "numpy, merged rows": (lambda x: np.arange(x.shape[0] * 4.0) + x.reshape(-1), [Batched]),
    "numpy of both towers": (lambda x: np.ones((2 * x.shape[0], 1)) * jnp.concatenate([x, x]), [Batched]),
    "numpy number": (lambda x: x.sum(0) * np.float64(1 / x.shape[0]) * np.array([1.0, x.shape[0], 2, 3]), [Partial]),
    "jax constant": (lambda x: jnp.asarray(np.arange(x.shape[0] * 4.0).reshape(-1, 4)) + x, [Batched]),
    "zeros, ones": (
        lambda x: (jnp.zeros_like(x), jnp.ones(x.shape[0]).sum(), jnp.full(x.shape, 2.0).max(0)),
        [Batched, Partial, Partial],
    ),
    "example's own constant": (lambda x: jnp.broadcast_to(jnp.arange(4.0), x.shape), [Batched]),
    "keys": (lambda x: jnp.broadcast_to(jax.random.key(3), x.shape[:1]), [Batched]),
    "constant zeros": (lambda x: ZEROS.at[(x[:, 0] > 0).astype(int)].add(x), [Partial]),
}
ZEROS = jnp.zeros((3, 4))


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, expect = LEGAL[name]
    check_law(f, (X,), (), expect=expect)


@pytest.mark.parametrize("name", ["positions as data", "numpy rows", "zeros, ones", "positions merged"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_law_at_other_sizes(name, size):
    check_law(LEGAL[name][0], (X,), (), sizes=(size,))


def eye(x):
    return np.eye(x.shape[0]) @ x


def linspace(x):
    return jnp.linspace(0.0, 1.0, x.shape[0]) * x[:, 0]


def one_more(x):
    return jnp.sort(jnp.concatenate([jnp.zeros(x.shape[0] + 1)]))


def joined_positions(x):
    return jnp.concatenate([jnp.arange(x.shape[0])[:, None], jnp.zeros((x.shape[0], 1), int)], 1)


ILLEGAL = {
    "eye": (eye, "two batch dimensions"),
    "linspace": (linspace, "n-1 rows for n examples"),
    "one more": (one_more, "n+1 rows for n examples"),
    "joined": (joined_positions, "joined with other data"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    f, clause = ILLEGAL[name]
    if name == "eye":  # a constant of the step has no line
        with pytest.raises(ValueError, match=clause):
            trace(f, (X,))
    else:
        check_refused(f, (X,), (), clause)


def test_a_total_of_the_batch_is_not_late():
    """A mask's denominator is known before the pipeline starts; a loss that the state enters is not."""
    traced = trace(lambda x, w: ((x * w).sum() ** 2, x.sum() ** 2), (X,), (np.ones(4),))
    late = [v in traced.typed.late for v in traced.typed.body.outputs]
    assert late == [True, False]
    assert [type(t) for t in traced.out_types()] == [Invariant, Invariant]


def test_totals_are_completed_once():
    """A sum that is read by what is linear and by what is not, scaled by a total: as clipping by a global norm does."""

    def clipped(x, w):
        g = jax.grad(lambda w: ((x @ w) ** 2).mean())(w)
        return w - 0.1 * g / jnp.linalg.norm(g)

    traced = check_law(clipped, (X,), (np.ones(4),), expect=[Invariant])
    assert [eqn.name for eqn in traced.typed.body.eqns].count("complete") == 1
    assert not any(isinstance(traced.typed.types[v], Partial) for v in traced.typed.late)
