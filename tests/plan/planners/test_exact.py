"""The exact planner against all plans of tiny graphs, made and judged without it."""

import itertools

import pytest

from jaxpar.errors import PlanError, ScheduleError
from jaxpar.plan.acyclic_partitions import iterate_divisions
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import Op, OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.exact import exact
from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel

MAKERS = {"series-parallel": random_series_parallel, "dag": random_dag}


def all_plans(graph, cluster, batch_size, microbatches, *, recompute=(False,), options=None):
    """Every plan that passes the checker: all labellings of the operators by stages, all replica counts."""
    options = {"extra": 0} if options is None else options
    for count in range(1, cluster.num_devices + 1):
        for labels in itertools.product(range(count), repeat=graph.num_ops):
            if sorted(set(labels)) != list(range(count)):
                continue
            groups = [tuple(i for i, label in enumerate(labels) if label == s) for s in range(count)]
            for b, wide in itertools.product(microbatches, itertools.product((1, 2, 4), repeat=count)):
                if sum(wide) > cluster.num_devices:
                    continue
                ends = list(itertools.accumulate(wide, initial=0))
                for again in itertools.product(recompute, repeat=count):
                    stages = tuple(
                        PlannedStage(ops, tuple(range(ends[s], ends[s + 1])), again[s]) for s, ops in enumerate(groups)
                    )
                    plan = PipelinePlan(graph, cluster, stages, b, batch_size // b, "1f1b", options)
                    try:
                        plan.check()
                    except (PlanError, ScheduleError):
                        continue
                    yield plan


def tiny(maker, seed, *, num_ops=4, devices=3, memory=True):
    graph = MAKERS[maker](seed, num_ops)
    return graph, random_cluster(seed, devices, graph if memory else None, tightness=0.9)


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("maker", MAKERS)
def test_no_plan_has_a_lower_bottleneck(maker, seed):
    graph, cluster = tiny(maker, seed)
    bottlenecks = [plan.bottleneck for plan in all_plans(graph, cluster, 8, (1, 2, 4))]
    if not bottlenecks:
        with pytest.raises(PlanError, match="fits into 3 devices"):
            exact(graph, cluster, 8, objective="bottleneck", microbatches=(1, 2, 4))
        return
    plan = exact(graph, cluster, 8, objective="bottleneck", microbatches=(1, 2, 4))
    plan.check()
    assert plan.bottleneck == pytest.approx(min(bottlenecks), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["free", "executor"])
@pytest.mark.parametrize("maker", MAKERS)
def test_no_plan_has_a_shorter_step(maker, mode, seed):
    graph, cluster = tiny(maker, seed + 10)
    steps = [plan.predict(mode).step_seconds for plan in all_plans(graph, cluster, 4, (1, 2))]
    if not steps:
        with pytest.raises(PlanError, match="fits into 3 devices"):
            exact(graph, cluster, 4, mode=mode, microbatches=(1, 2))
        return
    plan = exact(graph, cluster, 4, mode=mode, microbatches=(1, 2))
    plan.check()
    assert plan.predict(mode).step_seconds == pytest.approx(min(steps), rel=1e-9)


def test_recomputation_is_tried_where_it_is_asked_for():
    graph = random_series_parallel(3, 4)
    tight = random_cluster(3, 2, graph, tightness=1.3)
    steps = [p.predict("free").step_seconds for p in all_plans(graph, tight, 4, (1, 2), recompute=(False, True))]
    plan = exact(graph, tight, 4, microbatches=(1, 2), recompute=True)
    assert plan.predict("free").step_seconds == pytest.approx(min(steps), rel=1e-9)


def test_the_schedule_is_chosen_too():
    graph, cluster = tiny("dag", 4, memory=False)
    schedules = [("1f1b", {"extra": 0}), ("1f1b", {"extra": 2}), ("gpipe", {})]
    plan = exact(graph, cluster, 8, mode="executor", schedules=schedules, microbatches=(1, 2))
    single = [exact(graph, cluster, 8, mode="executor", schedules=[s], microbatches=(1, 2)) for s in schedules]
    steps = [p.predict("executor").step_seconds for p in single]
    assert plan.predict("executor").step_seconds == pytest.approx(min(steps))
    assert len(set(steps)) > 1  # it matters here


def test_a_chain_has_as_many_divisions_as_sets_of_cuts():
    graph = random_dag(0, 1)
    assert len(list(iterate_divisions(graph, 3))) == 1
    chain = random_series_parallel(0, 2)
    assert {d.stages for d in iterate_divisions(chain, 2)} >= {(3,)}


def _problem_of(plan):
    try:
        plan.check()
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(5))
def test_divisions_are_all_partitions_without_cycles(seed):
    graph, cluster = random_dag(seed, 5), random_cluster(seed, 5)
    found = [frozenset(d.stages) for d in iterate_divisions(graph, 5)]
    assert len(found) == len(set(found))
    expected = set()
    for labels in itertools.product(range(5), repeat=5):
        used = sorted(set(labels))
        if used == list(range(len(used))):
            groups = [tuple(i for i in range(5) if labels[i] == s) for s in used]
            plan = PipelinePlan(graph, cluster, tuple(PlannedStage(g, (s,)) for s, g in enumerate(groups)), 1, 1)
            problem = _problem_of(plan)
            if "cycle" in problem or "convex" in problem:
                continue
            assert not problem or "order" in problem
            expected.add(frozenset(sum(1 << i for i in g) for g in groups))
    assert set(found) == expected


def test_a_search_that_is_too_large_says_how_large():
    graph = random_dag(1, 12, density=0.0)
    with pytest.raises(PlanError, match=r"looked at 100 partial divisions of 12 operators on 6 devices"):
        exact(graph, random_cluster(1, 6), 8, max_divisions=100)
    with pytest.raises(PlanError, match="found 3 plans whose bound is below"):
        exact(random_dag(1, 6), random_cluster(1, 3), 8, max_plans=3)


def test_a_schedule_that_nothing_fits_with_is_no_plan():
    """Two operators with room for two micro-batches between F and B, and a schedule that wants more."""
    ops = [Op(name, 1e-3, 1e-3, 1e-3, residual_bytes=7e9) for name in ("a", "b")]
    graph, cluster = OpGraph.build(ops, [("a", "b")]), ClusterSpec.preset("v100", 2)
    given = {"microbatches": [1]}
    assert exact(graph, cluster, 8, **given).in_flight == (2, 1)
    with pytest.raises(PlanError, match=r"but none with 1f1b \{'extra': 5\}"):
        exact(graph, cluster, 8, schedules=[("1f1b", {"extra": 5})], **given)
    plan = exact(graph, cluster, 8, schedules=[("1f1b", {"extra": 5}), ("1f1b", {"extra": 0})], **given)
    assert plan.schedule_options == {"extra": 0}
