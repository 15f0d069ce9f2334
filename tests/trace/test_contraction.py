"""Matrix products, convolutions, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused

RNG = np.random.default_rng(0)
X, Y, W = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4)), RNG.normal(size=(4, 3))
T, S = RNG.normal(size=(6, 5, 4)), RNG.normal(size=(6, 5, 4))
M = RNG.normal(size=(6, 4, 3))
IMAGES = RNG.normal(size=(6, 5, 5, 4))
KERNEL = RNG.normal(size=(3, 3, 4, 2))


def conv(x, k, strides=(1, 1), padding="SAME", layout=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=layout, **options)


def gradients(f):
    """Of a sum of squares, for images and kernel."""
    return lambda x, k: jax.grad(lambda x, k: (f(x, k) ** 2).sum() / x.shape[0], (0, 1))(x, k)


def nchw(x, k):
    layout = ("NCHW", "OIHW", "NCHW")
    return conv(x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1), layout=layout)


CONVOLUTIONS = {
    "nhwc": (conv, KERNEL),
    "nchw": (nchw, KERNEL),
    "strided": (lambda x, k: conv(x, k, (2, 2), "VALID"), KERNEL),
    "dilated": (lambda x, k: conv(x, k, rhs_dilation=(2, 2)), KERNEL),
    "transposed": (lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"), KERNEL),
    "grouped": (lambda x, k: conv(x, k, feature_group_count=2), RNG.normal(size=(3, 3, 2, 6))),
    "depthwise": (lambda x, k: conv(x, k, feature_group_count=4), RNG.normal(size=(3, 3, 1, 8))),
    "pointwise": (conv, RNG.normal(size=(1, 1, 4, 2))),
    "batch last": (lambda x, k: conv(x.transpose(1, 2, 3, 0), k, layout=("HWCN", "HWIO", "HWCN")), KERNEL),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_gradients(name):
    f, kernel = CONVOLUTIONS[name]
    check_law(lambda x, k: (f(x, k), *gradients(f)(x, k)), (IMAGES,), (kernel,), expect=[Batched, Batched, Partial])


LEGAL = {
    "batch first": (lambda x, w: x @ w, (X,), (W,), [Batched]),
    "batch on the right": (lambda x, w: w.T @ x.T, (X,), (W,), [Batched]),
    "batch in the middle": (lambda t, w: jnp.einsum("btd,de->tbe", t, w), (T,), (W,), [Batched]),
    "contracted": (lambda x, y: x.T @ y, (X, Y), (), [Partial]),
    "contracted with more": (lambda t, s: jnp.einsum("btd,bte->de", t, s), (T, S), (), [Partial]),
    "own matrices": (lambda t, m: t @ m, (T, M), (), [Batched]),
    "own matrices, batch last": (
        lambda t, m: jnp.einsum("tdb,deb->etb", t.transpose(1, 2, 0), m.transpose(1, 2, 0)),
        (T, M),
        (),
        [Batched],
    ),
    "inner products": (lambda x, y: jnp.einsum("bd,bd->b", x, y), (X, Y), (), [Batched]),
    "two batch dimensions of the product": (lambda t, s: jnp.einsum("bqd,bkd->bqk", t, s), (T, S), (), [Batched]),
    "heads": (
        lambda t, s: jnp.einsum("bqhd,bkhd->bhqk", t.reshape(-1, 5, 2, 2), s.reshape(-1, 5, 2, 2)),
        (T, S),
        (),
        [Batched],
    ),
    "merged rows": (
        lambda t, s: (t.reshape(-1, 4).T @ s.reshape(-1, 4), t.reshape(-1, 4) @ W),
        (T, S),
        (),
        [Partial, Batched],
    ),
    "merged with ones": (lambda t: jnp.ones(t.shape[0] * 5) @ t.transpose(1, 0, 2).reshape(-1, 4), (T,), (), [Partial]),
    "sum by ones": (lambda x: jnp.ones(x.shape[0]) @ x, (X,), (), [Partial]),
    "partial and weights": (lambda x, w: (x.sum(0) @ w, w.T @ x.mean(0)), (X,), (W,), [Partial] * 2),
    "partial and partial": (lambda x, y: (x.T @ y) @ x.sum(0), (X, Y), (), [Invariant]),
    "partial and batched": (lambda x: x @ x.sum(0), (X,), (), None),
    "max and weights": (lambda x, w: x.max(0) @ w, (X,), (W,), [Invariant]),
    "gradient of a layer": (lambda x, w: jax.grad(lambda w: jnp.tanh(x @ w).mean())(w), (X,), (W,), [Partial]),
    "hessian's diagonal blocks": (
        lambda x, w: jax.vmap(lambda x: jax.hessian(lambda x: (jnp.tanh(x @ w)).sum())(x))(x),
        (X,),
        (W,),
        [Batched],
    ),
    "integers": (lambda x, w: (x * 10).astype(int) @ (w * 10).astype(int), (X,), (W,), [Batched]),
    "bf16 into f32": (
        lambda x, y: jnp.dot(x.T.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32),
        (X, Y),
        (),
        [Partial],
    ),
    "complex": (lambda x, y: (x * 1j).T @ y, (X, Y), (), [Partial]),
    "attention": (
        lambda t, s: jax.nn.dot_product_attention(*[t.reshape(-1, 5, 2, 2)] * 2, s.reshape(-1, 5, 2, 2)),
        (T, S),
        (),
        [Batched],
    ),
    "own kernels": (
        lambda x, m: jax.vmap(lambda x, k: conv(x[None], k[None])[0])(x, m),
        (IMAGES, M[:, None]),
        (),
        [Batched],
    ),
    "own grouped kernels": (
        lambda x, m: jax.vmap(lambda x, k: conv(x[None], k[:, :, :2], feature_group_count=2)[0])(x, m),
        (IMAGES, RNG.normal(size=(6, 1, 1, 4, 4))),
        (),
        [Batched],
    ),
    "images of one as kernels": (
        lambda x, k: jax.vmap(lambda kernel: conv(k, kernel))(x),
        (RNG.normal(size=(6, 3, 3, 4, 2)),),
        (IMAGES[:1],),
        [Batched],
    ),
    "gradients of examples": (
        lambda x, k: jax.vmap(lambda x: jax.grad(lambda k: (conv(x[None], k) ** 2).sum())(k))(x),
        (IMAGES,),
        (KERNEL,),
        [Batched],
    ),
    "conv of a sum": (lambda x, k: conv(x.sum(0, keepdims=True), k), (IMAGES,), (KERNEL,), [Partial]),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect, rtol=1e-5 if "f32" in name else 1e-9)


def similarities(x, y):
    return x @ y.T


def gram(x):
    return jnp.einsum("bd,cd->bc", x, x)


def contract_with_table(x, w):
    return x.T @ w[: x.shape[0]]


def mixes_orders(t, s):
    return t.transpose(1, 0, 2).reshape(-1, 4).T @ s.reshape(-1, 4)


def batch_as_space(x, k):
    return lax.conv(x.transpose(1, 3, 0, 2), k.transpose(3, 2, 0, 1), (1, 1), "SAME")


def batch_as_features(x, k):
    return conv(x.transpose(1, 2, 3, 0), jnp.ones((1, 1, x.shape[0], 3)))


def batch_groups(x):
    z = jnp.concatenate([x, x])
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(z, KERNEL, (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2)


ILLEGAL = {
    "similarities": (similarities, (X, Y), (), "multiplies examples with other examples"),
    "gram": (gram, (X,), (), "multiplies examples with other examples"),
    "orders": (mixes_orders, (T, S), (), "multiplies examples with other examples"),
    "space": (batch_as_space, (IMAGES,), (KERNEL,), "convolves along the batch"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    check_refused(*ILLEGAL[name])


def test_batch_as_features_is_a_sum():
    check_law(batch_as_features, (IMAGES,), (KERNEL,), expect=[Partial])


def test_contraction_with_rows_of_a_table_is_a_sum():
    check_law(contract_with_table, (X,), (RNG.normal(size=(8, 3)),), expect=[Partial])


def test_batch_groups_are_refused():
    check_refused(batch_groups, (IMAGES,), (), "convolves along the batch")
