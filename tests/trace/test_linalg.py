"""Decompositions, solves, and Fourier transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4))
A = RNG.normal(size=(6, 4, 4))
S = A @ A.transpose(0, 2, 1) + 4 * np.eye(4)
LOW = np.tril(S)
W = S[0]


def gradient(f):
    return lambda *xs: jax.grad(lambda *xs: sum((o**2).sum() for o in jax.tree.leaves(f(*xs))))(*xs)


LEGAL = {
    "cholesky": (jnp.linalg.cholesky, (S,), ()),
    "cholesky's gradient": (gradient(jnp.linalg.cholesky), (S,), ()),
    "eigh": (lambda s: jnp.linalg.eigh(s)[0], (S,), ()),
    "eigh's gradient": (gradient(lambda s: jnp.linalg.eigh(s)[0]), (S,), ()),
    "qr": (jnp.linalg.qr, (A,), ()),
    "svd": (lambda a: jnp.linalg.svd(a, compute_uv=False), (A,), ()),
    "lu": (lambda a: jax.scipy.linalg.lu_factor(a), (A,), ()),
    "det": (lambda a: (jnp.linalg.det(a), jnp.linalg.slogdet(a)[1]), (A,), ()),
    "det's gradient": (gradient(jnp.linalg.slogdet), (A,), ()),
    "inv": (jnp.linalg.inv, (S,), ()),
    "solve": (lambda a, x: jnp.linalg.solve(a, x[..., None]), (S, X), ()),
    "solve's gradient": (gradient(lambda a, x: jnp.linalg.solve(a, x[..., None])), (S, X), ()),
    "solve, one matrix": (lambda x, w: jnp.linalg.solve(w, x.T), (X,), (W,)),
    "solve, one matrix's gradient": (gradient(lambda x, w: jnp.linalg.solve(w, x.T)), (X,), (W,)),
    "triangular, one matrix": (lambda x, w: lax.linalg.triangular_solve(w, x, left_side=False), (X,), (np.tril(W),)),
    "triangular": (lambda s, x: lax.linalg.triangular_solve(s, x[..., None], left_side=True, lower=True), (LOW, X), ()),
    "expm": (jax.scipy.linalg.expm, (A / 9,), ()),
    "tridiagonal_solve": (lambda x: lax.linalg.tridiagonal_solve(x * 0, x + 9, x * 0, x[..., None]), (X,), ()),
    "fft": (lambda x: (jnp.fft.fft(x), jnp.fft.rfft(x), jnp.fft.fft2(A[:1] * x[:, None])), (X,), ()),
    "batch behind": (lambda x: jnp.fft.fft(x, axis=1).T, (X,), ()),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant = LEGAL[name]
    check_law(f, batched, invariant, rtol=1e-8)


def test_of_reductions():
    """Linear ones keep a sum; others wait until it is complete."""
    check_law(lambda x: (jnp.fft.fft(x.sum(0)), jnp.fft.irfft(x.sum(0))), (X,), (), expect=[Partial, Partial])
    f = lambda s, w: (jnp.linalg.cholesky(s.sum(0)), lax.linalg.triangular_solve(w, s.sum(0)))
    check_law(f, (S,), (np.tril(W),), expect=[Invariant, Partial])


def gram_matrix(x):
    return jnp.linalg.eigvalsh(x.T @ x), jnp.linalg.qr(x)


def transform_batch(x):
    return jnp.fft.fft(x, axis=0)


def transform_image_of_examples(x):
    return jnp.fft.fft2(x)


ILLEGAL = {
    "rows of one matrix": (gram_matrix, (X[:, :2],), "rows or columns of one matrix"),
    "fft": (transform_batch, (X,), "transforms along the batch"),
    "fft2": (transform_image_of_examples, (X,), "transforms along the batch"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    f, batched, clause = ILLEGAL[name]
    check_refused(f, batched, (), clause)


def test_the_batch_type_of_each_operand_is_looked_at():
    """The right-hand sides of one system may be examples; its matrix may not."""
    check_law(
        lambda x, w: lax.linalg.triangular_solve(w, x.T, left_side=True, lower=True),
        (X,),
        (np.tril(W),),
        expect=[Batched],
    )
