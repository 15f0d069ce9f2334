from dataclasses import replace

import pytest
from hypothesis import given, settings

from jaxpar.plan import (
    ClusterSpec,
    DeviceSpec,
    Op,
    OpGraph,
    PipelinePlan,
    PlannedStage,
    estimate_step,
    predict,
    stage_memory,
    stage_seconds,
)
from jaxpar.schedule import Link

from .strategies import plans

TOY = DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1e9, memory_bandwidth=1e9)


def make_chain(stages=4, microbatches=16, b=2, link=None, **options):
    """Balanced, B = 2F, F = 1 s for each example."""
    ops = [
        Op(f"layer_{i}", 1.0, 1.0, 1.0, parameter_bytes=1e6, residual_bytes=10.0, output_bytes=100.0)
        for i in range(stages)
    ]
    graph = OpGraph.build(ops, [(f"layer_{i}", f"layer_{i + 1}") for i in range(stages - 1)])
    cluster = ClusterSpec.homogeneous(TOY, stages, link or Link())
    planned = tuple(PlannedStage((i,), (i,)) for i in range(stages))
    return PipelinePlan(graph, cluster, planned, b, microbatches, schedule_options=options)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_the_estimate_bounds_both_simulations(plan):
    free, lockstep = predict(plan, "free"), predict(plan, "executor")
    assert estimate_step(plan) <= free.step_seconds * (1 + 1e-9)
    assert free.step_seconds <= lockstep.step_seconds * (1 + 1e-9)


@given(plans())
@settings(max_examples=60, deadline=None)
def test_quick_predictions_are_the_simulated_timetables(plan):
    for mode in ("executor", "free"):
        quick, simulated = predict(plan, mode), plan.simulate(mode)
        assert quick.makespan == pytest.approx(simulated.makespan, rel=1e-12)
        assert quick.in_flight == plan.timetable.peak_in_flight
        assert all(a <= b for a, b in zip(quick.in_flight, plan.in_flight, strict=True))
        if all(len(devices) == 1 for devices in plan.rank_devices):
            assert quick.bubble_fraction == pytest.approx(simulated.bubble_fraction, abs=1e-9)


@given(plans(has_backward=False))
@settings(max_examples=50, deadline=None)
def test_forward_only(plan):
    plan = replace(plan, schedule="1f1b", schedule_options={})
    free = predict(plan, "free")
    assert estimate_step(plan) <= free.step_seconds * (1 + 1e-9)
    assert set(free.in_flight) == {1}
    assert free.reduce_seconds == free.update_seconds == 0


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [4, 16, 64])
def test_the_estimate_is_exact_for_balanced_chains(stages, microbatches):
    plan = make_chain(stages, microbatches, extra=0)
    assert estimate_step(plan) == pytest.approx(predict(plan, "free").step_seconds)


@pytest.mark.parametrize("latency", [0.1, 0.5, 2.0])
def test_the_estimate_sees_latency_that_tight_memory_exposes(latency):
    plan = make_chain(8, 64, link=Link(latency, 1e3), extra=0)
    free = predict(plan, "free").step_seconds
    assert 0.93 * free <= estimate_step(plan) <= free
    assert free > 1.05 * predict(make_chain(8, 64, extra=0), "free").step_seconds


def test_the_parts_of_a_step():
    plan = make_chain(4, 16, b=2, extra=0)
    found = plan.predict("free")
    assert found.makespan == pytest.approx((16 + 3) * 6.0)  # (M + S - 1)(F + B), two examples of 3 s
    assert found.reduce_seconds == 0
    assert found.update_seconds == pytest.approx((2 * 3e6 + 1e6) / 1e9)
    assert found.step_seconds == found.makespan + found.update_seconds
    assert found.throughput == pytest.approx(32 / found.step_seconds)
    assert found.bubble_fraction == pytest.approx(3 / 19)
    assert found.in_flight == (4, 3, 2, 1)
    assert found.memory_bytes == tuple(4e6 + 10.0 * 2 * n for n in (4, 3, 2, 1))


def test_replicas_share_a_microbatch_and_add_up_their_gradients():
    op = Op("a", 1.0, 1.0, 1.0, parameter_bytes=1e6, residual_bytes=10.0)
    cluster = ClusterSpec.homogeneous(TOY, 4, Link(0.0, 1e9))
    plan = PipelinePlan(OpGraph.build([op], []), cluster, (PlannedStage((0,), (0, 1, 2, 3)),), 8, 2)
    found = plan.predict()
    assert plan.stage_times == ((2.0, 2.0, 2.0),)
    assert found.makespan == 12.0
    assert found.reduce_seconds == pytest.approx(2 * 3 / 4 * 1e6 / 1e9)
    assert found.memory_bytes == (4e6 + 10.0 * 2,)  # one micro-batch in flight, of which a replica has two examples


def test_recomputation_keeps_what_is_received_and_costs_a_forward():
    plan = make_chain(2, 8, b=2, extra=0)
    stages = plan.stages[0], replace(plan.stages[1], recompute=True)
    changed = replace(plan, stages=stages)
    assert stage_seconds(plan.graph, plan.cluster, (1,), (1,), 2, recompute=True) == (2.0, 4.0, 2.0)
    assert stage_memory(changed, 1, 3) == 4e6 + 10.0 * 2 + 3 * 100.0 * 2
    assert changed.predict("free").makespan > plan.predict("free").makespan


def test_a_slow_device_slows_its_stage():
    slow = DeviceSpec("slow", {"float32": 0.25e12}, memory_bytes=1e9, memory_bandwidth=1e9)
    plan = make_chain(2)
    cluster = ClusterSpec((TOY, slow), ClusterSpec.homogeneous(TOY, 2, Link()).links)
    assert replace(plan, cluster=cluster).stage_times == ((2.0, 2.0, 2.0), (8.0, 8.0, 8.0))
    for_slow = OpGraph(plan.graph.ops, plan.graph.edges, device="slow")
    assert replace(plan, cluster=cluster, graph=for_slow).stage_times == ((0.5, 0.5, 0.5), (2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="times are for the device 'abacus', which is neither"):
        _ = replace(plan, graph=OpGraph(plan.graph.ops, plan.graph.edges, device="abacus")).stage_times


def test_stages_of_unequal_width_pay_for_their_slowest_replica():
    ops = [Op("a", 1.0, 1.0, 1.0, output_bytes=100.0), Op("b", 1.0, 1.0, 1.0)]
    cluster = ClusterSpec.homogeneous(TOY, 3, Link(0.5, 100.0))
    plan = PipelinePlan(
        OpGraph.build(ops, [("a", "b")]), cluster, (PlannedStage((0,), (0, 1)), PlannedStage((1,), (2,))), 4, 1
    )
    # 400 bytes reach device 2, which takes them at 100 bytes/s; each sender has half of that.
    assert plan.costs.transfer_of(plan.dag, 0, 1) == plan.costs.transfer_of(plan.dag, 1, 0) == 4.5
    assert plan.predict("free").makespan == (2 + 4.5 + 4) + 8 + (4.5 + 4)
