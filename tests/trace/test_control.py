"""Loops and branches, calls, and derivatives of the user's own."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpar.errors import TraceError
from jaxpar.trace import Batched, Invariant, Partial

from .law import check_law, check_refused, trace

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4))
T = RNG.normal(size=(6, 5, 4))
V = RNG.normal(size=4)
WS = RNG.normal(size=(3, 4, 4)) / 2
FLAG = np.bool_(True)


def layers(x, ws):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.mean()), x, ws)


def layers_gradient(x, ws, wrap=lambda f: f):
    def loss(ws):
        out, means = lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), x.mean())), x, ws)
        return (out**2).mean() + means.sum()

    return jax.value_and_grad(loss)(ws)


def shared_weights_gradient(x, v):
    def loss(v):
        return lax.scan(lambda x, _: (jnp.tanh(x * v), None), x, None, length=3)[0].mean()

    return jax.grad(loss)(v)


def recurrence(t, w):
    """Over the steps of each example, from zeros."""

    def step(h, x):
        h = jnp.tanh(x + h @ w)
        return h, h

    last, steps = lax.scan(step, jnp.zeros((t.shape[0], 4)), t.transpose(1, 0, 2))
    return last, steps


def recurrence_gradient(t, w):
    return jax.grad(lambda w: (recurrence(t, w)[1] ** 2).mean())(w)


def bf16_layers(x, ws):
    def loss(ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(jnp.bfloat16), ws.astype(jnp.bfloat16))[0].sum()

    return jax.grad(loss)(ws)


def sums_in_carry(x, v):
    """A total that starts at zero, in a loop over invariant values."""
    return lax.scan(lambda total, s: (total + s * x.sum(0), total[0]), jnp.zeros(4), v)


def sum_into_other_carry(x, v):
    g = x.sum(0)
    return lax.scan(lambda total, s: (total + s * g, None), jnp.ones(4), v)[0]


def sum_made_inside(x, v):
    return lax.scan(lambda total, s: (total + s * x.sum(0), None), jnp.ones(4), v)[0]


def newton_schulz(x, y):
    """An optimizer's loop over a gradient: nonlinear in it."""
    g = x.T @ y
    return lax.fori_loop(0, 3, lambda i, g: 1.5 * g - 0.5 * g @ g.T @ g, g / 100)


def skip_if_not_finite(x, v):
    """As optax.apply_if_finite does."""
    g = x.mean(0)
    return lax.cond(jnp.isfinite(g).all(), lambda v, g: v - 0.1 * jnp.sign(g), lambda v, g: v, v, g)


def update_layers(x, ws):
    """An update of stacked parameters, layer by layer."""
    _, grads = layers_gradient(x, ws)
    return lax.scan(lambda c, wg: (c, wg[0] - wg[1] / jnp.linalg.norm(wg[1])), 0, (ws, grads))[1]


def until_total(x):
    s = x.sum()
    return lax.while_loop(lambda c: c < s**2, lambda c: c + 1.0, 0.0)


def while_steps(x, v):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] * v)), (0, x))


def constants_in_bodies(x):
    """Arrays as large as the batch, made inside a loop."""
    mask = np.arange(x.shape[0]) * 0.5

    def step(x, _):
        own = x[jnp.arange(x.shape[0]), 0]
        return x + mask[:, None] + jnp.arange(x.shape[0])[:, None] + own[:, None] + jnp.ones(x.shape), mask

    return lax.scan(step, x, None, length=2)


def batch_size_in_bodies(x, v):
    return lax.scan(lambda c, s: (c + s * x.shape[0], x.shape[0] * s), v.sum(), v)


@jax.custom_vjp
def clip_gradient(x):
    return x * 1


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def softplus(x):
    return jnp.logaddexp(x, 0.0)


@softplus.defjvp
def softplus_jvp(primals, tangents):
    return softplus(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]


def grad_of(f):
    return lambda x: jax.grad(lambda x: (f(x) ** 2).mean())(x)


