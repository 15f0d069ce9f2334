"""The machine at run time, on one rank: everything that was decided is data, and this only follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpar.lower.branches import BRANCH, ROW, Carry, run_branch
from jaxpar.lower.clock import Clock
from jaxpar.lower.evaluate import Env, Rows, evaluate
from jaxpar.lower.machine import Machine
from jaxpar.lower.once import batch_inputs, batched_outputs, examples_of_output
from jaxpar.lower.run_rounds import run_rounds
from jaxpar.lower.slots import item_of
from jaxpar.lower.totals import identity_of, reduce_over_group, reduce_over_replicas


def run_machine(
    machine: Machine,
    state: Sequence[Sequence[Any]],
    shared: Sequence[Any],
    batch: Sequence[Any],
    clock: Clock | None = None,
) -> tuple[list, list, list, list]:
    """The step on one rank, inside `shard_map`.

    Args:
        state: this rank's buffers of each state argument.
        shared: values of the inputs that every rank has.
        batch: this replica's rows of each batch leaf.
        clock: notes when each tick starts and ends.

    Returns: new buffers of each updated state argument, results that every rank has, buffers of located results,
    per-example results `[M, ...]`.
    """
    axes, program = machine.axes, machine.program
    rank = lax.axis_index(axes.stage)
    replica = lax.axis_index(axes.data) if axes.data else 0
    local = program.num_examples // axes.replicas
    first = jnp.asarray(replica * local, jnp.int32)
    everyone = [*shared, *map(jnp.asarray, program.consts.values())]
    everyone += _run_early_totals(machine, everyone, batch, Rows(local, program.num_examples, first, axes.manual))
    once = Rows(program.num_examples, program.num_examples, jnp.int32(0), axes.manual)
    stored: dict[str, Sequence[Any]] = {"shared": everyone}
    stored.update((f"state{k}", buffers) for k, buffers in enumerate(state))
    (prelude,), _ = run_rounds(machine.prelude, stored, once, rank, axes.stage)
    stored["prelude"] = prelude
    carry = _run_ticks(machine, stored, batch, first, clock)
    complete = lambda x, op: reduce_over_group(
        reduce_over_replicas(x, op, axes), op, machine.groups, machine.doubling, axes.stage
    )
    stored["totals"] = [complete(x, item.tag) for x, item in zip(carry["totals"], machine.totals.buffers, strict=True)]
    groups, everywhere = run_rounds(machine.update, stored, once, rank, axes.stage)
    return groups[:-1], everywhere, groups[-1], carry["outputs"]


def _run_early_totals(machine: Machine, everyone: Sequence[Any], batch: Sequence[Any], rows: Rows) -> list[Any]:
    program = machine.program
    env: Env = dict(zip(machine.shared, everyone, strict=False))
    env.update(zip(batch_inputs(program), batch, strict=True))
    for eqn in machine.early:
        if eqn.name == "complete":
            env[eqn.outputs[0]] = reduce_over_replicas(env[eqn.reads[0]], eqn.params["op"], machine.axes)
        else:
            evaluate([eqn], env, rows)
    return [env[eqn.outputs[0]] for eqn in machine.early if eqn.name == "complete"]


def _run_ticks(
    machine: Machine, stored: Mapping[str, Sequence[Any]], batch: Sequence[Any], first: Any, clock: Clock | None
) -> Carry:
    axes, mail, staging = machine.axes, machine.mail, machine.staging
    rank = lax.axis_index(axes.stage)
    # unsigned, so that indexing with them need not look out for negative ones
    registers = jnp.asarray(machine.registers, jnp.uint32)[:, rank]
    arrivals = jnp.asarray(machine.arrivals, jnp.uint32)[:, rank]

    def exchange(sent: Sequence[Sequence[Any]]) -> list[list[Any]]:
        pairs = [machine.routing.channels[box.channel].pairs for box in mail.boxes]
        return [[lax.ppermute(x, axes.stage, p) for x in payload] for payload, p in zip(sent, pairs, strict=True)]

    def act(row: Any, carry: Carry) -> Carry:
        start = first + lax.convert_element_type(row[ROW], jnp.int32)
        fresh = lambda: {"staging": staging.fresh()} if staging is not None else {}
        branches: list[Any] = [lambda c: {**c, **fresh()}]
        for b in machine.branches:
            store = None if staging is None else staging.store_of(b)
            rows = Rows(b.examples, machine.program.num_examples, start, axes.manual)
            branches.append(
                lambda c, b=b, store=store, rows=rows: run_branch(
                    b, row, {**c, **fresh()}, stored, batch, mail, rows, store
                )
            )
        return lax.switch(lax.convert_element_type(row[BRANCH], jnp.int32), branches, carry)

    def work(row: Any, carry: Carry) -> Carry:
        carry = act(row, carry)
        if staging is not None:
            carry["rings"] = staging.store(row, carry["rings"], carry.pop("staging"))
        return carry

    def tick(carry: Carry, xs: tuple[Any, Any, Any]) -> tuple[Carry, None]:
        number, row, slots = xs
        early = exchange(carry["sent"]) if machine.timetable.exchange == 2 else None
        carry = work(row, carry) if clock is None else clock.time(work, number, row, carry, early)
        received = early if early is not None else exchange(carry["sent"])
        # The work reads the mail: deliver new mail after it, or XLA copies the mailboxes and waits for the transfer
        # first.
        carry["mail"], received, carry["sent"] = lax.optimization_barrier((carry["mail"], received, carry["sent"]))
        carry["mail"] = [
            [lax.dynamic_update_index_in_dim(box, x, slots[k], 0) for box, x in zip(boxes, payload, strict=True)]
            for k, (boxes, payload) in enumerate(zip(carry["mail"], received, strict=True))
        ]
        return carry, None

    carry, _ = lax.scan(tick, _initial_carry(machine), (jnp.arange(len(machine.registers)), registers, arrivals))
    return carry


def _initial_carry(machine: Machine) -> Carry:
    count, boxes = machine.timetable.num_microbatches, machine.mail.boxes
    outputs = []
    for v in batched_outputs(machine.program):
        item = item_of(v, examples_of_output(machine.graph, v))
        outputs.append(jnp.zeros((count, *item.shape), item.dtype))
    return {
        "totals": [identity_of(item) for item in machine.totals.buffers],
        "rings": [jnp.zeros(r.shape, r.dtype) for r in machine.residuals.rings],
        "mail": [[jnp.zeros((box.rows, *i.shape), i.dtype) for i in box.packing.buffers] for box in boxes],
        "sent": [[jnp.zeros(i.shape, i.dtype) for i in box.packing.buffers] for box in boxes],
        "outputs": outputs,
    }
