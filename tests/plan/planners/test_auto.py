import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, DeviceSpec, Level, Op, OpGraph, PipelinePlan, TimeCurve
from jaxpar.plan.planners import auto, data_parallel, graphpipe, pipedream, piper
from jaxpar.plan.planners.interleave import divide_evenly, list_interleaved
from jaxpar.plan.planners.step_model import Sketch, StepModel
from jaxpar.plan.predict import estimate_step
from jaxpar.schedule import Link
from tests.plan.planners.models import join_branches
from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel


def make_cluster(count: int, memory: float = 1e12, bandwidth: float = 1e11) -> ClusterSpec:
    device = DeviceSpec("toy", {"float32": 1e13}, memory_bytes=memory, memory_bandwidth=1e12)
    return ClusterSpec.homogeneous(device, count, Link(1e-6, bandwidth))


def seconds(plan: PipelinePlan) -> float:
    return plan.predict().step_seconds


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6), st.booleans())
@settings(max_examples=12, deadline=None)
def test_never_slower_than_what_it_chooses_from(seed, size, devices, series_parallel):
    graph = (random_series_parallel if series_parallel else random_dag)(seed, size)
    cluster = random_cluster(seed, devices, graph)
    try:
        found = auto(graph, cluster, 8, effort=2000)
    except PlanError:
        for planner in (graphpipe, pipedream, piper, data_parallel):
            with pytest.raises(PlanError):
                planner(graph, cluster, 8)
        return
    found.check()
    assert found.planner == "auto"
    for planner in (graphpipe, data_parallel):
        try:
            other = planner(graph, cluster, 8)
        except PlanError:
            continue
        assert seconds(found) <= seconds(other) * (1 + 1e-9)


def test_reasons_are_given_with_what_it_was_compared_with():
    found = auto(join_branches(3, 3, 2), make_cluster(4), 32, effort=2000)
    assert found.notes[0].startswith("chosen: ")
    for kind in ("graphpipe", "pipedream", "no pipeline"):
        assert kind in found.notes[0]
    assert found.notes[0] in str(found)
    assert PipelinePlan.from_json(found.to_json()).notes == found.notes


def test_a_small_model_is_not_pipelined_and_it_says_why():
    curve = TimeCurve(((1, 1e-3), (64, 64e-3)))
    ops = [Op("a", curve, curve, curve, parameter_bytes=1e3), Op("b", curve, curve, curve, parameter_bytes=1e3)]
    found = auto(OpGraph.build(ops, [("a", "b")]), make_cluster(2), 64)
    assert len(found.stages) == 1
    assert any(note.startswith("don't pipeline: ") for note in found.notes)


def test_a_model_whose_gradients_are_slow_to_reduce_is_pipelined():
    ops = [Op(f"op{i}", 1e-3, 1e-3, 1e-3, parameter_bytes=1e9) for i in range(4)]
    graph = OpGraph.build(ops, [(f"op{i}", f"op{i + 1}") for i in range(3)])
    found = auto(graph, make_cluster(4, bandwidth=1e9), 32, effort=2000)
    assert len(found.stages) > 1
    assert all(len(stage.devices) == 1 for stage in found.stages)


def test_fewer_devices_where_that_is_faster():
    graph = OpGraph.build([Op("a", 1e-5, 1e-5, 1e-5, parameter_bytes=1e9)], [])
    found = auto(graph, make_cluster(4, bandwidth=1e9), 64)
    assert len(found.stages[0].devices) == 1
    assert any("uses 1 of 4 devices" in note for note in found.notes)


def test_recomputation_where_only_that_fits():
    names = [f"op{i}" for i in range(4)]
    ops = [Op(name, 1e-3, 1e-3, residual_bytes=100.0, output_bytes=1.0) for name in names]
    graph = OpGraph.build(ops, [(f"op{i}", f"op{i + 1}") for i in range(3)])
    found = auto(graph, make_cluster(2, memory=210.0), 8)
    assert any(stage.recompute for stage in found.stages)
    with pytest.raises(PlanError, match="what would help"):
        auto(graph, make_cluster(2, memory=90.0), 8)


