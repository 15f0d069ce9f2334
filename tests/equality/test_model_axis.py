"""A third mesh axis that the user shards parameters over: tensor parallelism inside the stages, left to the
compiler."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpar
from jaxpar.lower import find_permutes_in_branches
from tests.equality.grid import small_case
from tests.hlo import parse_hlo, tick_conditionals
from tests.oracle import assert_same, run_reference, run_steps

# Where a compiler-inserted collective permute ends up in a branch the program hangs, on the CPU at least, so each test
# looks at the compiled program before it runs.


def make_mesh(shape, axis_type=AxisType.Auto):
    size = int(np.prod(list(shape.values())))
    devices = np.array(jax.devices()[:size]).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape), axis_types=(axis_type,) * len(shape))


def shard_state(state, mesh, spec_of):
    """The state, each leaf (parameters and moments) sharded as `spec_of(path)` says."""

    def put(path, x):
        spec = spec_of(jax.tree_util.keystr(path))
        return x if spec is None else jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(put, state)


def columns(path):
    """Each product's kernel by its columns."""
    return P(None, "model") if "kernel" in path else None


def alternating(path):
    """Megatron's way: the first product of an MLP by columns, the second by rows; Shoeybi et al. 2019, section 3."""
    return {"up": P(None, "model"), "down": P("model", None)}.get(path.split("'")[-4]) if "kernel" in path else None


def run_and_compare(case, train_step, mesh, state, **options):
    """Three steps from `state` on `mesh`, compared with the undecorated step on one device; the step and its state."""
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=4, **options)
    check_branches(step, state, case)
    placed, outputs = run_steps(case, step, step.place(state), 3)
    assert_same(outputs, run_reference(case).outputs)
    assert_same(step.gather(placed), run_reference(case).state)
    return step, placed


def check_branches(step, state, case):
    """No transfer between ranks in a branch of the switch, which still is one: it would wait for ever."""
    compiled = step.lower(state, case.batch, *case.extra).compile()
    hlo = parse_hlo(compiled.as_text())
    assert hlo.in_branches("collective-permute.*") == []
    assert max(tick_conditionals(hlo)) == compiled.built.machine.num_stage_programs + 1


@pytest.mark.parametrize("spec_of", [columns, alternating])
@pytest.mark.parametrize("shape", [{"stage": 2, "data": 2, "model": 2}, {"stage": 4, "model": 2}], ids=str)
def test_gpt(shape, spec_of):
    case, mesh = small_case("gpt"), make_mesh(shape)
    state = shard_state(case.state, mesh, spec_of)
    _, placed = run_and_compare(case, case.step, mesh, state)
    sharded = [b for b in placed.buffers if "model" in b.sharding.spec]
    kernels = sum(spec_of(jax.tree_util.keystr(path)) is not None for path, _ in jax.tree.leaves_with_path(state))
    per_rank = max(
        sum(bool(leaf.spec) and leaf.rank == r for leaf in placed.layout.leaves) for r in range(shape["stage"])
    )
    assert sum(bool(leaf.spec) for leaf in placed.layout.leaves) == kernels
    assert len(sharded) >= per_rank > 0
    for buffer in sharded:
        shard = buffer.addressable_shards[0].data
        assert shard.size * shape["stage"] * shape["model"] == buffer.size


def test_the_first_state_is_sharded_as_well():
    """`place` puts each part on the devices where the step will look for it: nothing is whole on one device."""
    case, mesh = small_case("gpt"), make_mesh({"stage": 2, "model": 2})
    state = shard_state(case.state, mesh, columns)
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4)
    step.plan(state, case.batch)
    placed = step.place(state)
    for buffer, after in zip(placed.buffers, step._layouts[0].abstract().buffers, strict=True):
        assert buffer.sharding == after.sharding
    assert_same(step.gather(placed), case.state)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_mesh_of_either_kind(axis_type):
    case = small_case("mlp")
    mesh = make_mesh({"stage": 2, "data": 2, "model": 2}, axis_type)
    state = shard_state(case.state, mesh, lambda path: P(None, "model") if "'w'" in path else None)
    _, placed = run_and_compare(case, case.step, mesh, state)
    assert any("model" in b.sharding.spec for b in placed.buffers)


@pytest.mark.parametrize(
    "spec", [P(None, "model"), P("data", "model"), P(("data", "model"), None), P(("model",))], ids=str
)
def test_constraint_inside_the_step(spec):
    """A constraint acts over the axes that are left to the compiler; those of the pipeline fall out of it."""
    case, mesh = small_case("mlp"), make_mesh({"stage": 2, "data": 2, "model": 2})

    def train_step(params, batch):
        constrain = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        def loss_fn(params):
            x = batch["x"]
            for layer in params[:-1]:
                x = constrain(jnp.tanh(x @ layer["w"] + layer["b"]))
            y = x @ params[-1]["w"] + params[-1]["b"]
            return jnp.sum((y - batch["y"]) ** 2, axis=-1).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), {"loss": loss}

    run_and_compare(case, train_step, mesh, case.state)


def test_constraint_on_a_weight_of_the_gpt():
    case, mesh = small_case("gpt"), make_mesh({"stage": 2, "data": 2, "model": 2})

    def train_step(state, batch):
        def constrain(path, x):
            spec = alternating(jax.tree_util.keystr(path))
            return x if spec is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return case.step(state.replace(params=jax.tree.map_with_path(constrain, state.params)), batch)

    run_and_compare(case, train_step, mesh, case.state)


_MIXES = {
    "halves": lambda h: jnp.concatenate([h[:, :6] * h[:, 6:], h[:, :6]], axis=-1),  # a gated unit
    "rotary": lambda h: 0.5 * h + jnp.concatenate([-h[:, 6:], h[:, :6]], axis=-1),
    "thirds": lambda h: jnp.concatenate([x * (i + 1) for i, x in enumerate(jnp.split(h, 3, axis=-1))], axis=-1),
    "roll": lambda h: h + jnp.roll(h, 1, axis=-1),
    "reverse": lambda h: h + h[:, ::-1],
    "shift": lambda h: h + jnp.pad(h[:, 1:], ((0, 0), (0, 1))),
}


@pytest.mark.parametrize("mix", _MIXES)
def test_operations_that_move_elements_along_a_sharded_dimension(mix):
    """The compiler likes to make them of collective permutes, which all devices would have to take part in.

    So the step gives the right numbers, or it is refused; it never hangs.
    """
    case, mesh = small_case("mlp", depth=4), make_mesh({"stage": 2, "data": 2, "model": 2})

    def train_step(params, batch, constrain=True):
        def loss_fn(params):
            x = batch["x"]
            for layer in params[:-1]:
                h = jnp.tanh(x @ layer["w"] + layer["b"])
                h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P(None, "model"))) if constrain else h
                x = _MIXES[mix](h)
            y = x @ params[-1]["w"] + params[-1]["b"]
            return jnp.sum((y - batch["y"]) ** 2, axis=-1).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), {"loss": loss}

    reference = partial(train_step, constrain=False)
    case = dataclasses.replace(case, name=f"mlp {mix}", step=reference)
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=4)
    if find_permutes_in_branches(step.lower(case.state, case.batch).lowered.compile().as_text()):
        placed = step.place(case.state)
        with pytest.raises(jaxpar.LowerError, match=r"collective-permutes \(\d+ of them.*constrain their operands"):
            step(placed, case.batch)
        assert_same(step.gather(placed), case.state)
    else:
        run_and_compare(case, train_step, mesh, case.state)
