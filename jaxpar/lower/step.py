"""From a machine to one jitted function on the whole mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpar import _jax
from jaxpar.lower.clock import Clock
from jaxpar.lower.layout import PlacedState, StateLayout
from jaxpar.lower.machine import Machine
from jaxpar.lower.once import examples_of_output
from jaxpar.lower.packing import keep_sharding, read_place
from jaxpar.lower.run import run_machine
from jaxpar.trace import Batched, Var

P = PartitionSpec


def jit_step(machine: Machine, mesh: Mesh, updated: Sequence[int], donate: bool, clock: Clock | None = None) -> Any:
    """`run(donated states, other states, shared leaves, batch leaves)`, jitted; with `donate`, the first are."""
    step = build_step(machine, mesh, clock)

    def run(
        donated: Sequence[PlacedState], kept: Sequence[PlacedState], shared: Sequence[Any], batch: Sequence[Any]
    ) -> Any:
        states: dict[int, PlacedState] = dict(zip(updated, donated, strict=True)) if donated else {}
        rest = iter(kept)
        count = len(donated) + len(kept)
        return step([states[k] if k in states else next(rest) for k in range(count)], shared, batch)

    return jax.jit(run, donate_argnums=(0,) if donate else ())


def build_step(machine: Machine, mesh: Mesh, clock: Clock | None = None) -> Callable[..., Any]:
    """`step(states, shared, batch) -> (new states, outputs)`, to be jitted; with a clock, one that is timed by it.

    Args of the step:
        states: a `PlacedState` for each state argument.
        shared: the other invariant arguments' leaves.
        batch: the batch leaves, whole.

    Returns of the step: the new `PlacedState` of each updated state argument, in order; and for each output of the
    program its value, None for a leaf of a new state.
    """
    axes, program = machine.axes, machine.program
    distinct = list(dict.fromkeys(program.outputs[i] for i in machine.outputs.batched))

    def local(buffers: Sequence[Sequence[Any]], shared: Sequence[Any], batch: Sequence[Any]) -> Any:
        mine = [_own_buffers(layout, row) for layout, row in zip(machine.layouts, buffers, strict=True)]
        states, everywhere, located, batched = run_machine(machine, mine, shared, batch, clock)
        rows = [_join_microbatches(x, program.type_of(v)) for x, v in zip(batched, distinct, strict=True)]
        return (
            [[b[None] for b in row] for row in states],
            everywhere,
            [x[None] for x in located],
            [x[None] for x in rows],
        )

    rows_specs = [P(axes.stage, *([None] * _rows_dim(program.type_of(v))), axes.data) for v in distinct]
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(axes.stage), P(), P(axes.data)),
        out_specs=(P(axes.stage), P(), P(axes.stage), rows_specs),
        axis_names=set(axes.manual),
        check_vma=False,
    )

    def step(
        states: Sequence[PlacedState], shared: Sequence[Any], batch: Sequence[Any]
    ) -> tuple[list[PlacedState], list[Any]]:
        everyone = _shared_inputs(machine, states, shared)
        buffers = [list(s.buffers) for s in states]
        new_buffers, everywhere, located, batched = mapped(buffers, everyone, list(batch))
        outputs: list[Any] = [None] * len(program.outputs)
        for i, x in zip(machine.outputs.everywhere, everywhere, strict=True):
            outputs[i] = _jax.wrap_key(x, program.outputs[i].dtype)
        for i, rank, place in machine.outputs.located:
            outputs[i] = _jax.wrap_key(read_place([x[rank] for x in located], place), program.outputs[i].dtype)
        for i in machine.outputs.batched:
            v = program.outputs[i]
            assert isinstance(v, Var)
            rows_of = batched[distinct.index(v)]
            outputs[i] = _whole_batch(machine, [rows_of[r] for r in _owners(machine, v)], v)
        return _new_states(machine, new_buffers, outputs), outputs

    return step


def _own_buffers(layout: StateLayout, buffers: Sequence[Any]) -> list[Any]:
    """This rank's buffers, sharded over the axes that are left to the compiler as the user's leaves were."""
    return [
        keep_sharding(b[0], item.tag) if item.tag and k < layout.packing.num_slots else b[0]
        for k, (b, item) in enumerate(zip(buffers, layout.packing.buffers, strict=True))
    ]


def _shared_inputs(machine: Machine, states: Sequence[PlacedState], shared: Sequence[Any]) -> list[Any]:
    """Values of the inputs that every rank has, in the order of the program's inputs."""
    kept = iter(x for s in states for x in s.shared)
    leaves = iter(leaf for layout in machine.layouts for leaf in layout.leaves)
    others = iter(shared)
    values = []
    for v, role in zip(machine.program.inputs, machine.program.roles, strict=True):
        if role == "state":
            if not next(leaves).ranks:
                values.append(next(kept))
        elif not machine.program.is_batched(v):
            values.append(next(others))
    return values


