"""A step runs as planned: any stages, on any groups of ranks, compute what the undecorated step computes."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpar
from jaxpar.plan import ClusterSpec, PipelinePlan, PlannedStage
from jaxpar.planning import graph_step
from tests.equality.grid import small_case
from tests.oracle import check_case
from tests.plan.random_plans import draw_plan
from tests.zoo import Case

BRANCHED = ("candle_uno", "dlrm", "mmt")


@cache
def graph_of(name):
    case = small_case(name)
    return case, graph_step(case.step, case.state, case.batch, costs="cpu").graph


def check_plan(name, plan, **options):
    """As planned: the groups, the stages' replicas, and the numbers."""
    case, _ = graph_of(name)
    step = check_case(case, {"stage": plan.cluster.num_devices}, plan=plan, num_microbatches=None, **options)
    machine = step._last.machine
    assert machine.groups[: len(plan.rank_devices)] == plan.rank_devices
    assert [s.replicas for s in step.plan().summaries] == [len(s.devices) for s in plan.stages]
    return step


@pytest.mark.parametrize(
    ("name", "seed"),
    [("candle_uno", 0), ("candle_uno", 1), ("dlrm", 0), ("dlrm", 1), ("unet", 1), ("mlp_per_example", 0)],
)
def test_random_plans(name, seed):
    _, graph = graph_of(name)
    check_plan(name, draw_plan(graph, 8 if seed else 4, 32, seed), schedule=None)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("name", ["candle_uno", "dlrm", "mmt", "unet", "towers", "gpt", "gpt_remat", "operations"])
def test_many_random_plans(name, seed):
    name = ["nested_jit", "checkpoint", "custom_vjp", "cond"][seed % 4] if name == "operations" else name
    _, graph = graph_of(name)
    check_plan(name, draw_plan(graph, (4, 8)[seed % 2], 32, seed), schedule=None)


@pytest.mark.parametrize("name", BRANCHED)
def test_the_planners_own_plan(name):
    """Made at the first call; branches run side by side: their actions overlap in the ticks that a run records."""
    case, _ = graph_of(name)
    cluster = ClusterSpec.preset("v100", 8)
    step = check_case(case, {"stage": 8}, 4, None, plan="graphpipe", cluster=cluster)
    plan = step.pipeline()
    assert plan.planner == "graphpipe"
    assert len(plan.stages) > max(plan.depth), "a chain"
    timetable = step.timetable()
    sources = [s for s in range(len(plan.stages)) if not timetable.dag.forward_sources[s]]
    first = {timetable.tick_of(jaxpar.schedule.Action("F", s, 0)) for s in sources}
    assert len(sources) > 1
    assert first == {0}, "branches wait for each other"


def test_unequal_widths_of_a_planners_plan():
    """A graph of which one part is much the dearest gets more replicas there."""
    _, graph = graph_of("candle_uno")
    top = [i for i, op in enumerate(graph.ops) if "branch" not in op.name]
    rest = [i for i in range(graph.num_ops) if i not in top]
    parts = [(rest[:4], (0,)), (rest[4:], (1,)), (top, (2, 3, 4, 5))]
    stages = tuple(PlannedStage(tuple(ops), devices) for ops, devices in parts)
    plan = PipelinePlan(graph, ClusterSpec.preset("cpu", 6), stages, 8, 4)
    step = check_plan("candle_uno", plan, schedule=None)
    assert "2-5" in str(step.plan())


def test_several_stages_on_the_same_devices():
    """Stages 0 and 2 take turns on ranks 0 and 1."""
    _, graph = graph_of("mlp")
    order = graph.order
    third = len(order) // 3
    parts = [order[:third], order[third : 2 * third], order[2 * third :]]
    stages = tuple(PlannedStage(tuple(p), d) for p, d in zip(parts, [(0, 1), (2,), (0, 1)], strict=True))
    check_plan("mlp", PipelinePlan(graph, ClusterSpec.preset("cpu", 3), stages, 8, 4), schedule=None)


def test_a_plan_that_uses_fewer_devices():
    _, graph = graph_of("mlp")
    half = graph.num_ops // 2
    stages = PlannedStage(graph.order[:half], (2,)), PlannedStage(graph.order[half:], (0,))
    check_plan("mlp", PipelinePlan(graph, ClusterSpec.preset("cpu", 4), stages, 8, 4), schedule=None)


