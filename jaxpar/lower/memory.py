"""What must be in memory on one device while the step runs, counted from the plan and the timetable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from jaxpar.lower.machine import Machine
from jaxpar.lower.once import examples_of_output
from jaxpar.lower.slots import item_of
from jaxpar.trace import Eqn, Var


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device. The buffers are the same on every rank, as large as the fullest rank needs.

    Attributes:
        state: the placed state, updated in place.
        totals: gradients and metrics, summed over micro-batches.
        residuals: kept from the forward to the backward of the micro-batches in flight.
        mailboxes: values received and not yet used.
        exchange: values being sent and received in one tick.
        prelude: invariant values computed once per step.
        working: within one action: values alive at once at its fullest point, before the compiler's fusion.
        outputs: per-example results.
    """

    state: int
    totals: int
    residuals: int
    mailboxes: int
    exchange: int
    prelude: int
    working: int
    outputs: int

    @property
    def temporary(self) -> int:
        """What must be alive besides the arguments: everything but the state."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "state")

    @property
    def total(self) -> int:
        return self.state + self.temporary


def estimate_memory(machine: Machine) -> MemoryEstimate:
    payload = sum(box.packing.bytes for box in machine.mail.boxes)
    program = machine.program
    per_example = {v for v in program.outputs if isinstance(v, Var) and program.is_batched(v)}
    count = machine.timetable.num_microbatches
    return MemoryEstimate(
        state=sum(layout.packing.bytes for layout in machine.layouts),
        totals=machine.totals.bytes,
        residuals=machine.residuals.bytes,
        mailboxes=machine.mail.bytes,
        exchange=payload * (2 if machine.timetable.exchange == 2 else 1),
        prelude=machine.prelude.groups[0].packing.bytes,
        working=max(_peak_alive(b.eqns, b.examples) for b in machine.branches),
        outputs=sum(item_of(v, examples_of_output(machine.graph, v)).bytes * count for v in per_example),
    )


def _peak_alive(eqns: Iterable[Eqn], microbatch: int) -> int:
    """The most bytes of the action's own values alive at once, if it ran one equation after the other."""
    eqns = list(eqns)
    last: dict[Var, int] = {}
    for i, eqn in enumerate(eqns):
        for v in eqn.reads:
            last[v] = i
    size = {v: v.bytes_at(microbatch) for eqn in eqns for v in eqn.outputs}
    alive = peak = 0
    ending: dict[int, int] = {}
    for i, eqn in enumerate(eqns):
        for v in eqn.outputs:
            if v in last:
                alive += size[v]
                ending[last[v]] = ending.get(last[v], 0) + size[v]
        peak = max(peak, alive)
        alive -= ending.get(i, 0)
    return peak
