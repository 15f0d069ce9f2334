"""Reductions, scans along an axis, sorting, windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4))
T = RNG.normal(size=(6, 8, 3))
K = RNG.integers(0, 9, size=(6, 4)).astype(np.int32)
BITS = RNG.integers(0, 2, size=(6, 4)).astype(bool)


def pool(x, op=lax.max, init=-jnp.inf):
    return lax.reduce_window(x, init, op, (1, 3, 1), (1, 2, 1), "SAME")


def average_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 2, 1), "SAME") / 3


LEGAL = {
    "all kinds over the batch": (
        lambda x, k, b: (x.sum(0), x.max(0), x.min(0), x.prod(0), b.all(0), b.any(0), k.sum(0), k.max(0)),
        (X, K, BITS),
        (),
        [Partial] * 8,
    ),
    "bitwise": (lambda k: (lax.reduce_and(k, (0,)), lax.reduce_or(k, (0, 1))), (K,), (), [Partial] * 2),
    "over other axes": (
        lambda t: (t.sum(1), t.max((1, 2)), lax.reduce_xor(t[..., 0] > 0, (1,))),
        (T,),
        (),
        [Batched] * 3,
    ),
    "over transposed": (
        lambda t: (t.transpose(1, 0, 2).sum(0), t.transpose(1, 2, 0).sum((0, 1))),
        (T,),
        (),
        [Batched] * 2,
    ),
    "twice": (lambda t: (t.sum(0).sum(0), t.max(0).max(1), t.max(1).max(0)), (T,), (), [Partial] * 3),
    "sum of maxima": (lambda t: t.max(0).sum(0), (T,), (), [Invariant]),
    "bf16": (lambda x: x.astype(jnp.bfloat16).max(0), (X,), (), [Partial]),
    "argmax": (lambda t: (t.argmax(1), t.argmin(2)), (T,), (), [Batched] * 2),
    "argmax of sum": (lambda t: t.sum(0).argmax(0), (T,), (), [Invariant]),
    "user's reduce": (lambda t: lax.reduce(t, 0.0, lambda a, b: a + 2 * b, (1,)), (T,), (), [Batched]),
    "cumulative": (
        lambda t: (jnp.cumsum(t, 1), jnp.cumprod(t, 2), lax.cummax(t, 1), lax.cummin(t, 2), lax.cumlogsumexp(t, 1)),
        (T,),
        (),
        [Batched] * 5,
    ),
    "cumsum of sum": (lambda x: jnp.cumsum(x.sum(0)), (X,), (), [Partial]),
    "cumsum of max": (lambda x: jnp.cumsum(x.max(0)), (X,), (), [Invariant]),
    "cummax of sum": (lambda x: lax.cummax(x.sum(0)), (X,), (), [Invariant]),
    "sort": (
        lambda x, k: (jnp.sort(x, 1), jnp.argsort(k, 1), *lax.sort((k, x), dimension=1, num_keys=1)),
        (X, K),
        (),
        [Batched] * 4,
    ),
    "sort of sum": (lambda x: jnp.sort(x.sum(0)), (X,), (), [Invariant]),
    "top_k": (lambda x: lax.top_k(x, 2), (X,), (), [Batched] * 2),
    "approx_top_k": (lambda x: lax.approx_max_k(x, 2), (X,), (), [Batched] * 2),
    "quantiles": (lambda x: (jnp.median(x, 1), jnp.quantile(x, 0.3, axis=1)), (X,), (), [Batched] * 2),
    "max pool": (lambda t: pool(t), (T,), (), [Batched]),
    "max pool's gradient": (lambda t: jax.grad(lambda t: (pool(t) ** 2).sum())(t), (T,), (), [Batched]),
    "average pool": (average_pool, (T,), (), [Batched]),
    "average pool's gradient": (lambda t: jax.grad(lambda t: (average_pool(t) ** 2).sum())(t), (T,), (), [Batched]),
    "average pool of sum": (lambda t: average_pool(t.sum(0, keepdims=True)), (T,), (), [Partial]),
    "max pool of sum": (lambda t: pool(t.sum(0, keepdims=True)), (T,), (), [Invariant]),
    "pool by a user's function": (
        lambda t: lax.reduce_window(t, 1.0, lambda a, b: a * b, (1, 2, 1), (1, 1, 1), "VALID"),
        (T,),
        (),
        [Batched],
    ),
    "max pool's double gradient": (
        lambda t: jax.jvp(jax.grad(lambda t: (pool(t) ** 2).sum()), (t,), (jnp.ones_like(t),)),
        (T,),
        (),
        [Batched] * 2,
    ),
    "softmax": (lambda x: jax.nn.softmax(x), (X,), (), [Batched]),
    "softmax's gradient": (lambda x: jax.grad(lambda x: (jax.nn.softmax(x) ** 2).sum())(x), (X,), (), [Batched]),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=1), (X,), (), [Batched]),
    "mean of time-major": (lambda t: t.transpose(1, 0, 2).reshape(-1, 3).mean(0), (T,), (), [Partial]),
    "mean of bf16": (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32).mean(), (X,), (), [Partial]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect, rtol=1e-6 if "bf16" in name else 1e-9)


def argmax(x):
    return x.argmax(0)


def argmax_of_all(x):
    return x.argmax()


def cumsum(x):
    return jnp.cumsum(x, 0)


def cumulative_of_merged(t):
    return jnp.cumsum(t.reshape(-1, 3), 0)


def sort(x):
    return jnp.sort(x, 0)


def median(x):
    return jnp.median(x)


def top_k(x):
    return lax.top_k(x[:, 0], 2)


def k_is_batch_size(t):
    return lax.top_k(t, t.shape[0])


def own_reduce(x):
    return lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (0,))


def parity(b):
    return lax.reduce_xor(b, (0,))


def window(x):
    return lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME")


def strided_window(t):
    return lax.reduce_window(t.reshape(-1, 3), 0.0, lax.add, (1, 1), (2, 1), "SAME")


def window_of_batch_size(t):
    return lax.reduce_window(t, 0.0, lax.add, (1, t.shape[0], 1), (1, 1, 1), ((0, 0), (t.shape[0] - 1, 0), (0, 0)))


ILLEGAL = {
    "argmax": (argmax, (X,), "picks one example"),
    "argmax of all": (argmax_of_all, (X,), "picks one example"),
    "cumsum": (cumsum, (X,), "accumulates along the batch"),
    "cumsum of merged": (cumulative_of_merged, (T,), "accumulates along the batch"),
    "sort": (sort, (X,), "sorts along the batch"),
    "median": (median, (X,), "sorts along the batch"),
    "top_k": (top_k, (X,), "takes the largest along the batch"),
    "k": (k_is_batch_size, (RNG.normal(size=(6, 8)),), "batch"),
    "own reduce": (own_reduce, (X,), "function of the user's"),
    "xor": (parity, (BITS,), "exclusive or"),
    "window": (window, (X,), "slides a window along the batch"),
    "strided window": (strided_window, (T,), "slides a window along the batch"),
    "window of batch size": (window_of_batch_size, (T,), "depends on the number of examples"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    f, batched, clause = ILLEGAL[name]
    check_refused(f, batched, (), clause)