LEGAL = {
    "layers": (layers, (X,), (WS,), [Batched, Partial]),
    "layers' gradient": (layers_gradient, (X,), (WS,), [Partial, Partial]),
    "layers' gradient, remat": (functools.partial(layers_gradient, wrap=jax.checkpoint), (X,), (WS,), [Partial] * 2),
    "bf16 layers": (bf16_layers, (X,), (WS,), [Partial]),
    "shared weights": (shared_weights_gradient, (X,), (V,), [Partial]),
    "recurrence": (recurrence, (T,), (WS[0],), [Batched, Batched]),
    "recurrence's gradient": (recurrence_gradient, (T,), (WS[0],), [Partial]),
    "reverse": (
        lambda t: lax.scan(lambda c, x: (c + x, c), jnp.zeros_like(t[:, 0]), t.swapaxes(0, 1), reverse=True),
        (T,),
        (),
        [Batched] * 2,
    ),
    "sums in carry": (sums_in_carry, (X,), (V,), [Partial, Partial]),
    "sum into ones": (sum_into_other_carry, (X,), (V,), [Invariant]),
    "optimizer's loop": (newton_schulz, (X, X[:, ::-1]), (), [Invariant]),
    "optimizer's branch": (skip_if_not_finite, (X,), (V,), [Invariant]),
    "optimizer's scan": (update_layers, (X,), (WS,), [Invariant]),
    "linear loop over a sum": (
        lambda x, ws: lax.scan(lambda g, w: (g @ w, None), x.sum(0), ws)[0],
        (X,),
        (WS,),
        [Partial],
    ),
    "while": (while_steps, (X,), (V,), [Invariant, Batched]),
    "while until a total": (until_total, (X,), (), [Invariant]),
    "while over a total": (
        lambda x: lax.while_loop(lambda c: c < 99, lambda c: c + 7.0, x.sum()),
        (X,),
        (),
        [Invariant],
    ),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * i, x), (X,), (), [Batched]),
    "constants in bodies": (constants_in_bodies, (X,), (), [Batched, Batched]),
    "batch size in bodies": (batch_size_in_bodies, (X,), (V,), [Invariant, Invariant]),
    "cond": (lambda x, flag: lax.cond(flag, jnp.tanh, lambda x: x * 2, x), (X,), (FLAG,), [Batched]),
    "cond, gradient": (
        lambda x, flag: jax.grad(lambda x: lax.cond(flag, jnp.tanh, lambda x: x * 2, x).sum())(x),
        (X,),
        (FLAG,),
        [Batched],
    ),
    "cond, sum or zero": (lambda x, flag: lax.cond(flag, lambda: x.sum(), lambda: 0.0), (X,), (FLAG,), [Partial]),
    "cond, sum or one": (
        lambda x, flag: lax.cond(flag, lambda s: s, lambda s: 1.0, x.sum()),
        (X,),
        (FLAG,),
        [Invariant],
    ),
    "cond, zeros or batch": (
        lambda t, flag: lax.cond(flag, lambda t: t.swapaxes(0, 1).reshape(-1), lambda t: jnp.zeros(t.size), t),
        (T,),
        (FLAG,),
        [Batched],
    ),
    "switch": (lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x), (X,), (1,), [Batched]),
    "associative_scan": (lambda t: lax.associative_scan(jnp.multiply, t, axis=1), (T,), (), [Batched]),
    "map over steps": (lambda t: lax.map(jnp.tanh, t.swapaxes(0, 1)), (T,), (), [Batched]),
    "nested loops": (
        lambda x, ws: lax.scan(lambda x, _: (layers(x, ws)[0], None), x, None, length=2)[0],
        (X,),
        (WS,),
        [Batched],
    ),
    "remat": (grad_of(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))), (X,), (), [Batched]),
    "remat with names": (
        grad_of(
            jax.checkpoint(
                lambda x: jnp.sin(checkpoint_name(jnp.sin(x), "a")),
                policy=jax.checkpoint_policies.save_only_these_names("a"),
            )
        ),
        (X,),
        (),
        [Batched],
    ),
    "custom_vjp": (grad_of(clip_gradient), (X,), (), [Batched]),
    "custom_jvp": (grad_of(softplus), (X,), (), [Batched]),
    "relu, gelu, silu": (
        lambda x: [grad_of(f)(x) for f in (jax.nn.relu, jax.nn.gelu, jax.nn.silu)],
        (X,),
        (),
        [Batched] * 3,
    ),
    "nested jit": (lambda x: jax.jit(lambda x: jax.jit(jnp.tanh)(x).mean())(x), (X,), (), [Partial]),
    "composite": (lambda x: lax.composite(lambda x: x * 2, "my.op")(x), (X,), (), [Batched]),
    "vmap": (lambda x, v: jax.vmap(lambda x: jnp.outer(x, v).sum(0))(x), (X,), (V,), [Batched]),
    "dead coupling": (
        lambda x: lax.scan(lambda x, _: (x + 0 * jnp.sort(x, 0).shape[0], None), x, None, length=2)[0],
        (X,),
        (),
        [Batched],
    ),
}


