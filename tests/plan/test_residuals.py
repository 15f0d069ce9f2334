"""The residuals are a minimum cut: no other set of stored values is smaller and still lets the rest be recomputed."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.plan import analyse_flow, route_values
from jaxpar.plan.residuals import choose_residuals
from jaxpar.trace import Eqn, Var, make_program


@st.composite
def dataflows(draw):
    """A random dag of values: its sizes, the values it may be recomputed from, and which are wanted."""
    count = draw(st.integers(1, 7))
    variables = [Var((draw(st.integers(1, 6)),), np.dtype(np.float32), str(i)) for i in range(count)]
    producers = {}
    for i, v in enumerate(variables):
        inputs = draw(st.lists(st.integers(0, i - 1), max_size=2)) if i else []
        if inputs and draw(st.booleans()):
            producers[v] = Eqn(None, tuple(variables[j] for j in inputs), (v,), {})
    wanted = draw(st.sets(st.sampled_from(variables), min_size=1))
    return variables, producers, sorted(wanted, key=lambda v: int(v.name))


def suffices(kept, wanted, producers):
    """Whether all of `wanted` is kept or can be recomputed from what is kept."""

    def at_hand(v):
        return v in kept or (v in producers and all(map(at_hand, producers[v].reads)))

    return all(map(at_hand, wanted))


@settings(deadline=None, max_examples=200)
@given(dataflows())
def test_no_smaller_set_suffices(flow):
    variables, producers, wanted = flow

    def size(v):
        return v.bytes_at(1)

    kept, repeated = choose_residuals(wanted, producers.get, lambda v: True, size)
    assert suffices(kept, wanted, producers)
    subsets = itertools.chain.from_iterable(itertools.combinations(variables, k) for k in range(len(variables) + 1))
    least = min(sum(map(size, s)) for s in subsets if suffices(set(s), wanted, producers))
    assert sum(map(size, kept)) == least
    made = kept | {v for eqn in repeated for v in eqn.outputs}
    assert set(wanted) <= made
    assert all(v in made for eqn in repeated for v in eqn.reads)


def test_a_gelu_keeps_its_input_only():
    """jax.grad stores several intermediates of a gelu; all can be recomputed from its input."""

    def step(w, x):
        return jax.grad(lambda w: jax.nn.gelu(x @ w).sum())(w)

    jaxprs = [jax.make_jaxpr(step)(jnp.ones((3, 5)), jnp.ones((n, 3))) for n in (8, 2)]
    program = make_program(*jaxprs, (8, 2), ["w", "x"], ["state", "batch"])
    flow = analyse_flow(program, {})
    graph = route_values(flow, dict.fromkeys(flow.forward, 0), [0], 1, 2)
    (residuals,) = [b for b in graph.bundles if not b.travels]
    assert [(v.shape[1:], program.producer[v].name) for v in residuals.values] == [((5,), "dot_general")]