def test_recomputation_keeps_less():
    """A stage that recomputes keeps what it received, and the numbers stay."""
    _, graph = graph_of("gpt")
    plan = draw_plan(graph, 2, 32, 0)
    halves = graph.order[: graph.num_ops // 2], graph.order[graph.num_ops // 2 :]
    kept = []
    for recompute in (False, True):
        stages = tuple(PlannedStage(ops, (r,), recompute) for r, ops in enumerate(halves))
        step = check_plan("gpt", dataclasses.replace(plan, stages=stages, schedule="1f1b"), schedule=None)
        kept.append([s.residual_bytes for s in step.plan().summaries])
    assert all(2 * less < more for less, more in zip(kept[1], kept[0], strict=True)), kept


def test_a_schedule_of_the_users_own_for_a_plan():
    _, graph = graph_of("candle_uno")
    plan = dataclasses.replace(draw_plan(graph, 4, 32, 5), schedule="1f1b")
    step = check_plan("candle_uno", plan, schedule="zb_h1")
    assert step.timetable().is_split


def test_saved_loaded_and_edited(tmp_path):
    """What was saved runs; another program's plan doesn't, and the error says which stage."""
    _, graph = graph_of("candle_uno")
    plan = draw_plan(graph, 4, 32, 3)
    plan.save(tmp_path / "plan.json")
    loaded = PipelinePlan.load(tmp_path / "plan.json")
    assert loaded == plan
    check_plan("candle_uno", loaded, schedule=None)
    wider = small_case("candle_uno", width=16)
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    step = jaxpar.parallelize(wider.step, mesh=mesh, plan=loaded)
    with pytest.raises(jaxpar.PlanError, match=r"stage \d+: '\S*/dense_0' computes something else"):
        step.plan(wider.state, wider.batch)


def test_errors():
    case, graph = graph_of("candle_uno")
    plan = draw_plan(graph, 8, 32, 1)
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    with pytest.raises(jaxpar.PlanError, match=r"the mesh has 4 positions on its axis 'stage'"):
        jaxpar.parallelize(case.step, mesh=mesh, plan=plan).plan(case.state, case.batch)
    half = graph.num_ops // 2
    backwards = PlannedStage(graph.order[half:], (0,)), PlannedStage(graph.order[:half], (1,))
    crossed = PipelinePlan(graph, ClusterSpec.preset("cpu", 4), backwards, 8, 4)
    with pytest.raises(jaxpar.PlanError, match="topological order"):
        jaxpar.parallelize(case.step, mesh=mesh, plan=crossed).plan(case.state, case.batch)
    with pytest.raises(jaxpar.PlanError, match="a plan settles what cuts and replicas would"):
        jaxpar.parallelize(case.step, mesh=mesh, plan=plan, cuts=["top"], replicas=(2, 2))
    with pytest.raises(jaxpar.PlanError, match="num_microbatches is missing"):
        jaxpar.parallelize(case.step, mesh=mesh)
    with pytest.raises(jaxpar.PlanError, match="not a list"):
        jaxpar.parallelize(case.step, mesh=mesh, plan=[])


def test_branches_of_a_shared_value_do_not_wait_for_each_other():
    """The cotangents of what several branches read are summed where it was made, not at one of the branches."""

    def forward(params, x):
        with jax.named_scope("stem"):
            shared = jnp.tanh(x @ params["stem"])
        branches = []
        for name in ("left", "middle", "right"):
            with jax.named_scope(name):
                branches.append(jnp.tanh(shared @ params[name]))
        with jax.named_scope("join"):
            return sum(branches) @ params["join"]

    def step(params, batch):
        loss_fn = lambda p: jnp.mean((forward(p, batch["x"]) - batch["y"]) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    keys = jax.random.split(jax.random.key(0), 5)
    names = ("stem", "left", "middle", "right", "join")
    params = {n: jax.random.normal(k, (6, 6), jnp.float64) for n, k in zip(names, keys, strict=True)}
    make_batch = lambda size, seed: {
        "x": np.random.default_rng(seed).normal(size=(size, 6)),
        "y": np.random.default_rng(seed + 9).normal(size=(size, 6)),
    }
    case = Case("shared", step, params, make_batch)
    graph = graph_step(step, params, case.batch, costs="cpu").graph
    places = {n: [i for i, op in enumerate(graph.ops) if n in op.name] for n in names}
    places["join"] += [i for i in range(graph.num_ops) if not any(i in found for found in places.values())]
    stages = tuple(PlannedStage(tuple(places[n]), (r,)) for r, n in enumerate(names))
    plan = PipelinePlan(graph, ClusterSpec.preset("cpu", 5), stages, 8, 4)
    step = check_case(case, {"stage": 5}, None, None, plan=plan)
    edges = step.plan().graph.edges(forward=False)
    assert {(a, b) for a, b in edges if {a, b} <= {1, 2, 3}} == set()
    assert {(1, 0), (2, 0), (3, 0)} <= set(edges)