def test_fewer_micro_batches_prefer_less_depth():
    names = [f"op{i}" for i in range(8)]
    ops = [Op(name, 1e-3, 1e-3, 1e-3, parameter_bytes=1e8) for name in names]
    graph = OpGraph.build(ops, [(f"op{i}", f"op{i + 1}") for i in range(7)])
    few = auto(graph, make_cluster(8, bandwidth=1e10), 4, microbatches=[1], effort=3000)
    many = auto(graph, make_cluster(8, bandwidth=1e10), 256, microbatches=[1], effort=3000)
    assert max(few.depth) <= max(many.depth)


def test_uneven_replicas_are_found():
    ops = [Op("a", 3e-3, 3e-3, 3e-3, parameter_bytes=1e8), Op("b", 1e-3, 1e-3, 1e-3, parameter_bytes=4e8)]
    graph = OpGraph.build(ops, [("a", "b")])
    found = auto(graph, make_cluster(4, bandwidth=2e9), 96, microbatches=[3], effort=2000)
    assert sorted(len(stage.devices) for stage in found.stages) == [1, 3]


def test_stages_of_a_node_do_not_straddle_two():
    device = DeviceSpec("toy", {"float32": 1e13}, memory_bytes=1e12, memory_bandwidth=1e12)
    cluster = ClusterSpec.hierarchy(device, [Level(4, Link(1e-6, 1e11)), Level(8, Link(1e-5, 1e9))])
    ops = [Op("a", 1e-3, 1e-3, 1e-3, parameter_bytes=1e6), Op("b", 4e-3, 4e-3, 4e-3, parameter_bytes=1e8)]
    ops.append(Op("c", 3e-3, 3e-3, 3e-3, parameter_bytes=1e6))
    found = auto(OpGraph.build(ops, [("a", "b"), ("b", "c")]), cluster, 64, effort=2000)
    large = [stage for stage in found.stages if len(stage.devices) in (2, 4) and 1 in stage.ops]
    assert all(len({device // 4 for device in stage.devices}) == 1 for stage in large)


def test_the_same_plan_again():
    graph = random_dag(11, 10)
    cluster = random_cluster(11, 4, graph)
    first, second = (auto(graph, cluster, 8, effort=3000) for _ in range(2))
    assert (first.stages, first.microbatch, first.schedule) == (second.stages, second.microbatch, second.schedule)
    assert first.notes == second.notes


def test_only_the_timetables_that_are_asked_for():
    found = auto(join_branches(3, 3, 2), make_cluster(4), 32, schedules=[("1f1b", {"extra": 0})], effort=2000)
    assert (found.schedule, found.schedule_options) == ("1f1b", {"extra": 0})


def test_progress_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        auto(join_branches(2, 2, 1), make_cluster(2), 8, effort=200)
        assert not caplog.records
        auto(join_branches(2, 2, 1), make_cluster(2), 8, effort=200, progress=True)
    assert "local search" in caplog.text


@given(st.integers(0, 10_000), st.integers(2, 10), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_the_quick_estimate_is_no_more_than_the_bound(seed, size, devices):
    graph = random_series_parallel(seed, size)
    cluster = random_cluster(seed, devices)
    plan = graphpipe(graph, cluster, 8)
    sketch = Sketch.of_stages(plan.microbatch, [(s.ops, _Way(len(s.devices), s.recompute)) for s in plan.stages])
    assert StepModel(graph, cluster, 8, devices).estimate(sketch) <= estimate_step(plan) * (1 + 1e-9)


class _Way:
    def __init__(self, devices: int, recompute: bool):
        self.devices, self.recompute = devices, recompute


def test_interleaved_plans_have_several_stages_on_each_device():
    graph = random_series_parallel(4, 12)
    plans = list(list_interleaved(graph, make_cluster(2), 16, (1, 2), "powers_of_two", 2))
    assert plans
    for plan in plans:
        assert len(plan.rank_devices) < len(plan.stages)
        assert plan.timetable.num_microbatches == plan.num_microbatches


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_even_division_is_the_best_one(sizes, count):
    import itertools

    import numpy as np

    count = min(count, len(sizes))
    groups = divide_evenly(range(len(sizes)), np.array(sizes, float), count)
    assert [op for group in groups for op in group] == list(range(len(sizes)))
    assert len(groups) == count
    assert all(groups)
    best = min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes))))
        for cuts in itertools.combinations(range(1, len(sizes)), count - 1)
    )
    assert max(sum(sizes[op] for op in group) for group in groups) == best
