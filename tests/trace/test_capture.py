"""Differential tracing: two jaxprs, one program whose sizes are functions of the number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.errors import TraceError
from jaxpar.trace import Literal, Size
from jaxpar.trace.capture import pair_jaxprs


def pair(f, *shapes, sizes=(6, 2)):
    whole, small = (jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct((n, *s), "float64") for s in shapes)) for n in sizes)
    return pair_jaxprs(whole, small, sizes, [f"batch[{i}]" for i in range(len(shapes))])


def test_sizes_and_normalisers():
    body = pair(lambda x: jnp.mean(x.reshape(-1)) + jnp.zeros((x.shape[0] + 3, 2 * x.shape[0] - 1)).sum(), (4,))
    assert body.inputs[0].shape == (Size(1), 4)
    assert str(body.inputs[0]) == "batch[0] : float64[n,4]"
    reshape = next(eqn for eqn in body.eqns if eqn.name == "reshape")
    assert reshape.outputs[0].shape == (Size(4),)
    zeros = next(eqn for eqn in body.eqns if eqn.name == "broadcast_in_dim")
    assert zeros.params["shape"] == (Size(1, 3), Size(2, -1))
    assert zeros.params_at(10)["shape"] == (13, 19)
    normalisers = [a.value for eqn in body.eqns for a in eqn.inputs if isinstance(a, Literal) and a.normaliser]
    assert [float(v) for v in normalisers] == [24.0]


def test_calls_are_spliced_and_dead_equations_dropped():
    @jax.custom_vjp
    def f(x):
        return jax.jit(jnp.sin)(x)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * jnp.cos(x),))

    def step(x):
        jnp.sort(x, 0)
        return jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x)

    names = {eqn.name for eqn in pair(step, (4,)).eqns}
    assert names <= {"sin", "cos", "mul", "broadcast_in_dim", "reduce_sum"}


def test_modules_and_passes_are_known():
    def step(x):
        with jax.named_scope("net"), jax.named_scope("layer"):
            return jnp.sin(x).sum()

    body = pair(jax.grad(step), (4,))
    assert any(eqn.path == ("net", "layer") and not eqn.backward for eqn in body.eqns)
    assert any(eqn.backward for eqn in body.eqns)


def test_constants_are_those_of_the_whole_batch():
    body = pair(lambda x: x + np.arange(x.shape[0])[:, None] * 0.5, (4,))
    ((var, value),) = body.consts.items()
    assert var.shape == (Size(1), 1)
    assert value.shape == (6, 1)


def branch(x):
    return jnp.sin(x) if x.shape[0] > 4 else jnp.cos(x)


def loop(x):
    return sum(jnp.sin(x[i]) for i in range(x.shape[0]))


def groups(x):
    return x.reshape(x.shape[0] // 2, 2, 4).sum(1)


def flags(x):
    return jnp.zeros(4).at[jnp.arange(3)].add(1.0, indices_are_sorted=x.shape[0] > 4) + x


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (branch, "the step does something else with 6 examples than with 2: the operation differs: sin at"),
        (loop, "the step does something else with 6 examples than with 2"),
        (groups, r"a size \(3 against 1\) that doesn't grow evenly, as for groups of several examples, differs"),
        (flags, "can't be evaluated for another number of examples.*'indices_are_sorted'"),
    ],
)
def test_what_does_not_pair(f, message):
    with pytest.raises(TraceError, match=message) as caught:
        pair(f, (4,))
    assert "test_capture.py:" in str(caught.value)


def test_flags_are_no_sizes():
    """Sizes 2 and 3, where True and False would differ as much as the batch does."""
    with pytest.raises(TraceError, match="indices_are_sorted"):
        pair(
            lambda x: jnp.zeros(4).at[jnp.arange(3)].add(1.0, indices_are_sorted=x.shape[0] > 2) + x, (4,), sizes=(2, 3)
        )


def test_another_number_of_outputs():
    with pytest.raises(TraceError, match="number of inputs or outputs"):
        pair(lambda x: (x,) * x.shape[0], (4,))
