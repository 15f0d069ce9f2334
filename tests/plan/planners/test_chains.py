"""The planners for chains against all chains of tiny graphs, made and measured without them."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import list_down_sets, list_prefixes, members_of
from jaxpar.plan.op_graph import Op, OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.chain_search import search_chains
from jaxpar.plan.planners.chain_stages import Variant, price_stages, span_down_sets, span_prefixes
from jaxpar.plan.planners.exact import exact
from jaxpar.plan.planners.pipedream import iterate_orders, pipedream
from jaxpar.plan.planners.piper import piper
from jaxpar.schedule import Link
from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel

B, M = 4, 4  # micro-batch and how many


def measure(plan, stage, *, overlap):
    """Seconds of a stage by the planners' measure, from the plan alone."""
    forward, for_inputs, for_weights = plan.stage_times[stage]
    compute, rows = forward + for_inputs + for_weights, plan.microbatch / len(plan.stages[stage].devices)
    inside = set(plan.stages[stage].ops)
    received, sent = {}, {}
    for e in plan.graph.edges:
        if e.target in inside and e.source not in inside:
            received[e.source] = max(received.get(e.source, 0), e.bytes)
        if e.source in inside and e.target not in inside:
            sent[e.source] = max(sent.get(e.source, 0), e.bytes)
    link = plan.cluster.link(0, 1)
    transfer = max(sum(received.values()), sum(sent.values())) * rows / link.bandwidth
    gradients = sum(plan.graph.ops[op].gradient_bytes for op in inside)
    reduce = plan.cluster.all_reduce_seconds(plan.stages[stage].devices, gradients) if gradients else 0.0
    busy = max(compute, transfer) if overlap else compute + 2 * (transfer + link.latency)
    return busy + reduce / plan.num_microbatches


def all_chains(graph, cluster, cuts, variants):
    """Every chain of stages between the cuts that passes the checker."""
    last, count = len(cuts) - 1, cluster.num_devices
    for stages in range(1, count + 1):
        for between in itertools.combinations(range(1, last), stages - 1):
            at = [0, *between, last]
            if any(cuts[a] & ~cuts[b] for a, b in itertools.pairwise(at)):
                continue
            sets = [members_of(cuts[b] & ~cuts[a]) for a, b in itertools.pairwise(at)]
            for ways in itertools.product(variants, repeat=stages):
                ends = list(itertools.accumulate((way.devices for way in ways), initial=0))
                if ends[-1] > count:
                    continue
                planned = tuple(
                    PlannedStage(ops, tuple(range(ends[i], ends[i + 1])), ways[i].recompute)
                    for i, ops in enumerate(sets)
                )
                plan = PipelinePlan(graph, cluster, planned, B, M, "1f1b", {"extra": 0}, chain=True)
                try:
                    plan.check()
                except PlanError:
                    continue
                yield plan


def least_by_search(spans, cluster, variants, *, overlap):
    link = cluster.link(0, 1)
    choices = price_stages(spans, cluster, B, M, variants, link=link, overlap=overlap)
    chains = search_chains(choices, cluster.num_devices)
    return chains[0].bottleneck if chains else None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("form", ["linear", "down-sets"])
def test_no_chain_has_a_lower_bottleneck(form, overlap, seed):
    graph = random_dag(seed, 5) if seed % 2 else random_series_parallel(seed, 5)
    cluster = random_cluster(seed, 3, graph if seed % 3 else None, tightness=0.9)
    variants = [Variant(1), Variant(1, True), Variant(2), Variant(2, True)]
    if form == "linear":
        cuts = list_prefixes(graph.order)
        spans = span_prefixes(graph, cuts)
    else:
        cuts = list_down_sets(graph.predecessors, graph.order, 1000)
        spans = span_down_sets(graph, cuts, 100_000)
    bottlenecks = [
        max(measure(plan, s, overlap=overlap) for s in range(len(plan.stages)))
        for plan in all_chains(graph, cluster, cuts, variants)
    ]
    found = least_by_search(spans, cluster, variants, overlap=overlap)
    if not bottlenecks:
        assert found is None
        return
    assert found == pytest.approx(min(bottlenecks), rel=2e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), ops=st.integers(1, 10), devices=st.integers(1, 6), form=st.sampled_from("lap"))
def test_plans_are_chains_that_pass_the_checker(seed, ops, devices, form):
    graph = random_dag(seed, ops) if seed % 2 else random_series_parallel(seed, ops)
    cluster = random_cluster(seed, devices, graph, tightness=0.7)
    try:
        if form == "p":
            plan = piper(graph, cluster, 16)
        else:
            plan = pipedream(graph, cluster, 16, form="linear" if form == "l" else "antichains")
    except PlanError as error:
        assume("fits into" not in str(error))
        raise
    plan.check()
    assert plan.chain
    assert plan.batch_size == 16
    assert plan.depth == tuple(range(len(plan.stages), 0, -1))


