import logging
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, DeviceSpec, Op, OpGraph
from jaxpar.plan.planners import graphpipe, pipedream, plan
from jaxpar.schedule import Link
from tests.plan.planners.models import join_branches
from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel


def make_cluster(count: int, memory: float = 1e12) -> ClusterSpec:
    device = DeviceSpec("toy", {"float32": 1e13}, memory_bytes=memory, memory_bandwidth=1e12)
    return ClusterSpec.homogeneous(device, count, Link(1e-6, 1e11))


def two_branches(seconds: float = 1e-3, **costs: float) -> OpGraph:
    ops = [Op(name, seconds, seconds, seconds, kind="half", **costs) for name in ("a", "b")]
    return OpGraph.build([*ops, Op("join", seconds, seconds, seconds, **costs)], [("a", "join"), ("b", "join")])


@given(st.integers(0, 10_000), st.integers(1, 18), st.integers(1, 8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_plans_pass_their_check_and_are_no_worse_than_one_stage_or_a_chain(seed, size, devices, series_parallel):
    graph = (random_series_parallel if series_parallel else random_dag)(seed, size)
    cluster = random_cluster(seed, devices, graph)
    try:
        found = graphpipe(graph, cluster, 16, transfers=False)
    except PlanError:
        with pytest.raises(PlanError):
            pipedream(graph, cluster, 16, select="bottleneck")
        return
    found.check()
    assert found.planner == "graphpipe"
    assert sum(len(stage.devices) for stage in found.stages) <= devices
    try:
        chain = pipedream(graph, cluster, 16, select="bottleneck")
    except PlanError:
        return  # a chain needs more memory, as it is deeper
    assert found.bottleneck <= chain.bottleneck * 1.001


def test_branches_are_stages_side_by_side_and_the_join_is_after_both():
    found = graphpipe(two_branches(), make_cluster(3), 8, microbatches=[1])
    assert [stage.ops for stage in found.stages] == [(0,), (1,), (2,)]
    assert found.depth == (2, 2, 1)


def test_depth_and_not_the_number_of_stages_is_in_flight():
    graph = two_branches(residual_bytes=1.0)
    found = graphpipe(graph, make_cluster(3, memory=2.0), 8, microbatches=[1])
    assert found.in_flight == (2, 2, 1)
    chain = pipedream(graph, make_cluster(3, memory=2.0), 8, microbatches=[1], select="bottleneck")
    assert chain.bottleneck > 1.9 * found.bottleneck  # three in a row would have to keep 3 micro-batches of the first


def test_of_equal_bottlenecks_the_least_depth():
    names = [f"branch{b}" for b in range(4)]
    ops = [Op(name, 1e-3, kind="b") for name in names] + [Op("join", 1e-3)]
    graph = OpGraph.build(ops, [(name, "join") for name in names])
    assert max(graphpipe(graph, make_cluster(5), 8, microbatches=[1]).depth) == 2


def test_a_stage_may_hold_several_branches():
    names = [f"branch{b}" for b in range(4)]
    graph = OpGraph.build([Op(name, 1e-3, kind="b") for name in names], [])
    found = graphpipe(graph, make_cluster(2), 8, microbatches=[1])
    assert sorted(len(stage.ops) for stage in found.stages) == [2, 2]


def test_a_stage_may_hold_the_ends_of_branches_with_the_join():
    seconds = {"a0": 3e-3, "a1": 1e-3, "b0": 3e-3, "b1": 1e-3, "join": 1e-3}
    ops = [Op(name, time) for name, time in seconds.items()]
    graph = OpGraph.build(ops, [("a0", "a1"), ("b0", "b1"), ("a1", "join"), ("b1", "join")])
    found = graphpipe(graph, make_cluster(3), 8, microbatches=[1])
    assert [stage.ops for stage in found.stages] == [(0,), (2,), (1, 3, 4)]


def test_the_micro_batch_size_is_a_balance_of_overhead_and_memory():
    graph = join_branches(2, 2, 2)
    large = graphpipe(graph, make_cluster(1), 64)
    kept, fixed = 64 * graph.residual_bytes.sum(), (graph.state_bytes + graph.gradient_bytes).sum()
    small = graphpipe(graph, make_cluster(1, memory=fixed + kept / 4), 64)
    assert (large.microbatch, small.microbatch) == (64, 16)
    assert small.bottleneck > large.bottleneck


def test_replicas_that_are_no_power_of_two_on_demand():
    graph = OpGraph.build([Op("a", 3e-3), Op("b", 1e-3)], [("a", "b")])
    found = graphpipe(graph, make_cluster(4), 12, microbatches=[3], replicas="any")
    assert sorted(len(stage.devices) for stage in found.stages) == [1, 3]
    assert all(len(s.devices) in (1, 2, 4) for s in graphpipe(graph, make_cluster(4), 12, microbatches=[4]).stages)


def test_recomputation_on_demand():
    names = [f"op{i}" for i in range(4)]
    ops = [Op(name, 1e-3, 1e-3, residual_bytes=100.0, output_bytes=1.0) for name in names]
    graph = OpGraph.build(ops, list(pairwise(names)))
    cluster = make_cluster(2, memory=210.0)
    with pytest.raises(PlanError, match="recompute=True"):
        graphpipe(graph, cluster, 8, microbatches=[1])
    found = graphpipe(graph, cluster, 8, microbatches=[1], recompute=True)
    found.check()
    assert any(stage.recompute for stage in found.stages)


def test_graphs_of_any_form_are_planned():
    graph = random_dag(3, 60, density=0.15)
    found = graphpipe(graph, make_cluster(8), 32)
    found.check()


def test_large_graphs_are_planned_in_blocks():
    graph = join_branches(3, 100, 40)
    found = graphpipe(graph, make_cluster(8), 16, max_blocks=40)
    found.check()
    assert sorted(op for stage in found.stages for op in stage.ops) == list(range(graph.num_ops))


def test_a_step_without_backward_is_planned():
    graph = OpGraph.build([Op("a", 1e-3, residual_bytes=1.0), Op("b", 1e-3, residual_bytes=1.0)], [("a", "b")])
    found = graphpipe(graph, make_cluster(2, memory=1.0), 8, microbatches=[1])
    found.check()  # each stage holds one micro-batch, however many come after it
    assert found.in_flight == (1, 1)


def test_the_same_plan_again():
    graph = random_series_parallel(5, 20)
    cluster = random_cluster(5, 4, graph)
    assert graphpipe(graph, cluster, 32).stages == graphpipe(graph, cluster, 32).stages


def test_more_equal_branches_cost_little():
    def count_matrices(branches: int) -> int:
        from jaxpar.plan.planners.graphpipe import SearchSpace
        from jaxpar.plan.planners.stage_prices import Pricing
        from jaxpar.plan.planners.tree_search import TreeSolution

        graph, cluster = join_branches(branches, 4, 4), make_cluster(32)
        search = next(SearchSpace(graph, 16).searches(Pricing.make(graph, cluster, 256, 64, 32)))
        pricing = search.pricing
        return len(TreeSolution(search, 1.2 * pricing.least_work / pricing.num_devices)._matrices)

    few, many = count_matrices(4), count_matrices(16)
    assert many < 4 * few  # only in how many of them go together: about the root of the number of branches


@pytest.mark.parametrize("branches", [4, 16])
def test_thirty_two_devices(branches):
    """How long it takes is what `benchmarks.planner` prints."""
    graphpipe(join_branches(branches, 8, 4), ClusterSpec.preset("v100", 32), 1024).check()


def test_progress_is_logged_and_can_be_silenced(caplog):
    with caplog.at_level(logging.INFO):
        graphpipe(two_branches(), make_cluster(2), 4)
        assert not caplog.records
        graphpipe(two_branches(), make_cluster(2), 4, progress=True)
    assert "micro-batch 4" in caplog.text


def test_what_does_not_fit_is_named_with_what_would_help():
    graph = OpGraph.build([Op("small", 1e-3), Op("large", 1e-3, parameter_bytes=3e9)], [("small", "large")])
    with pytest.raises(PlanError) as error:
        graphpipe(graph, make_cluster(2, memory=8 * 2**30), 8)
    assert "'large' alone needs 11.2 GiB, 3.2 GiB more" in str(error.value)
    assert "sharding" in str(error.value)
    whole = OpGraph.build([Op(f"op{i}", 1e-3, parameter_bytes=1e9) for i in range(8)], [])
    with pytest.raises(PlanError, match="more devices \\(at least 4 for the state alone\\)"):
        graphpipe(whole, make_cluster(2, memory=8 * 2**30), 8)


def test_devices_left_over_are_told_and_may_be_refused():
    graph = OpGraph.build([Op("a", 1e-3)], [])
    found = plan(graph, make_cluster(4), 2, "graphpipe")
    assert any("of 4 devices" in note for note in found.notes)
    with pytest.raises(PlanError, match="use_all=True"):
        plan(graph, make_cluster(4), 2, "graphpipe", use_all=True)
    assert not plan(graph, make_cluster(2), 2, "graphpipe", use_all=True).notes


def test_unknown_planners_and_options_are_named():
    with pytest.raises(PlanError, match="no planner is called 'pipe'"):
        plan(two_branches(), make_cluster(2), 4, "pipe")
    with pytest.raises(PlanError, match="no option 'depth'"):
        plan(two_branches(), make_cluster(2), 4, "graphpipe", depth=3)
    with pytest.raises(PlanError, match="micro-batches of 3"):
        plan(two_branches(), make_cluster(2), 4, "graphpipe", microbatches=[3])


def test_blocks_that_do_not_fit_point_to_finer_ones():
    names = [f"op{i}" for i in range(40)]
    graph = OpGraph.build([Op(name, 1e-3, parameter_bytes=1.0) for name in names], list(pairwise(names)))
    cluster = make_cluster(4, memory=42.0)
    graphpipe(graph, cluster, 8, max_blocks=40).check()
    with pytest.raises(PlanError, match="max_blocks"):
        graphpipe(graph, cluster, 8, max_blocks=3)
