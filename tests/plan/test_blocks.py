"""Blocks: convex, in order, along modules, one branch each, and alike where the model is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.arguments import Signature, read_arguments
from jaxpar.plan import analyse_flow
from jaxpar.plan.blocks import _Coarsening, _EqnGraph, form_blocks
from jaxpar.plan.flow import Flow
from jaxpar.plan.program_graph import estimate_balance
from jaxpar.planning import graph_step
from jaxpar.trace import Eqn, Var
from jaxpar.tracing import trace_step
from tests.equality.grid import small_case
from tests.zoo import CASES

SOME = ["gpt_remat", "towers", "unet", "forward_only", "cond"]


@functools.cache
def small_flow(name):
    return flow_of(small_case(name))


def flow_of(case):
    traced = trace_step(read_arguments(Signature(case.step, (0,), (1,), ()), (case.state, case.batch, *case.extra)))
    return analyse_flow(traced.program, traced.updated)


def check_blocks(flow, blocks):
    """Each equation in one block, and each block after all that it reads from."""
    assert sorted(map(id, flow.forward)) == sorted(id(eqn) for block in blocks for eqn in block.eqns)
    assert len({block.name for block in blocks}) == len(blocks)
    home = {v: i for i, block in enumerate(blocks) for eqn in block.eqns for v in eqn.outputs}
    position = {eqn: i for i, eqn in enumerate(flow.forward)}
    for i, block in enumerate(blocks):
        assert list(block.eqns) == sorted(block.eqns, key=position.__getitem__)
        assert all(home[v] <= i for eqn in block.eqns for v in eqn.reads if v in home)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("max_blocks", [256, 6])
def test_blocks_partition_the_forward_in_order(name, max_blocks):
    flow = small_flow(name)
    check_blocks(flow, form_blocks(flow, estimate_balance(flow), max_blocks))


@st.composite
def flows(draw):
    """A forward pass of any shape: which earlier values each equation reads, what it is, and in which module."""
    count = draw(st.integers(1, 30))
    eqns: list[Eqn] = []
    values: list[Var] = []
    for i in range(count):
        reads = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        name = draw(st.sampled_from(["add", "dot_general", "tanh", "reduce_sum"]))
        path = tuple(draw(st.lists(st.sampled_from("ab"), max_size=3)))
        out = Var((4,), np.dtype(np.float32))
        primitive = type("Primitive", (), {"name": name})
        eqns.append(Eqn(primitive, tuple(values[j] for j in reads), (out,), {}, path=path))
        values.append(out)
    seconds = draw(st.lists(st.sampled_from([0.0, 0.01, 1.0, 3.0]), min_size=count, max_size=count))
    return Flow(None, tuple(eqns), (), frozenset(), {}, {}), seconds


@settings(max_examples=120, deadline=None)
@given(flows(), st.integers(1, 300))
def test_any_graph_is_cut_into_blocks_without_cycles(drawn, max_blocks):
    flow, seconds = drawn
    check_blocks(flow, form_blocks(flow, seconds, max_blocks))


@settings(max_examples=60, deadline=None)
@given(flows(), st.sampled_from([0.1, 1.0, 4.0]))
def test_blocks_that_merge_in_series_are_no_heavier_than_the_grain(drawn, grain):
    """More than the grain only where one equation is heavier by itself, or what is element-wise came along."""
    flow, seconds = drawn
    for unit in _Coarsening(_EqnGraph(flow.forward), seconds, grain).run():
        heavy = sum(seconds[i] for i in unit.members if flow.forward[i].name == "dot_general")
        most = max((seconds[i] for i in unit.members if flow.forward[i].name == "dot_general"), default=0.0)
        assert heavy <= max(grain * (1 + 1e-6), most) + 0.02 * grain * len(unit.members)


def test_branches_are_kept_apart_without_any_names():
    """Towers written as plain functions, layer by layer of all towers in turn: no block has two of them."""

    def step(params, batch):
        def loss_fn(p):
            hidden = [batch[f"x{t}"] for t in range(3)]
            for layer in range(2):
                hidden = [jnp.tanh(h @ p[f"w{t}"][layer]) for t, h in enumerate(hidden)]
            return jnp.mean(jnp.concatenate(hidden, -1) @ p["out"])

        grads = jax.grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - g, params, grads)

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {f"w{t}": [shape(8, 8), shape(8, 8)] for t in range(3)} | {"out": shape(24, 1)}
    graph = graph_step(step, params, {f"x{t}": shape(16, 8) for t in range(3)}).graph
    assert graph.num_ops == 7
    sinks = [i for i in range(7) if not graph.successors[i]]
    assert len(sinks) == 1
    assert len(graph.predecessors[sinks[0]]) == 3
    assert sum(not p for p in graph.predecessors) == 3
    kinds = [op.kind for op in graph.ops]
    assert len(set(kinds)) == 3  # first layers, second layers, the rest


@pytest.mark.parametrize("name", ["towers", "dlrm"])
def test_no_block_has_parts_of_two_branches(name):
    flow = small_flow(name)
    for block in form_blocks(flow, estimate_balance(flow)):
        branches = {p for eqn in block.eqns for p in eqn.path if p.startswith(("tower_", "branch_"))}
        assert len(branches) <= 1, block.name


def test_blocks_are_modules_where_these_are_light_enough():
    flow = flow_of(CASES["gpt"](num_layers=6, dim=16, heads=2, vocab=32, length=8))
    names = [block.name for block in form_blocks(flow, estimate_balance(flow), 24)]
    assert [name for name in names if name.startswith("GPT/block_")] == [f"GPT/block_{i}" for i in range(6)]


def test_equal_layers_are_cut_alike():
    flow = flow_of(CASES["gpt"](num_layers=3, dim=16, heads=2, vocab=32, length=8))
    names = [block.name.split("/") for block in form_blocks(flow, estimate_balance(flow))]
    parts = {
        layer: [rest for _, name, *rest in (n for n in names if len(n) > 1) if name == layer]
        for layer in (f"block_{i}" for i in range(3))
    }
    assert len(parts["block_0"]) > 1
    assert all(p == parts["block_0"] for p in parts.values())


def test_a_module_used_twice_is_two_blocks():
    """The same layer before and after another: together they would wait for what they feed."""
    with_name = jax.named_scope

    def step(params, x):
        def loss_fn(p):
            with with_name("shared"):
                h = jnp.tanh(x @ p["a"])
            with with_name("between"):
                h = jnp.tanh(h @ p["b"])
            with with_name("shared"):
                h = jnp.tanh(h @ p["a"])
            return jnp.mean(h)

        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss_fn)(params))

    shapes = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in "ab"}
    graph = graph_step(step, shapes, jax.ShapeDtypeStruct((16, 8), jnp.float32), max_blocks=4).graph
    assert [op.name for op in graph.ops] == ["shared:dot_general", "between", "shared:dot_general.1"]
    assert graph.parameter_bytes.tolist() == [256, 256, 0]