def chain_graph(seconds, **costs):
    ops = [Op(f"op{i}", t, t, t, output_bytes=8, **costs) for i, t in enumerate(seconds)]
    return OpGraph.build(ops, [(a.name, b.name) for a, b in itertools.pairwise(ops)])


@pytest.mark.parametrize("seed", range(6))
def test_on_a_chain_nothing_is_better(seed):
    """The exact planner's stages of a chain are a chain; transfers and reductions are left out of both."""
    graph = chain_graph([1e-3 * (1 + (seed * 7 + i * 5) % 4) for i in range(6)], residual_bytes=1e6)
    cluster = ClusterSpec.homogeneous(ClusterSpec.preset("v100", 1).devices[0], 4, Link())
    options = {"microbatches": [4], "replicas": "any"}
    best = exact(graph, cluster, 16, objective="bottleneck", **options)
    for plan in (
        pipedream(graph, cluster, 16, select="bottleneck", **options),
        pipedream(graph, cluster, 16, select="bottleneck", form="antichains", **options),
        piper(graph, cluster, 16, select="bottleneck", **options),
    ):
        assert plan.bottleneck == pytest.approx(best.bottleneck, rel=1e-4)
    fastest = exact(graph, cluster, 16, **options).predict("free").step_seconds
    assert pipedream(graph, cluster, 16, **options).predict("free").step_seconds <= fastest * 1.05


def towers(branches, length, **costs):
    ops, edges = [Op("join", 1e-5)], []
    for b in range(branches):
        names = [f"{b}.{i}" for i in range(length)]
        ops += [Op(name, 1e-3, 1e-3, 1e-3, residual_bytes=1e6, output_bytes=1e3, kind="l", **costs) for name in names]
        edges += [*itertools.pairwise(names), (names[-1], "join")]
    return OpGraph.build(ops, edges)


def test_a_chain_is_blind_to_depth():
    """Four towers on four devices: the same stages as a graph have depth 2, and a shorter step."""
    cluster = ClusterSpec.preset("v100", 4)
    plan = pipedream(towers(4, 3, parameter_bytes=4e8), cluster, 16, select="bottleneck")
    assert plan.depth == (4, 3, 2, 1)
    graph = replace(plan, chain=False)
    assert max(graph.depth) == 2
    assert graph.predict("free").step_seconds < plan.predict("free").step_seconds


def test_pieces_of_several_branches_in_one_stage_need_down_sets():
    """Three equal towers on two devices: one and a half each. Branch after branch can cut in the middle of one too."""
    graph, cluster = towers(3, 2, parameter_bytes=4e8), ClusterSpec.preset("v100", 2)
    linear = pipedream(graph, cluster, 16, select="bottleneck", microbatches=[1])
    other = pipedream(graph, cluster, 16, select="bottleneck", microbatches=[1], form="antichains")
    assert other.bottleneck == pytest.approx(linear.bottleneck, rel=1e-4)
    assert linear.bottleneck == pytest.approx(3 * 3e-3, rel=1e-2)


def test_recomputation_makes_room():
    graph = chain_graph([1e-3] * 5, residual_bytes=4.5e9, parameter_bytes=1e6)
    cluster = ClusterSpec.preset("v100", 2)
    options = {"microbatches": [1]}
    with pytest.raises(PlanError, match="fits into 2 devices"):
        pipedream(graph, cluster, 8, **options)
    with pytest.raises(PlanError, match="fits into 2 devices"):
        piper(graph, cluster, 8, recompute=False, **options)
    plan = piper(graph, cluster, 8, **options)
    plan.check()
    assert any(stage.recompute for stage in plan.stages)


def test_too_many_down_sets_are_counted_and_given_up():
    graph, cluster = towers(7, 4), ClusterSpec.preset("v100", 4)
    for planner, options in ((pipedream, {"form": "antichains"}), (piper, {})):
        with pytest.raises(PlanError, match=r"29 operators has more than 40,000 down-sets"):
            planner(graph, cluster, 16, **options)
    with pytest.raises(PlanError, match=r"84 down-sets and more than 100 pairs|down-sets and more than 100 pairs"):
        piper(towers(3, 3), cluster, 16, max_pairs=100)
    with pytest.raises(PlanError, match="form='chains'; known: 'linear', 'antichains'"):
        pipedream(graph, cluster, 16, form="chains")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ops=st.integers(1, 14))
def test_linear_orders_are_topological(seed, ops):
    graph = random_dag(seed, ops)
    for order in iterate_orders(graph):
        place = {op: i for i, op in enumerate(order)}
        assert sorted(order) == list(range(ops))
        assert all(place[e.source] < place[e.target] for e in graph.edges)
