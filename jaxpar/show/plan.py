"""The whole of a pipelined step in words: plan, schedule, memory, programs."""

from __future__ import annotations

from jaxpar.lower import Machine, MemoryEstimate, estimate_memory
from jaxpar.plan import Plan
from jaxpar.schedule import Timetable, compare_lockstep, make_timetable, simulate
from jaxpar.text import format_bytes, format_table
from jaxpar.trace import Program

_PARTS = {
    "state": "parameters and optimizer state",
    "totals": "gradients and metrics, summed",
    "residuals": "residuals of the micro-batches in flight",
    "mailboxes": "values received, waiting",
    "exchange": "values on their way",
    "prelude": "invariants computed once",
    "working": "inside one action, before fusion",
    "outputs": "per-example results",
}


def explain_step(program: Program, plan: Plan, timetable: Timetable, machine: Machine) -> str:
    """What runs where and when, and what it costs."""
    parts = [
        str(program),
        str(plan),
        _explain_schedule(plan, timetable),
        _explain_memory(estimate_memory(machine), machine),
    ]
    return "\n\n".join([*parts, _explain_programs(machine)])


def _explain_schedule(plan: Plan, timetable: Timetable) -> str:
    costs = plan.costs
    lockstep = compare_lockstep(timetable, costs)
    head = (
        f"Schedule: {timetable.name}, {timetable.num_microbatches} micro-batches, {timetable.num_ticks} ticks, "
        f"exchange {timetable.exchange}. Predicted bubble {lockstep.executor.bubble_fraction:.1%} in the executor's "
        f"lockstep, {lockstep.free.bubble_fraction:.1%} if ranks ran freely (lockstep costs a factor of "
        f"{lockstep.ratio:.3f})."
    )
    rows = [("schedule", "makespan", "bubble", "residuals", "most in flight per rank")]
    for name, options in (("1f1b", {}), ("1f1b", {"extra": 0}), ("gpipe", {})):
        if not timetable.dag.has_backward:
            break
        other = make_timetable(name, timetable.dag, timetable.num_microbatches, **options)
        result = simulate(other, costs)
        label = name + (" extra=0" if options else "")
        relative = f"{result.makespan / lockstep.executor.makespan:.3f}"
        peak = " ".join(map(str, result.peak_in_flight_on_rank))
        memory = format_bytes(max(result.peak_bytes_on_rank))
        rows.append((label, relative, f"{result.bubble_fraction:.1%}", memory, peak))
    table = (
        "\nOf this step's stages, makespan relative to the schedule in use, residuals of the fullest rank:\n"
        + format_table(rows)
        if len(rows) > 1
        else ""
    )
    return head + table


def _explain_memory(memory: MemoryEstimate, machine: Machine) -> str:
    rows = [("memory per device, counted", "bytes")]
    rows += [(label, format_bytes(getattr(memory, part))) for part, label in _PARTS.items()]
    rows.append(("in all", format_bytes(memory.total)))
    waste = max((layout.packing.waste for layout in machine.layouts), default=0.0)
    note = f"State registers are {waste:.1%} larger than the fullest rank's own state."
    return format_table([(a.ljust(1), b) for a, b in rows]) + "\n" + note


def _explain_programs(machine: Machine) -> str:
    actions = len(machine.graph.programs)
    permutes = sum(len(box.packing.buffers) for box in machine.mail.boxes)
    return (
        f"Programs: {machine.num_stage_programs} distinct ones for the {actions} actions of "
        f"{machine.graph.num_stages} stages; {len(machine.routing.channels)} channels ({permutes} arrays exchanged "
        f"per tick); the update runs in {len(machine.update.rounds)} rounds."
    )
