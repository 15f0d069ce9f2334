import pytest

from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, DeviceSpec, Op, OpGraph, TimeCurve
from jaxpar.plan.planners import data_parallel
from jaxpar.schedule import Link


def make_cluster(count: int, memory: float = 1e12, bandwidth: float = 1e11) -> ClusterSpec:
    device = DeviceSpec("toy", {"float32": 1e13}, memory_bytes=memory, memory_bandwidth=1e12)
    return ClusterSpec.homogeneous(device, count, Link(0.0, bandwidth))


def test_all_devices_and_one_micro_batch_where_nothing_is_in_the_way():
    found = data_parallel(OpGraph.build([Op("a", TimeCurve(((1, 1e-3), (16, 4e-3))))], []), make_cluster(4), 64)
    found.check()
    assert (len(found.stages[0].devices), found.microbatch) == (4, 64)


def test_fewer_devices_where_the_reduction_costs_more_than_they_save():
    graph = OpGraph.build([Op("a", 1e-5, 1e-5, 1e-5, parameter_bytes=1e9)], [])
    found = data_parallel(graph, make_cluster(4, bandwidth=1e9), 64)
    assert len(found.stages[0].devices) == 1


def test_micro_batches_as_large_as_memory_allows():
    graph = OpGraph.build([Op("a", TimeCurve(((1, 1e-3), (16, 2e-3))), residual_bytes=1.0, weight_backward=1e-6)], [])
    assert data_parallel(graph, make_cluster(2, memory=4.0), 64).microbatch == 8


def test_recomputation_is_for_residuals_that_do_not_fit():
    ops = [Op("a", 1e-3, 1e-3, residual_bytes=10.0, output_bytes=1.0), Op("b", 1e-3, 1e-3)]
    graph = OpGraph.build(ops, [("a", "b")])
    assert not data_parallel(graph, make_cluster(1, memory=20.0), 2, recompute=True).stages[0].recompute


def test_what_does_not_fit_points_to_a_pipeline():
    graph = OpGraph.build([Op(f"op{i}", 1e-3, parameter_bytes=10.0) for i in range(4)], [])
    with pytest.raises(PlanError, match="a pipeline, whose devices share the state"):
        data_parallel(graph, make_cluster(4, memory=60.0), 8)
