"""Backward equations follow the forward ones, and gradients come to be where the parameters are."""

from __future__ import annotations

from collections import Counter, defaultdict

import jax
import numpy as np
import pytest

import jaxpar
from jaxpar.plan import analyse_flow
from tests.equality.grid import small_case


def build(case, stages, **options):
    mesh = jax.make_mesh((stages,), ("stage",), devices=jax.devices()[:stages])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, **options)
    step.plan(case.state, case.batch, *case.extra)
    return step._last


def stages_of_blocks(built, kind):
    """For each block of a transformer, in how many equations of each stage it is."""
    found = defaultdict(Counter)
    for stage in range(built.plan.graph.num_stages):
        for eqn in built.plan.graph.programs[kind, stage].eqns:
            if (eqn in built.program.backward) == (kind == "B"):
                for name in eqn.path:
                    if name.startswith("block_"):
                        found[name][stage] += 1
    return found


def gradients(built):
    """`(parameter's name, stage of a partial gradient of it)` of all leaves that have several elements.

    A gradient reaches the new value of its parameter through equations of the update that keep the number of elements.
    """
    program, readers = built.program, defaultdict(list)
    for eqn in program.eqns:
        if program.phase[eqn] != "microbatch":
            for v in eqn.reads:
                readers[v].append(eqn)
    leaves = [leaf for layout in built.layouts for leaf in layout.leaves]
    name_of = {program.outputs[out]: leaves[k].name for out, k in built.output_tree.state_outputs.items()}
    for total, stage in built.plan.graph.partial_home.items():
        waiting, seen = [total], {total}
        while waiting and np.prod(total.shape_at(1)) > 1:
            v = waiting.pop()
            if v in name_of:
                yield name_of[v], stage
            made = [u for eqn in readers[v] for u in eqn.outputs if np.prod(u.shape_at(1)) == np.prod(v.shape_at(1))]
            waiting += [u for u in made if u not in seen]
            seen.update(made)


def misplaced(built):
    """Leaves with a gradient that is accumulated elsewhere."""
    leaves = [leaf for layout in built.layouts for leaf in layout.leaves if np.prod(leaf.shape) > 1]
    rank_of = {leaf.name: leaf.rank for leaf in leaves}
    found = list(gradients(built))
    assert {name for name, _ in found} >= {name for name, rank in rank_of.items() if rank is not None}
    return sorted({name for name, stage in found if rank_of[name] != stage})


@pytest.mark.parametrize(
    ("name", "layers", "stages"), [("gpt", 4, 4), ("gpt", 8, 4), ("gpt_remat", 8, 4), ("gpt", 6, 3)]
)
def test_the_backward_of_a_block_is_on_its_stage(name, layers, stages):
    built = build(small_case(name, num_layers=layers), stages)
    forward, backward = stages_of_blocks(built, "F"), stages_of_blocks(built, "B")
    assert set(forward) == set(backward) == {f"block_{i}" for i in range(layers)}
    for block, stages_found in backward.items():
        assert set(stages_found) <= set(forward[block])
        if len(forward[block]) == 1:
            assert set(stages_found) == set(forward[block])


@pytest.mark.parametrize(
    ("name", "parameters", "stages"),
    [
        ("gpt", {"num_layers": 4}, 4),
        ("gpt", {"num_layers": 3}, 8),
        ("gpt_remat", {"num_layers": 8}, 4),
        ("towers", {}, 8),
        ("unet", {}, 4),
        ("resnet", {}, 4),
    ],
)
def test_gradients_are_accumulated_where_the_parameter_is(name, parameters, stages):
    """But for a tied embedding's, which have two places, one of which is the parameter's."""
    built = build(small_case(name, **parameters), stages)
    assert [leaf for leaf in misplaced(built) if "embedding" not in leaf] == []
    places = defaultdict(set)
    for leaf, stage in gradients(built):
        places[leaf].add(stage)
    for leaf in (leaf for layout in built.layouts for leaf in layout.leaves):
        if leaf.name in places:
            assert leaf.rank in places[leaf.name], leaf.name


def test_gradients_of_biases_at_a_cut():
    assert misplaced(build(small_case("mlp", depth=8), 4)) == []


def test_a_cut_through_a_rematerialised_block():
    built = build(small_case("gpt_remat", num_layers=2), 4)
    assert [leaf for leaf in misplaced(built) if "embedding" not in leaf] == []


def test_rematerialised_blocks_are_balanced():
    """Four blocks on four stages: a block each, not a stage with two backwards."""
    plan = build(small_case("gpt_remat", num_layers=4), 4).plan
    times = [s.forward_seconds + s.backward_seconds for s in plan.summaries]
    assert max(times) <= 0.3 * sum(times)


@pytest.mark.parametrize("name", ["gpt", "unet", "mlp_per_example"])
def test_every_equation_of_the_pipeline_is_somewhere(name):
    """Forward and backward together are the micro-batch equations that some output needs; free ones are in neither."""
    built = build(small_case(name), 4)
    flow = analyse_flow(built.program, {})
    assert not set(flow.forward) & set(flow.backward)
    assert not flow.free & {*flow.forward, *flow.backward}
    assert set(flow.anchor) == set(flow.backward)
    assert set(flow.backward) <= built.program.backward
    made = {v for eqn in (*flow.forward, *flow.backward, *flow.free) for v in eqn.outputs}
    for eqn in (*flow.forward, *flow.backward):
        for v in eqn.reads:
            producer = built.program.producer.get(v)
            assert v in made or producer is None or built.program.phase[producer] != "microbatch"
    assert all(0 <= index < len(flow.forward) for index in flow.anchor.values())


def test_parameters_lie_where_they_are_first_read():
    built = build(small_case("gpt", num_layers=4), 4)
    first = {}
    for stage in reversed(range(4)):
        for v in built.plan.graph.programs["F", stage].invariants:
            first[v] = stage
    leaves = iter(leaf for layout in built.layouts for leaf in layout.leaves)
    read_directly = 0
    for v, role in zip(built.program.inputs, built.program.roles, strict=True):
        if role == "state" and (leaf := next(leaves)).rank is not None and v in first:
            assert leaf.rank == first[v], leaf.name
            read_directly += 1
    assert read_directly > 10


def test_moments_lie_with_their_parameters():
    built = build(small_case("gpt", num_layers=4), 4)
    rank = {leaf.name: leaf.rank for layout in built.layouts for leaf in layout.leaves}
    parameters = [name for name in rank if name.startswith("state.params")]
    for name in parameters:
        for moment in ("mu", "nu"):
            assert rank[name.replace("state.params", f"state.opt_state[1][0].{moment}")] == rank[name]
    kept_by_all = {name for name, r in rank.items() if r is None}
    assert kept_by_all >= {"state.step", "state.dropout_key", "state.opt_state[1][0].count"}
    assert not kept_by_all & set(parameters)
