"""What must be in memory on one device while the step runs, counted from the plan and the timetable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.lower.branches import Branch
from jaxpar.lower.machine import Machine
from jaxpar.lower.once import batch_inputs, examples_of_output
from jaxpar.lower.slots import item_of
from jaxpar.plan.residuals import RECOMPUTED
from jaxpar.trace import Eqn, Var


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device. The buffers are the same on every rank, as large as the fullest rank needs.

    Attributes:
        state: the placed state, updated in place.
        batch: the replica's rows of the batch, which every rank has.
        totals: gradients and metrics, summed over micro-batches.
        residuals: kept from the forward to the backward of the micro-batches in flight, and staged on their way there
            where the compiler needs that.
        mailboxes: values received and not yet used.
        exchange: values being sent and received in one tick.
        prelude: invariant values computed once per step.
        working: within one action: values alive at once at its fullest point, before the compiler's fusion, and the
            parameters that it takes out of pools.
        outputs: per-example results.
        update: when the micro-batches don't need the room any more: the totals that replicas exchange; new state that
            isn't in the old one's place, which is what pools hold, and all of it where ranks don't update alike and the
            compiler copies what a conditional makes.
    """

    state: int
    batch: int
    totals: int
    residuals: int
    mailboxes: int
    exchange: int
    prelude: int
    working: int
    outputs: int
    update: int

    @property
    def temporary(self) -> int:
        """What must be alive at once besides the arguments: while micro-batches run, or in the update."""
        running = self.residuals + self.mailboxes + self.exchange + self.working
        return self.totals + self.prelude + self.outputs + max(running, self.update)

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporary


def estimate_memory(machine: Machine) -> MemoryEstimate:
    payload = sum(box.packing.bytes for box in machine.mail.boxes)
    program = machine.program
    per_example = {v for v in program.outputs if isinstance(v, Var) and program.is_batched(v)}
    count = machine.timetable.num_microbatches
    rows = program.num_examples // machine.axes.replicas
    updated = machine.update.groups[: machine.outputs.num_updated]
    staged = sum(area.bytes for area in machine.staging.areas) if machine.staging is not None else 0
    in_place = len(machine.update.rounds[-1].programs) == 1 or machine.staging is None
    new = sum(b.bytes for group in updated for b in group.packing.buffers[in_place * group.packing.num_slots :])
    return MemoryEstimate(
        state=sum(layout.packing.bytes for layout in machine.layouts),
        batch=sum(v.bytes_at(rows) for v in batch_inputs(program)),
        totals=machine.totals.bytes,
        residuals=machine.residuals.bytes + staged,
        mailboxes=machine.mail.bytes,
        exchange=payload * (2 if machine.timetable.exchange == 2 else 1),
        prelude=machine.prelude.groups[0].packing.bytes,
        working=max(_pooled_bytes(b) + _peak_alive(b.eqns, b.examples) for b in machine.branches),
        outputs=sum(item_of(v, examples_of_output(machine.graph, v)).bytes * count for v in per_example),
        update=max(new, machine.totals.bytes if machine.doubling else 0),
    )


def _pooled_bytes(branch: Branch) -> int:
    """Of the parameters that are parts of a pool, and have to be taken out."""
    places = [(v, source.place) for v, source in branch.invariants]
    return sum(v.bytes_at(1) for v, place in places if place is not None and place.offset is not None)


def _peak_alive(eqns: Sequence[Eqn], examples: int) -> int:
    """The most bytes of the action's own values alive at once, if it ran one equation after the other.

    An element-wise value with one element-wise reader is taken to be fused with it. What no other equation reads (a
    gradient, a value to be sent) is counted when it is made, and then has its place.
    """
    readers: dict[Var, list[int]] = {}
    for i, eqn in enumerate(eqns):
        for v in eqn.reads:
            readers.setdefault(v, []).append(i)
    last: dict[Var, int] = {}
    size: dict[Var, int] = {}
    for i, eqn in reversed(list(enumerate(eqns))):
        end = i
        for v in eqn.outputs:
            at = readers.get(v, [])
            fused = eqn.name in RECOMPUTED and len(at) == 1 and eqns[at[0]].name in RECOMPUTED
            size[v] = 0 if fused else v.bytes_at(examples)
            end = max(end, last[v]) if fused else end
        for v in eqn.reads:
            last[v] = max(last.get(v, 0), end)
    alive = peak = 0
    ending: dict[int, int] = {}
    for i, eqn in enumerate(eqns):
        passing = 0
        for v in eqn.outputs:
            if v in last:
                alive += size[v]
                ending[last[v]] = ending.get(last[v], 0) + size[v]
            else:
                passing += size[v]
        peak = max(peak, alive + passing)
        alive -= ending.get(i, 0)
    return peak
