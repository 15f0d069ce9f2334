"""The graph of operators of a traced step: every byte and second accounted for, and plans mapped back."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest

from jaxpar.errors import PlanError
from jaxpar.plan import OpGraph, route_values
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.plan.devices import DEVICES
from jaxpar.plan.program_graph import replace_times
from jaxpar.planning import graph_step
from tests.equality.grid import small_case
from tests.zoo import CASES

SOME = ["gpt", "towers", "unet", "ema_params", "bf16_params", "frozen_params"]


def graph_of(case, **options):
    return graph_step(case.step, case.state, case.batch, *case.extra, **options)


@functools.cache
def small_graph(name):
    return graph_of(small_case(name))


def state_sizes(state):
    """Bytes of the leaves that aren't kept by every rank."""
    arrays = [x for x in jax.tree.leaves(state) if np.ndim(x)]
    arrays = [x for x in arrays if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(x.nbytes for x in arrays if x.dtype.kind not in "iub" or x.size > 64)


@pytest.mark.parametrize("name", SOME)
def test_every_piece_of_state_belongs_to_one_operator(name):
    graph = small_graph(name).graph
    assert graph.state_bytes.sum() == state_sizes(small_case(name).state)
    assert np.all(graph.parameter_bytes <= graph.state_bytes)


@pytest.mark.parametrize("name", SOME)
def test_residuals_are_those_of_the_uncut_program(name):
    found = small_graph(name)
    whole = route_values(found.flow, dict.fromkeys(found.flow.forward, 0), (0,), 1, 16)
    kept = [v for b in whole.bundles if b.source[0] == "F" for v in b.values]
    assert found.graph.residual_bytes.sum() >= sum(v.bytes_at(16) for v in kept) / 16 * (1 - 1e-9)


def test_a_chain_of_equal_layers():
    graph = graph_of(CASES["mlp"](depth=6, width=12)).graph
    assert graph.edge_bytes == {(i, i + 1): 96.0 for i in range(5)}  # 12 numbers of 8 bytes
    middle = graph.ops[2]
    assert {op.kind for op in graph.ops[1:5]} == {middle.kind}
    assert middle.parameter_bytes == middle.gradient_bytes == middle.state_bytes == (12 * 12 + 12) * 8
    assert graph.ops[0].kind != middle.kind != graph.ops[5].kind
    assert graph.input_backward_seconds(4)[2] > 0
    assert graph.weight_backward_seconds(4)[2] > 0


def test_tied_weights_count_once():
    found = small_graph("gpt").graph
    vocab, dim = 32, 16
    first, last = found.ops[found.index["GPT/embed"]], found.ops[found.index["GPT/embed.attend"]]
    assert first.parameter_bytes >= vocab * dim * 8
    assert last.parameter_bytes < vocab * dim * 8
    assert min(first.gradient_bytes, last.gradient_bytes) >= vocab * dim * 8  # each has its own part of the gradient


def test_forward_only_steps_have_no_backward():
    graph = small_graph("forward_only").graph
    assert not graph.has_backward
    assert graph.residual_bytes.sum() == graph.state_bytes.sum() - graph.parameter_bytes.sum() == 0


def test_half_precision_gradients_are_kept_in_single_precision():
    graph = small_graph("bf16_params").graph
    half = [op for op in graph.ops if op.parameter_bytes]
    assert all(op.gradient_bytes >= 2 * op.parameter_bytes for op in half)


@pytest.mark.parametrize("name", ["gpt", "unet"])
def test_kinds_and_names_don_t_depend_on_the_batch(name):
    case = small_case(name)
    graphs = [graph_step(case.step, case.state, case.make_batch(size, 0)).graph for size in (8, 24)]
    first, second = ([(op.name, op.kind, op.residual_bytes) for op in g.ops] for g in graphs)
    assert first == second


def test_a_plan_is_mapped_back_to_equations():
    found = small_graph("towers")
    stage_of = [min(3, 4 * i // found.graph.num_ops) for i in range(found.graph.num_ops)]
    plan_graph = OpGraph.from_json(found.graph.to_json())
    forward_stage = found.assign_stages(plan_graph, stage_of)
    assert forward_stage.keys() == set(found.flow.forward)
    graph = route_values(found.flow, forward_stage, (0, 1, 2, 3), 4, 2)
    assert all(a < b for a, b in graph.edges(forward=True))
    planned = {(stage_of[e.source], stage_of[e.target]) for e in found.graph.edges}
    assert set(graph.edges(forward=True)) == {(a, b) for a, b in planned if a != b}


def test_a_plan_for_another_step_is_refused():
    graph = small_graph("gpt").graph
    actual = graph_of(CASES["gpt"](num_layers=2, dim=24, heads=2, vocab=32, length=8))
    with pytest.raises(PlanError) as error:
        actual.assign_stages(graph, [0] * (graph.num_ops - 3) + [5, 5, 5])
    message = str(error.value)
    assert "stage 0: 'GPT/block_0/up' computes something else" in message
    assert "stage 5: " in message
    grown = graph_of(CASES["gpt"](num_layers=3, dim=16, heads=2, vocab=32, length=8))
    with pytest.raises(PlanError, match="no stage: 'GPT/block_2/up' is new"):
        grown.assign_stages(graph, [0] * graph.num_ops)
    renamed = replace(graph, ops=(replace(graph.ops[0], name="old"), *graph.ops[1:]))
    with pytest.raises(PlanError, match="stage 2: 'old' is not in the step"):
        small_graph("gpt").assign_stages(renamed, [2] * graph.num_ops)


def test_a_graph_made_by_hand_has_no_kinds_to_check():
    found = small_graph("mlp")
    by_hand = replace(found.graph, ops=tuple(replace(op, kind="") for op in found.graph.ops))
    assert set(found.assign_stages(by_hand, [0] * by_hand.num_ops).values()) == {0}


def test_given_times():
    graph = small_graph("gpt").graph
    changed = replace_times(graph, {"GPT/block_0": (3.0, 2.0, 1.0), "GPT/embed": (1.0, 0.0, 0.5)}, device="mine")
    inside = [i for i, op in enumerate(graph.ops) if op.name.startswith("GPT/block_0/")]
    assert changed.forward_seconds(2)[inside].sum() == pytest.approx(6.0)
    assert changed.backward_seconds(2)[graph.index["GPT/embed"]] == 1.0
    rest = [i for i in range(graph.num_ops) if i not in inside and graph.ops[i].name != "GPT/embed"]
    assert np.array_equal(changed.forward_seconds(2)[rest], graph.forward_seconds(2)[rest])
    assert changed.device == "mine"
    with pytest.raises(PlanError, match=r"'blok': no operator is called so\n.*'GPT/embed': 1 times"):
        replace_times(graph, {"blok": (1.0, 1.0, 1.0), "GPT/embed": (1.0,)})


class TestAnalytic:
    costs = AnalyticCosts(DEVICES["v100"])

    @pytest.mark.parametrize("device", sorted(DEVICES))
    def test_time_grows_with_the_batch_and_efficiency_too(self, device):
        programs = {p.digest: p for p in small_graph("gpt").programs.values()}
        for curve in AnalyticCosts(DEVICES[device]).time(programs, [2**k for k in range(7)]).values():
            times = [seconds for _, seconds in curve.points]
            assert all(0 <= a <= b for a, b in pairwise(times))
            assert times[-1] <= 64 * times[0] * (1 + 1e-9)

    def test_a_large_product_reaches_the_share_of_the_peak_that_the_engine_has(self):
        seconds = self.costs.product_seconds(1, 16384, 16384, 16384, "float32", 0.0)
        reached = 2 * 16384**3 / seconds / DEVICES["v100"].peak("float32")
        assert self.costs.engine.arithmetic * 0.9 < reached <= self.costs.engine.arithmetic

    def test_a_product_that_moves_much_is_bound_by_memory(self):
        size = 1e9
        bound = size / DEVICES["v100"].memory_bandwidth
        assert self.costs.product_seconds(1, 1, 4096, 4096, "float32", size) > bound

    def test_single_precision_is_tf32_where_there_is_such_a_thing(self):
        case = CASES["mlp"](depth=2, width=2048, outputs=2048)
        cast = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)
        step = graph_step(case.step, cast(case.state), cast(case.make_batch(2048, 0)), sizes=[2048])
        on = {name: AnalyticCosts(DEVICES[name]) for name in ("v100", "h100")}
        eqn = next(eqn for eqn in step.flow.forward if eqn.name == "dot_general")
        flops = {name: 2 * 2048**3 / costs.eqn_seconds(eqn, 2048) for name, costs in on.items()}
        assert flops["v100"] < 15.7e12
        assert 67e12 < flops["h100"] < 494.7e12

    def test_a_loop_takes_as_long_as_its_rounds(self):
        times = {}
        for depth in (4, 8):
            case = CASES["scan_layers"](depth=depth)
            found = graph_of(case)
            scan = next(eqn for eqn in found.flow.forward if eqn.name == "scan")
            times[depth] = self.costs.eqn_seconds(scan, 4) / scan.params["length"]
        assert times[4] == pytest.approx(times[8])
