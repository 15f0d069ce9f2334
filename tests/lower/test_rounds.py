"""The update: computed where the state is, with as few exchanges as possible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpar
from jaxpar.lower.rounds import place_equations
from tests.equality.grid import small_case
from tests.oracle import assert_same
from tests.zoo.mlp import init_mlp, regression_batch, sgd

WIDTHS = [12] * 8 + [4]


def machine_of(step, *args, stages=4):
    mesh = jax.make_mesh((stages,), ("stage",), devices=jax.devices()[:stages])
    pipelined = jaxpar.parallelize(step, mesh=mesh, num_microbatches=4)
    pipelined.plan(*args)
    return pipelined._last.machine


def loss_fn(params, batch):
    """Of layers that have names, so that stages begin between layers."""
    x = batch["x"]
    for i, layer in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x - batch["y"]) ** 2)


def step_with(update):
    """A step whose new parameters are `update(params, grads)`."""

    def step(params, batch):
        return update(params, jax.grad(loss_fn)(params, batch))

    return step


def clipped(params, grads):
    return sgd(params, optax.clip_by_global_norm(0.1).update(grads, optax.EmptyState())[0])


def twice_clipped(params, grads):
    """A norm of what another norm has scaled: the second waits for the first."""
    grads = optax.clip_by_global_norm(0.1).update(grads, optax.EmptyState())[0]
    updates = optax.clip_by_global_norm(0.05).update(jax.tree.map(jnp.tanh, grads), optax.EmptyState())[0]
    return sgd(params, updates)


def mixed(params, grads):
    """Each layer's update needs another layer's weights, which lie on another rank."""
    new = sgd(params, grads)
    middle = [p | {"w": p["w"] + 0.01 * q["w"]} for p, q in zip(new[1:-1], [*params[2:-1], params[1]], strict=True)]
    return [new[0], *middle, new[-1]]


def normalised_by_the_largest(params, grads):
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(grads)]))
    return jax.tree.map(lambda p, g: p - 0.01 * g / (largest + 1e-3), params, grads)


@pytest.mark.parametrize(
    ("update", "rounds"),
    [(sgd, 1), (clipped, 2), (normalised_by_the_largest, 2), (twice_clipped, 3), (mixed, 2)],
)
def test_numbers_and_rounds(update, rounds):
    """Each scalar of the whole state costs one exchange, whatever the number of leaves and ranks."""
    step, params, batch = step_with(update), init_mlp(jax.random.key(0), WIDTHS), regression_batch(12)(32, 0)
    assert len(machine_of(step, params, batch).update.rounds) <= rounds
    mesh = jax.make_mesh((4, 2), ("stage", "data"))
    pipelined = jaxpar.parallelize(step, mesh=mesh, num_microbatches=4)
    expected = params
    for _ in range(2):
        params, expected = pipelined(params, batch), jax.jit(step)(expected, batch)
    assert_same(pipelined.gather(params), expected)


@pytest.mark.parametrize(
    ("name", "stages"), [("gpt", 2), ("gpt", 4), ("gpt", 8), ("gpt_remat", 2), ("mlp_sum_loss", 8)]
)
def test_a_global_norm_takes_three_rounds_at_most(name, stages):
    """The gradient of the tied embedding to its owner, the norms of what each rank owns to all, the update."""
    case = small_case(name)
    assert len(machine_of(case.step, case.state, case.batch, stages=stages).update.rounds) <= 3


def test_equal_ranks_share_their_update():
    """Ranks whose state and equations are equal run one program."""
    case = small_case("gpt", num_layers=8)
    machine = machine_of(case.step, case.state, case.batch)
    for update_round in machine.update.rounds:
        assert update_round.program_of[1] == update_round.program_of[2]


def test_equations_run_where_their_inputs_are():
    """Matrices stay where they are; a scalar of several ranks is computed by all."""

    def step(params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        norm = sum(jnp.sum(g["w"] ** 2) for g in grads)
        return [{"w": p["w"] - g["w"] / norm, "b": p["b"]} for p, g in zip(params, grads, strict=True)]

    machine = machine_of(step, init_mlp(jax.random.key(0), WIDTHS), regression_batch(12)(32, 0))
    program, graph = machine.program, machine.graph
    home = dict(graph.partial_home)
    leaves = iter(machine.layouts[0].leaves)
    home |= {v: next(leaves).rank for v, role in zip(program.inputs, program.roles, strict=True) if role == "state"}
    eqns, known = [], set(home)
    for eqn in program.eqns:
        if program.phase[eqn] in ("before", "linear", "after", "complete") and known.issuperset(eqn.reads):
            eqns.append(eqn)
            known.update(eqn.outputs)
    found = place_equations(eqns, home, {})
    for leaf, output in zip(machine.layouts[0].leaves, program.outputs, strict=True):
        if leaf.shape == (12, 12):
            assert found[output] == leaf.rank, leaf.name
    scalars = [v for eqn in eqns for v in eqn.outputs if v.shape == () and program.phase[eqn] == "after"]
    assert None in {found[v] for v in scalars}
