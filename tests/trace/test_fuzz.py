"""Soundness: whatever composition of operations the types accept obeys the law."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxpar.errors import TraceError

from .law import check_law

RNG = np.random.default_rng(0)
X, Y, T = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4)), RNG.normal(size=(6, 5, 4))
C, V, FLAG = RNG.integers(0, 4, size=6), RNG.normal(size=4), np.bool_(True)
KEY = jax.random.key(0)


def axis_of(x, a):
    return a % x.ndim if x.ndim else None


def fit(x, y):
    """`y`, or what of it can be combined with x."""
    return y if y.shape == x.shape or y.ndim == 0 else jnp.sum(y)


def along(f):
    """An operation along one axis, where there is one."""
    return lambda x, y, a: f(x, axis_of(x, a)) if x.ndim else x


def merge(x, axis):
    if axis + 1 == x.ndim:
        return x
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def halves(x, axis):
    return x if x.shape[axis] % 2 else x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])


def into_steps(x, axis):
    return x if x.shape[axis] % 5 else x.reshape(*x.shape[:axis], 5, x.shape[axis] // 5, *x.shape[axis + 1 :])


def layer(x, axis):
    return jnp.tanh(jnp.moveaxis(x, axis, -1) @ jnp.ones((x.shape[axis], 3)))


def weighted(x, y, a):
    """Contract the first dimensions of both."""
    return jnp.tensordot(x, y, (0, 0)) if x.ndim and y.ndim and x.shape[0] == y.shape[0] else x


def own_rows(x, y, a):
    return x[jnp.arange(x.shape[0]), a % x.shape[1]] if x.ndim > 1 else x


def picked(x, axis):
    return jnp.take_along_axis(x, jnp.argsort(x, axis), axis)


def scattered(x, y, a):
    """Each leading row of x added where y says."""
    if not x.ndim or not y.ndim or x.shape[0] != y.shape[0]:
        return x
    rows = (jnp.abs(y.reshape(y.shape[0], -1)[:, 0]) * 3).astype(int) % 5
    return jnp.zeros((5, *x.shape[1:])).at[rows].add(x)


def looped(x, y, a):
    return lax.scan(lambda c, v: (jnp.tanh(c + v), (c * v).sum()), x, V[:3])[a % 2]


def accumulated(x, y, a):
    return lax.scan(lambda c, v: (c + v * y.sum(), c * 2), jnp.zeros(()), V[:3])[a % 2]


def over_first(x, y, a):
    """A loop over the leading dimension, whatever it is."""
    return lax.scan(lambda c, v: (c, jnp.sin(v)), 0.0, x)[1] if x.ndim else x


def updated(x, axis):
    return lax.dynamic_update_slice_in_dim(x, 2 * lax.slice_in_dim(x, 0, 1, axis=axis), 1, axis)


OPS = [
    lambda x, y, a: jnp.sin(x),
    lambda x, y, a: -2 * x,
    lambda x, y, a: jnp.where(x > 0, x, 0.0),
    lambda x, y, a: x + fit(x, y),
    lambda x, y, a: x * fit(x, y),
    lambda x, y, a: x / (1 + jnp.abs(fit(x, y))),
    lambda x, y, a: jnp.where(fit(x, y) > 0, x, -x),
    lambda x, y, a: x - x.mean(),
    lambda x, y, a: (x * 10).astype(int).astype(float),
    lambda x, y, a: jnp.outer(x, jnp.ones(2)).reshape(*x.shape, 2),
    lambda x, y, a: x.T,
    lambda x, y, a: x[None] + jnp.zeros((2,) + (1,) * x.ndim),
    lambda x, y, a: jnp.stack([x, fit(x, y) + jnp.zeros_like(x)], a % (x.ndim + 1)),
    lambda x, y, a: x + jax.random.normal(jax.random.fold_in(KEY, a), x.shape),
    lambda x, y, a: x + lax.broadcasted_iota(float, x.shape, a % x.ndim) if x.ndim else x,
    lambda x, y, a: lax.cond(FLAG, jnp.sin, jnp.cos, x),
    lambda x, y, a: jax.nn.one_hot((jnp.abs(x) * 3).astype(int) % 4, 4),
    lambda x, y, a: jax.grad(lambda x: (jnp.sin(x) * fit(x, y)).sum())(x),
    along(lambda x, a: jnp.concatenate([x, 2 * x], a)),
    along(lambda x, a: jnp.sum(x, a)),
    along(lambda x, a: jnp.mean(x, a)),
    along(lambda x, a: jnp.max(x, a, initial=-9.0)),
    along(lambda x, a: jnp.sum(x, a, keepdims=True) * jnp.ones_like(x)),
    along(lambda x, a: jnp.cumsum(x, a)),
    along(lambda x, a: jnp.sort(x, a)),
    along(lambda x, a: jax.nn.softmax(x, a)),
    along(lambda x, a: jnp.flip(x, a)),
    along(lambda x, a: jnp.argmax(x, a).astype(float)),
    along(lambda x, a: jnp.split(x, [x.shape[a] // 2], a)[0]),
    along(lambda x, a: lax.slice_in_dim(x, 1, x.shape[a], axis=a)),
    along(lambda x, a: jnp.take(x, jnp.array([0, 2, 7]), a)),
    along(lambda x, a: lax.dynamic_index_in_dim(x, 1, a)),
    along(lambda x, a: jnp.pad(x, [(0, 1 if i == a else 0) for i in range(x.ndim)])),
    along(lambda x, a: jnp.pad(x, [(x.shape[i] if i == a else 0, 0) for i in range(x.ndim)])),
    along(lambda x, a: jnp.moveaxis(x, a, 0)),
    along(lambda x, a: jnp.expand_dims(x, a)),
    along(merge), along(halves), along(into_steps), along(layer), along(picked), along(updated),
    weighted, own_rows, scattered, looped, accumulated, over_first,
]  # fmt: skip


def compose(program):
    """The function that a list of (operation, operand, operand, axis) stands for: every value that it makes."""

    def f(x, y, t, c, v):
        pool = [x, y, t, jax.nn.one_hot(c, 4), v]
        for op, i, j, axis in program:
            if max(pool[-i % len(pool)].size, pool[-j % len(pool)].size) < 2000:
                pool.append(OPS[op](pool[-i % len(pool)], pool[-j % len(pool)], axis))
        return pool

    return f


STEPS = st.tuples(st.integers(0, len(OPS) - 1), st.integers(1, 5), st.integers(1, 7), st.integers(0, 3))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=1, max_size=6))
def test_what_is_accepted_obeys_the_law(program):
    with contextlib.suppress(TraceError):  # to refuse is always sound
        check_law(compose(program), (X, Y, T, C), (V,), rtol=1e-7)
