"""The planners' benchmark: its models have the sizes that it says, and its table says what happened."""

import time

import pytest

from benchmarks.planner import BASE, CHAIN, COMPARED, Case, judge, list_rows, run_limited
from benchmarks.planner_models import FLOAT, MODELS, candle_uno, layered, mmt
from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import count_down_sets


def test_the_models_have_the_papers_sizes():
    sizes = {name: make().parameter_bytes.sum() / FLOAT for name, make in MODELS.items()}
    assert sizes["MMT"] == pytest.approx(32 * 12 * 1024**2, rel=0.01)
    assert sizes["CANDLE-Uno"] == pytest.approx((28 + 7 + 3) * 4096**2, rel=0.01)
    joined = 7 * 4096 + 7 * 100 * 64
    assert sizes["DLRM"] == pytest.approx(31 * 4096**2 + 7 * 64e6 + joined * 4096, rel=0.01)
    wide = candle_uno()
    assert count_down_sets(wide.predecessors, wide.order, 10**5) == 5**7 + 5  # and the join with 4 layers after it
    assert mmt(branches=2, layers=3).num_ops == 7


@pytest.mark.parametrize("count", [100, 1000])
def test_a_layered_graph_is_about_as_large_as_asked(count):
    graph = layered(count)
    assert 0.8 * count <= graph.num_ops <= count
    assert graph.parameter_bytes.sum() == pytest.approx(256 * mmt(1, 1).parameter_bytes.sum(), rel=0.2)


def test_a_search_that_takes_too_long_is_given_up():
    def sleep(graph, cluster, batch_size, mode):
        time.sleep(60)

    def fail(graph, cluster, batch_size, mode):
        raise PlanError("a graph of 9 operators has more than 7 down-sets, where this search gives up")

    given = (mmt(1, 2), ClusterSpec.preset("v100", 2), 4, "free")
    assert run_limited(sleep, *given, 0.2).why_not == "gave up: > 0 s"
    assert run_limited(fail, *given, 30).why_not == "gave up: 7+ down-sets"


def test_a_row_for_each_planner_with_ratios_to_pipedream():
    case = Case("MMT", mmt(2, 2), 4, 16)
    cluster = ClusterSpec.preset("v100", 4)
    names = (BASE, CHAIN, "data parallel")
    results = {name: run_limited(COMPARED[name], case.graph, cluster, 16, "free", 60) for name in names}
    rows, rates = list_rows(case, results, "free")
    assert [row[3] for row in rows] == list(names)
    assert rows[0][-2:][0] == "1.00"
    assert float(rows[2][-2]) == pytest.approx(rates["data parallel"] / rates[BASE], abs=0.006)
    assert max(rates.values()) <= case.most
    plan = results[BASE].plan
    assert judge(plan, "free") >= judge(plan, "executor") * (1 - 1e-9)
