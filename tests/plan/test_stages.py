"""The graph of stages: closed under data flow, and equal where the model is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jaxpar
from tests.equality.grid import small_case


def build(case, stages, **options):
    mesh = jax.make_mesh((stages,), ("stage",), devices=jax.devices()[:stages])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, **options)
    step.plan(case.state, case.batch, *case.extra)
    return step._last


@pytest.mark.parametrize("name", ["mlp", "gpt", "gpt_remat", "towers", "unet", "forward_only", "mlp_per_example"])
@pytest.mark.parametrize("stages", [1, 4, 8])
def test_programs_have_what_they_read(name, stages):
    """Each value that an action reads is made there, received, kept, a row of the batch, or an invariant."""
    graph = build(small_case(name), stages).plan.graph
    delivered = {node: set() for node in graph.programs}
    for bundle in graph.bundles:
        assert set(bundle.values) <= {v for eqn in graph.programs[bundle.source].eqns for v in eqn.outputs} | set(
            graph.programs[bundle.source].reads
        )
        for reader in bundle.readers:
            assert reader[1] == bundle.stage
            delivered[reader].update(bundle.values)
    for node, program in graph.programs.items():
        assert set(program.reads) <= delivered[node]
        made = {*program.reads, *program.invariants, *program.batch}
        for eqn in program.eqns:
            assert made.issuperset(eqn.reads), (node, eqn.name)
            made.update(eqn.outputs)
        assert made.issuperset((*program.partials, *program.outputs))


@pytest.mark.parametrize("name", ["gpt", "towers", "unet"])
def test_values_travel_forwards_in_the_forward_pass_and_back_in_the_backward(name):
    graph = build(small_case(name), 8).plan.graph
    assert all(a < b for a, b in graph.edges(forward=True))
    assert all(a > b for a, b in graph.edges(forward=False))


def test_two_towers_are_side_by_side():
    """Branches that don't depend on each other: the graph is not a chain."""
    graph = build(small_case("towers"), 8).plan.graph
    dag = graph.dag
    assert len(graph.edges(forward=True)) < 28  # of a complete graph
    assert max(dag.depth) < 8
    assert sum(b == 7 for _, b in graph.edges(forward=True)) > 1


def test_skips_pass_over_stages():
    graph = build(small_case("unet"), 4).plan.graph
    assert any(b - a > 1 for a, b in graph.edges(forward=True))


@pytest.mark.parametrize(
    ("name", "parameter", "few"), [("gpt", "num_layers", 8), ("gpt_remat", "num_layers", 8), ("mlp", "depth", 12)]
)
def test_equal_layers_share_their_programs(name, parameter, few):
    """However many there are: the first stage, the last one, and one for all between, forwards and backwards.

    (With layers as small as the MLP's, the loss is worth a layer: of eight, the stages would get unequal pieces.)
    """
    counts = [build(small_case(name, **{parameter: n}), 4).machine.num_stage_programs for n in (few, 2 * few)]
    assert counts[0] == counts[1] <= 6


def test_equal_layers_share_their_programs_on_more_stages():
    assert build(small_case("gpt", num_layers=16), 8).machine.num_stage_programs <= 6


def test_balance_of_equal_layers():
    plan = build(small_case("gpt", num_layers=8), 4).plan
    times = [s.forward_seconds + s.backward_seconds for s in plan.summaries]
    assert max(times) <= 1.1 * sum(times) / 4
    assert [s.modules for s in plan.summaries][1:3] == ["GPT/block_2 … block_3", "GPT/block_4 … block_5"]


def test_a_forward_only_step_has_no_backward():
    graph = build(small_case("forward_only"), 4).plan.graph
    assert not graph.has_backward
    assert {kind for kind, _ in graph.programs} == {"F"}


def test_named_scopes_are_modules_too():
    """Stages begin between the user's own scopes, and are called by them."""

    def train_step(params, batch):
        def loss_fn(params):
            x = batch
            for i, w in enumerate(params):
                with jax.named_scope(f"part_{i}"):
                    x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return [w - g for w, g in zip(params, grads, strict=True)], loss

    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=4)
    plan = step.plan([jnp.eye(12)] * 8, jnp.ones((16, 12)))
    assert [s.modules.split(" … ")[0] for s in plan.summaries] == ["part_0", "part_2", "part_4", "part_6"]