@pytest.mark.parametrize("name", LEGAL)
def test_law(name):
    f, batched, invariant, expect = LEGAL[name]
    check_law(f, batched, invariant, expect=expect, rtol=0.05 if "bf16" in name else 1e-9)


def loop_over_examples(x):
    return lax.map(jnp.tanh, x)


def carry_over_examples(x):
    return lax.scan(lambda c, x: (0.9 * c + x, c), jnp.zeros(4), x)


def loop_as_long_as_the_batch(x, v):
    return lax.fori_loop(0, x.shape[0], lambda i, v: v * 2, v) + x.sum(0)


def until_all_are_done(x):
    return lax.while_loop(lambda x: jnp.any(x > 0.1), lambda x: x / 2, x)


def branch_by_examples(x):
    return lax.cond(x[:, 0].max() > 0, jnp.tanh, jnp.sin, x)


def normalised_in_a_loop(x):
    return lax.scan(lambda x, _: (x - x.mean(0), None), x, None, length=2)[0]


def sorted_in_a_loop(x):
    def body(x, _):
        return jnp.sort(x, 0), None

    return lax.scan(body, x, None, length=2)[0]


def square_in_a_loop(x, v):
    return lax.scan(lambda c, s: (c, s * x.sum(0) ** 2), 0, v)[1]


ILLEGAL = {
    "map": (loop_over_examples, (X,), (), "loops over the examples"),
    "scan": (carry_over_examples, (X,), (), "loops over the examples"),
    "long": (loop_as_long_as_the_batch, (X,), (V,), "loops over the examples"),
    "while": (until_all_are_done, (X,), (), "as many iterations as the examples together ask for"),
    "normalised": (normalised_in_a_loop, (X,), (), "needs a sum over the whole batch to be complete inside a loop"),
    "sorted": (sorted_in_a_loop, (X,), (), "sorts along the batch"),
    "made inside": (sum_made_inside, (X,), (V,), "needs a sum over the whole batch to be complete inside a loop"),
    "square": (square_in_a_loop, (X,), (V,), "needs a sum over the whole batch to be complete inside a loop"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    check_refused(*ILLEGAL[name])


def test_a_branch_on_the_batch_is_known_before_the_pipeline():
    check_law(branch_by_examples, (X,), (), expect=[Batched])


def test_prints_are_left_out_and_said_so(caplog):
    def f(x):
        jax.debug.print("{}", x.sum())
        return lax.scan(lambda x, _: (jax.debug.callback(lambda x: None, x), (x * 2, None))[1], x, None, length=2)[0]

    with caplog.at_level(logging.WARNING):
        trace(f, (X,))
    assert "test_control.py" in caplog.text
    assert "left out of the pipelined step" in caplog.text


def test_other_effects_are_refused():
    def f(x):
        return jax.experimental.io_callback(lambda x: x, jax.ShapeDtypeStruct((), X.dtype), x.sum()) + x.sum()

    with pytest.raises(TraceError, match=r"test_control.py:\d+: io_callback has side effects"):
        trace(f, (X,))


def callback(x):
    return jax.pure_callback(np.linalg.norm, jax.ShapeDtypeStruct((), x.dtype), x)


def callback_of_batch_shape(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def collective(x):
    mesh = jax.make_mesh((1,), ("i",), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def ragged(x, w):
    return lax.ragged_dot(x, w, jnp.array([2, x.shape[0] - 2]))


@pytest.mark.parametrize(
    ("f", "invariant", "clause"),
    [
        (callback, (), "calls Python with the examples"),
        (callback_of_batch_shape, (), "can't be evaluated for another number of examples"),
        (collective, (), "written for a mesh by hand"),
        (ragged, (WS[:2],), "groups of rows that examples fill together"),
    ],
)
def test_operations_with_advice_of_their_own(f, invariant, clause):
    check_refused(f, (X,), invariant, clause)
