"""Replicas: pieces of values, and totals over groups of unequal size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxpar
from benchmarks import planner_models_jax as models
from jaxpar.lower.evaluate import Rows, evaluate
from jaxpar.lower.totals import plan_doubling, reduce_over_group
from jaxpar.planning import graph_step
from jaxpar.schedule import validate_timetable
from jaxpar.trace import Eqn, Var
from jaxpar.trace.ir import join_examples_p, take_examples_p
from tests.equality.grid import small_case
from tests.plan.random_plans import draw_plan

GROUPS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def make_groups(sizes, order=None):
    ranks = list(range(sum(sizes))) if order is None else order
    ends = np.cumsum(sizes)
    return [tuple(ranks[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


@given(GROUPS, st.randoms())
def test_each_rank_gets_the_total_of_its_group_once(sizes, random):
    """Of sets: a contribution that is missing shows, and so does one that comes twice."""
    order = list(range(sum(sizes)))
    random.shuffle(order)
    groups = make_groups(sizes, order)
    held = [[r] for r in range(sum(sizes))]
    for r in plan_doubling(groups):
        assert len({src for src, _ in r.pairs}) == len(r.pairs) == len({dst for _, dst in r.pairs})
        sent = {dst: list(held[src]) for src, dst in r.pairs}
        for dst, values in sent.items():
            held[dst] = values if r.replaces[dst] else held[dst] + values if r.combines[dst] else held[dst]
    for group in groups:
        for rank in group:
            assert sorted(held[rank]) == sorted(group)


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (3, 5), (8,), (7, 1), (1,) * 8, (4, 4)])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_reduction_over_groups(sizes, op):
    """Right, and the same bits on all ranks of a group."""
    groups = make_groups(sizes)
    mesh = Mesh(np.array(jax.devices()[:8]), ("stage",))
    x = np.random.default_rng(0).normal(size=(8, 33))
    local = lambda x: reduce_over_group(x, op, groups, plan_doubling(groups), "stage")
    found = np.asarray(
        jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("stage"), out_specs=P("stage"), check_vma=False))(x)
    )
    for group in groups:
        expected = getattr(np, op)(x[list(group)], axis=0)
        np.testing.assert_allclose(found[group[0]], expected, rtol=1e-12)
        for rank in group:
            np.testing.assert_array_equal(found[rank], found[group[0]])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 1))
def test_pieces_join_to_the_value(outer, counts, inner, dim):
    """Examples lie between an outer and an inner factor of their dimension."""
    n = sum(counts)
    shape = [2, 3]
    shape.insert(dim, outer * n * inner)
    x = jnp.arange(np.prod(shape)).reshape(shape)
    layout = {"dim": dim, "outer": outer, "inner": inner}
    value, again, eqns, pieces, first = Var(tuple(shape), x.dtype), Var(tuple(shape), x.dtype), [], [], 0
    for count in counts:
        piece_shape = (*shape[:dim], outer * count * inner, *shape[dim + 1 :])
        pieces.append(Var(piece_shape, x.dtype))
        eqns.append(Eqn(take_examples_p, (value,), (pieces[-1],), {"first": first, "count": count, **layout}))
        first += count
    eqns.append(Eqn(join_examples_p, tuple(pieces), (again,), layout))
    env = evaluate(eqns, {value: x}, Rows(n, n, jnp.int32(0)))
    np.testing.assert_array_equal(env[again], x)
    for piece in pieces:
        assert env[piece].shape == piece.shape
    examples = np.moveaxis(np.asarray(x).reshape(*shape[:dim], outer, n, inner, *shape[dim + 1 :]), dim + 1, 0)
    start = 0
    for piece, count in zip(pieces, counts, strict=True):
        part = np.asarray(env[piece]).reshape(*shape[:dim], outer, count, inner, *shape[dim + 1 :])
        np.testing.assert_array_equal(np.moveaxis(part, dim + 1, 0), examples[start : start + count])
        start += count


def machine_of(replicas, **options):
    case = small_case("mlp", depth=9)
    mesh = jax.make_mesh((sum(replicas),), ("stage",), devices=jax.devices()[: sum(replicas)])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, replicas=replicas, **options)
    step.plan(case.state, case.batch)
    return step._last.machine


@pytest.mark.parametrize("replicas", [(2, 1, 1), (1, 4, 2, 1)])
def test_the_timetable_of_replicas_is_valid(replicas):
    """Replicas are stages with their own edges; all of a group do the same at the same time."""
    machine = machine_of(replicas)
    validate_timetable(machine.timetable)
    for group in machine.groups:
        for row in machine.timetable.grid:
            assert len({a and (a.kind, a.microbatch) for a in (row[r] for r in group)}) == 1


def test_replicas_share_their_programs():
    """As many as without replicas: all replicas of a stage do the same, on other rows."""
    assert machine_of((4, 4)).num_stage_programs == machine_of((1, 1)).num_stage_programs


def test_each_replica_sends_its_own_rows_only():
    """Between stages of 4 and 2 replicas a receiver gets half of its rows from each of two senders."""
    machine = machine_of((4, 2))
    edges = {(b.source[1], b.stage) for b in machine.graph.bundles if b.travels and b.source[0] == "F"}
    assert edges == {(0, 4), (1, 4), (2, 5), (3, 5)}


@pytest.mark.parametrize(("name", "seed"), [("mmt", 11), ("candle_uno", 12), ("dlrm", 13)])
def test_memory_of_a_plan(name, seed):
    """What is counted per rank for a plan of branches is within 15 % of what the compiler takes."""
    build = {
        "mmt": lambda: models.mmt(4, 1, 32, 64, 4, 16, np.float32),
        "candle_uno": lambda: models.candle_uno(4, 4, 256, np.float32),
        "dlrm": lambda: models.dlrm(4, 4, 2, 256, 1000, 64, 8, np.float32),
    }
    model = build[name]()
    state, batch = model.state, model.batch(64)
    plan = draw_plan(graph_step(model.step, state, batch, costs="v100").graph, 8, 64, seed)
    step = jaxpar.parallelize(model.step, mesh=jax.make_mesh((8,), ("stage",)), plan=plan)
    taken = step.lower(state, batch).compile().memory_analysis()
    counted = step.memory().total
    assert taken.temp_size_in_bytes + taken.argument_size_in_bytes == pytest.approx(counted, rel=0.15)
