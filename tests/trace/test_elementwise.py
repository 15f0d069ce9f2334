"""Elementwise operations, types of numbers, and partial reductions through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused, trace

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
V, W = RNG.normal(size=4), RNG.normal(size=(4, 3))
U = RNG.uniform(0.1, 0.9, size=(6, 4))
K = RNG.integers(-5, 100, size=(6, 4)).astype(np.int32)
Z = X + 1j * Y

UNARY = {
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 "
    "expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square stop_gradient tan "
    "tanh reciprocal": U,
    "bitwise_not clz population_count neg sign": K,
    "conj imag real abs exp": Z,
}
BINARY = {
    "add sub mul div max min atan2 pow rem nextafter complex eq ne lt le gt ge igamma igammac zeta igamma_grad_a": (
        U,
        U + 0.5,
    ),
    "add sub mul div max min rem bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic "
    "shift_right_logical": (K, K % 7 + 1),
    "add sub mul div eq": (Z, Z[::-1]),
}


@pytest.mark.parametrize(("names", "x"), UNARY.items(), ids=["real", "integer", "complex"])
def test_unary(names, x):
    operations = [getattr(lax, name) for name in names.split()]
    check_law(lambda x: [f(x) for f in operations], (x,), expect=[Batched] * len(operations))


@pytest.mark.parametrize(("names", "xy"), BINARY.items(), ids=["real", "integer", "complex"])
def test_binary(names, xy):
    """Two batched operands; a batched one and a row that is the same for all."""
    operations = [getattr(lax, name) for name in names.split()]
    x, y = xy
    both = trace(lambda x, y: [f(x, y) for f in operations], (x, y))
    shared = trace(lambda x, y: [f(x, jnp.broadcast_to(y, x.shape)) for f in operations], (x,), (y[0],))
    for traced in (both, shared):
        assert [type(t) for t in traced.out_types()] == [Batched] * len(operations)


LEGAL = {
    "scalars and rows": (lambda x, v: x * 2 + v, (X,), (V,), [Batched]),
    "one column for each example": (lambda x: x * x[:, :1] + x.mean(1, keepdims=True), (X,), (), [Batched]),
    "clamp": (lambda x: lax.clamp(-0.5, x, x * 0 + 1), (X,), (), [Batched]),
    "integer_pow": (lambda x: x**3, (X,), (), [Batched]),
    "select": (lambda x: jnp.where(x > 0, x, 0.0), (X,), (), [Batched]),
    "select by invariant": (lambda x, v: jnp.where(v > 0, x, v), (X,), (V,), [Batched]),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 10), (X,), (), [Batched]),
    "bitcast to the same size": (lambda x: lax.bitcast_convert_type(x, jnp.int64), (X,), (), [Batched]),
    "bitcast to smaller": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), (X,), (), [Batched]),
    "bitcast to larger": (
        lambda x: lax.bitcast_convert_type(x.astype(jnp.uint8).reshape(x.shape[0], 1, 4), jnp.uint32),
        (K,),
        (),
        [Batched],
    ),
    "bf16": (lambda x: jnp.tanh(x.astype(jnp.bfloat16) * 2), (X,), (), [Batched]),
    "complex": (lambda x: jnp.abs(lax.complex(x, x) * 2j), (X,), (), [Batched]),
    "barrier": (lambda x, v: lax.optimization_barrier((x, v)), (X,), (V,), [Batched, Invariant]),
    "name": (lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x), (X,), (), [Batched]),
    "device_put": (lambda x: jax.device_put(x) + 1, (X,), (), [Batched]),
    # partial reductions
    "mean": (lambda x: x.mean(), (X,), (), [Partial]),
    "mean over all and over rows": (lambda x: (x.mean(0), x.mean(), x.sum() / x.size), (X,), (), [Partial] * 3),
    "linear": (lambda x, v: -(x.sum(0) * v) / 3 + x.mean(0) * 2 - jnp.zeros(4), (X,), (V,), [Partial]),
    "plus a constant": (lambda x, v: x.sum(0) + v, (X,), (V,), [Invariant]),
    "squared": (lambda x: x.sum(0) ** 2, (X,), (), [Invariant]),
    "product of two": (lambda x: x.sum(0) * x.mean(0), (X,), (), [Invariant]),
    "divided by another": (lambda x: x.sum(0) / (x**2).sum(0), (X,), (), [Invariant]),
    "one over": (lambda x: 1 / x.sum(0), (X,), (), [Invariant]),
    "integer quotient": (lambda k: k.sum(0) // 4, (K,), (), [Invariant]),
    "integer lax.div": (lambda k: lax.div(k.sum(0), jnp.full(4, 4)), (K,), (), [Invariant]),
    "integer product": (lambda k: k.sum(0) * 4, (K,), (), [Partial]),
    "count": (lambda k: (k > 3).sum(), (K,), (), [Partial]),
    "count to float": (lambda k: (k > 3).sum() / k.size, (K,), (), [Partial]),
    "to int": (lambda x: x.sum(0).astype(jnp.int32), (X,), (), [Invariant]),
    "to bool": (lambda x: x.sum(0).astype(bool), (X,), (), [Invariant]),
    "small ints that wrap": (
        lambda k: k.astype(jnp.int8).sum(0, dtype=jnp.int8).astype(jnp.int32),
        (K,),
        (),
        [Invariant],
    ),
    "narrower ints": (lambda k: (k * 99999).sum(0).astype(jnp.int8), (K,), (), [Partial]),
    "to complex": (lambda x: x.sum(0).astype(complex) * 2j, (X,), (), [Partial]),
    "complex parts": (lambda z: (z.sum(0).real, z.sum(0).imag, z.sum(0).conj()), (Z,), (), [Partial] * 3),
    "lax.complex of sums": (lambda x: lax.complex(x.sum(0), x.mean(0)), (X,), (), [Partial]),
    "select by invariant of sums": (lambda x, v: jnp.where(v > 0, x.sum(0), 0.0), (X,), (V,), [Partial]),
    "select by invariant or constant": (lambda x, v: jnp.where(v > 0, x.sum(0), 1.0), (X,), (V,), [Invariant]),
    "select by sum": (lambda x, v: jnp.where(x.sum(0) > 0, v, 2 * v), (X,), (V,), [Invariant]),
    "clamped sum": (lambda x: jnp.clip(x.sum(0), -1, 1), (X,), (), [Invariant]),
    "reduce_precision of sum": (lambda x: lax.reduce_precision(x.sum(0), 5, 10), (X,), (), [Invariant]),
    "integer_pow of sum": (lambda x: x.sum(0) ** 3, (X,), (), [Invariant]),
    "stop_gradient of sum": (lambda x: lax.stop_gradient(x.sum(0)), (X,), (), [Partial]),
    "barrier of sum": (lambda x: lax.optimization_barrier(x.sum(0)), (X,), (), [Partial]),
    "max then linear": (lambda x: -x.max(0), (X,), (), [Invariant]),
    "max then monotone": (lambda x: jnp.exp(x.max(0)), (X,), (), [Invariant]),
    "max plus sum": (lambda x: x.max(0) + x.sum(0), (X,), (), [Invariant]),
    "max to other type": (lambda x: x.max(0).astype(jnp.float32), (X,), (), [Invariant]),
    "two sums": (lambda x: x.sum(0) - (x**2).sum(0) + 0 * V, (X,), (), [Partial]),
    "minus zero literal": (lambda x: x.sum() - 0.0, (X,), (), [Partial]),
    "batch statistic of the data": (lambda x: (x - x.mean(0)) / x.std(0), (X,), (), [Batched]),
    "variance": (lambda x: (x.var(), x.var(0, ddof=1)), (X,), (), None),
    "logsumexp over the batch": (lambda x: jax.nn.logsumexp(x), (X,), (), [Invariant]),
    "softmax over the batch": (lambda x: jax.nn.softmax(x, axis=0), (X,), (), [Batched]),
    "masked mean": (lambda x, m: (x.sum(1) * m).sum() / m.sum(), (X, U[:, 0] > 0.4), (), [Invariant]),
    "normaliser of the number of examples": (lambda x: x.sum() / x.shape[0] ** 2 + 0.0, (X,), (), [Partial]),
    "normaliser with an examples' value": (lambda x: x * (x.shape[0] - 1) + x.shape[0], (X,), (), [Batched]),
    "normaliser as an int": (lambda k: k.sum() * k.shape[0], (K,), (), [Partial]),
    "batch size added": (lambda x: x.sum() + x.shape[0], (X,), (), [Invariant]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect)


def pairs(x):
    return x[:, None, :] * x[None, :, :]


def outer_sum(x):
    y = x[:, 0]
    return y[:, None] + y[None, :]


def exponent_is_batch_size(x):
    return lax.integer_pow(x, x.shape[0])


ILLEGAL = {
    "pairs": (pairs, (X,), (), "pairs examples with other examples"),
    "outer sum": (outer_sum, (X,), (), "pairs examples with other examples"),
    "power": (exponent_is_batch_size, (X,), (), "depends on the number of examples (y)"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    check_refused(*ILLEGAL[name])


def test_the_exponent_may_be_the_batch_size_for_the_whole_batch():
    check_law(lambda x, v: (lax.integer_pow(v, x.shape[0]) + x.sum(0), x.sum(0) ** x.shape[0]), (X,), (V,))
