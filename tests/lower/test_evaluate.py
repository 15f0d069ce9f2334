"""The evaluator: rows of whole-batch draws, control flow re-emitted, the user's layouts. (Its law: tests/trace.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpar.lower.evaluate import Rows, _multiply_add, evaluate, keep_axes
from jaxpar.trace import INVARIANT, Batched, Size, Var
from jaxpar.trace.capture import pair_jaxprs
from jaxpar.trace.infer import infer_types
from jaxpar.trace.ir import Eqn

WORDS = st.integers(0, 2**32 - 1)


def typed_body(f, *shapes):
    """The typed program of f, whose arguments hold examples along dimension 0, from sizes 6 and 2."""
    at = lambda n: jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct((n, *s), "float64") for s in shapes))
    return infer_types(pair_jaxprs(at(6), at(2), (6, 2)), [Batched(0)] * len(shapes), [False] * len(shapes)).body


def evaluate_rows(body, args, rows):
    env = dict(zip(body.inputs, args, strict=True))
    evaluate(body.eqns, env, rows)
    return [env[v] for v in body.outputs]


@settings(deadline=None)
@given(WORDS, WORDS, WORDS)
def test_multiply_add(a, b, c):
    """high 2^32 + low = a b + c, exactly."""
    high, low = _multiply_add(jnp.uint32(a), b, jnp.uint32(c))
    assert int(high) * 2**32 + int(low) == a * b + c


@pytest.mark.parametrize(("width", "shape"), [(8, (40, 3)), (16, (3, 40)), (32, (2, 40, 5)), (64, (40,))])
def test_rows_of_a_draw(width, shape):
    """Rows at a traced place are those of the whole draw."""
    key = jax.random.key(11)
    dim = shape.index(40)
    draw = lambda n: lambda k: jax.random.bits(k, tuple(n if s == 40 else s for s in shape), f"uint{width}")
    body = pair_jaxprs(jax.make_jaxpr(draw(40))(key), jax.make_jaxpr(draw(2))(key), (40, 2))
    (eqn,) = infer_types(body, [INVARIANT], [False]).body.eqns
    assert eqn.form == "rows"
    rows = jax.jit(lambda k, first: evaluate([eqn], {eqn.inputs[0]: k}, Rows(5, 40, first))[eqn.outputs[0]])
    whole = jax.random.bits(key, shape, f"uint{width}")
    for first in (0, 15, 35):
        np.testing.assert_array_equal(rows(key, first), lax.dynamic_slice_in_dim(whole, first, 5, dim))


def test_rows_far_into_a_large_draw():
    """Counters beyond 2^32: of a batch of 2^20 examples with 2^14 numbers each, against the counters spelled out."""
    out = Var((Size(1), 2**14), np.dtype("uint32"))
    key_var = Var((), jax.random.key(0).dtype)
    eqn = Eqn(None, (key_var,), (out,), {"bit_width": 32}, form="rows")
    first = 2**20 - 1
    env = evaluate([eqn], {key_var: jax.random.key(3)}, Rows(1, 2**20, jnp.int32(first)))
    counters = first * 2**14 + np.arange(2**14)
    k0, k1 = (jnp.full(2**14, k) for k in jax.random.key_data(jax.random.key(3)))
    high, low = (jnp.asarray(c, "uint32") for c in (counters >> 32, counters & 0xFFFFFFFF))
    x0, x1 = threefry2x32_p.bind(k0, k1, high, low)
    np.testing.assert_array_equal(env[out][0], x0 ^ x1)


def test_control_flow_is_re_emitted():
    """With nothing of the mesh or the size under which it was traced."""

    def f(x):
        x = lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=3, unroll=2)[0]
        x = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1]
        return lax.cond(jnp.bool_(True), jnp.sin, jnp.cos, x)

    body = typed_body(f, (4,))
    jaxpr = jax.make_jaxpr(lambda x: evaluate_rows(body, [x], Rows(3, 6, 0)))(np.ones((3, 4)))
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert {"scan", "while", "cond"} <= set(names)
    assert [eqn.params["unroll"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [2]
    assert "(6" not in str(jaxpr).replace("f64[6", "(6")
    x = np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(evaluate_rows(body, [x], Rows(3, 6, 0))[0], f(x))


@pytest.mark.parametrize(("entry", "kept"), [
    (None, None), ("a", None), ("b", "b"), (("a", "b"), "b"), (("b", "c"), ("b", "c")), (("a",), None),
])  # fmt: skip
def test_keep_axes(entry, kept):
    assert keep_axes(entry, frozenset({"a"})) == kept


def constrained_jaxpr(mesh, manual):
    body = typed_body(lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", "model"))) * 2, (4,))
    run = lambda x: evaluate_rows(body, [x], Rows(2, 6, 0, frozenset(manual)))
    return str(jax.make_jaxpr(run)(np.ones((2, 4))))


def test_layouts_of_the_users_are_kept_where_the_pipeline_leaves_the_axis_free():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        assert "P(None, 'model')" in constrained_jaxpr(mesh, {"data"})
        assert "sharding_constraint" not in constrained_jaxpr(mesh, {"data", "model"})
    assert "sharding_constraint" not in constrained_jaxpr(mesh, {"data"})  # no such axis where it is evaluated