def _new_states(machine: Machine, buffers: Sequence[Sequence[Any]], outputs: list[Any]) -> list[PlacedState]:
    output_of = {leaf: out for out, leaf in machine.outputs.state.items()}
    rows = iter(buffers)
    states, first = [], 0
    for layout in machine.layouts:
        if first in output_of:
            shared = [outputs[output_of[k]] for k, leaf in enumerate(layout.leaves, first) if not leaf.ranks]
            sharded = next(rows)
            if set(layout.mesh.axis_names) != set(machine.axes.manual):
                sharded = [
                    jax.lax.with_sharding_constraint(b, layout.buffer_sharding(k)) for k, b in enumerate(sharded)
                ]
            states.append(PlacedState(sharded, shared, layout))
        first += len(layout.leaves)
    for i in machine.outputs.state:
        outputs[i] = None
    return states


def _owners(machine: Machine, v: Var) -> list[int]:
    """The ranks that compute a per-example output, in the order of their examples."""
    stages = sorted(n[1] for n, p in machine.graph.programs.items() if v in p.outputs)
    return [machine.graph.rank_of[s] for s in stages]


# -- per-example outputs: [M, ..., outer * b * inner, ...] to the whole batch's rows
# -------------------------------------


def _rows_dim(t: Any) -> int:
    """Where the examples' own dimension is, once the batch dimension is split into outer, examples, inner."""
    assert isinstance(t, Batched)
    return t.dim + 1


def _join_microbatches(x: Any, t: Any) -> Any:
    """`[M, pre, outer * b * inner, post] -> [pre, outer, M * b, inner, post]`."""
    assert isinstance(t, Batched)
    count, shape = x.shape[0], x.shape[1:]
    b = shape[t.dim] // (t.outer * t.inner)
    x = x.reshape(count, *shape[: t.dim], t.outer, b, t.inner, *shape[t.dim + 1 :])
    x = jnp.moveaxis(x, 0, t.dim + 1)
    return x.reshape(*shape[: t.dim], t.outer, count * b, t.inner, *shape[t.dim + 1 :])


def _whole_batch(machine: Machine, parts: Sequence[Any], v: Var) -> Any:
    """The rows of all replicas of the stage, `[pre, outer, D * M * b, inner, post]` of each, as the user has them."""
    dim = _rows_dim(machine.program.type_of(v))
    total = parts[0].shape[dim]
    count = examples_of_output(machine.graph, v)
    split = [x.reshape(*x.shape[:dim], total // count, count, *x.shape[dim + 1 :]) for x in parts]
    joined = jnp.concatenate(split, axis=dim + 1) if len(split) > 1 else split[0]
    raw = joined.reshape(*_jax.raw_shape(v.shape_at(machine.program.num_examples), v.dtype)[0])
    return _jax.wrap_key(raw, v.dtype)
