"""Plans whose stages form a chain whatever they read, beside the same stages as a graph."""

from dataclasses import replace

import pytest

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import Op, OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage


def make_plan(order=(0, 1, 2)):
    """Two towers and what joins them, one stage each."""
    ops = [Op(name, 1e-3, 1e-3, 1e-3, output_bytes=1e3, residual_bytes=1e6) for name in ("left", "right", "join")]
    graph = OpGraph.build(ops, [("left", "join"), ("right", "join")])
    stages = tuple(PlannedStage((op,), (i,)) for i, op in enumerate(order))
    return PipelinePlan(graph, ClusterSpec.preset("v100", 4), stages, 4, 8, "1f1b", {"extra": 0})


def test_a_chain_is_deeper_holds_more_and_takes_longer():
    graph = make_plan()
    chain = replace(graph, chain=True)
    chain.check()
    assert (graph.depth, chain.depth) == ((2, 2, 1), (3, 2, 1))
    assert (graph.in_flight, chain.in_flight) == ((2, 2, 1), (3, 2, 1))
    assert chain.edges == graph.edges
    assert chain.waits == {**graph.edges, (0, 1): 0.0}
    assert chain.bottleneck == graph.bottleneck
    for mode in ("free", "executor"):
        assert chain.predict(mode).step_seconds > graph.predict(mode).step_seconds
    assert chain.predict("free").lower_bound <= chain.predict("free").step_seconds
    assert chain.simulate("free").makespan == pytest.approx(chain.predict("free").makespan)


def test_a_chain_is_saved_as_one_and_printed_as_one():
    chain = replace(make_plan(), chain=True)
    assert PipelinePlan.from_json(chain.to_json()) == chain
    assert "3 stages in a chain, depth 3" in str(chain)
    old = PipelinePlan.from_json(chain.to_json().replace('"chain": true', '"schedule": "1f1b"'))
    assert not old.chain


def test_a_chain_out_of_order_is_refused():
    with pytest.raises(PlanError, match="list stages in a topological order"):
        replace(make_plan((2, 0, 1)), chain=True).check()
