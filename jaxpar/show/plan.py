"""The whole of a pipelined step in words: plan, schedule, memory, programs."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpar.errors import ScheduleError
from jaxpar.lower import Machine, MemoryEstimate, estimate_memory
from jaxpar.plan import PipelinePlan, Plan
from jaxpar.schedule import (
    PLACEMENTS,
    SCHEDULES,
    Lockstep,
    SearchResult,
    StageCosts,
    Timetable,
    compare_lockstep,
    make_timetable,
)
from jaxpar.text import format_bytes, format_table
from jaxpar.trace import Program

_PARTS = {
    "state": "parameters and optimizer state",
    "batch": "the batch",
    "totals": "gradients and metrics, summed",
    "residuals": "residuals of the micro-batches in flight",
    "mailboxes": "values received, waiting",
    "exchange": "values on their way",
    "prelude": "invariants computed once",
    "working": "inside one action, before fusion",
    "outputs": "per-example results",
    "update": "new state that isn't in place, later",
}


def explain_step(
    program: Program,
    plan: Plan,
    pipeline: PipelinePlan | None,
    timetable: Timetable,
    search: SearchResult | None,
    machine: Machine,
) -> str:
    """What runs where and when, and what it costs; of a plan that was given or made, what it said itself."""
    parts = [
        str(program),
        *([str(pipeline)] if pipeline is not None else []),
        str(plan),
        _explain_schedule(plan, timetable, search),
        _explain_memory(estimate_memory(machine), machine),
    ]
    return "\n\n".join([*parts, _explain_programs(machine)])


def _explain_schedule(plan: Plan, timetable: Timetable, search: SearchResult | None) -> str:
    costs = {split: plan.with_backwards(split).costs for split in (False, True)}
    lockstep = compare_lockstep(timetable, costs[timetable.is_split])
    head = (
        f"Schedule: {timetable.name}, {timetable.num_microbatches} micro-batches, {timetable.num_ticks} ticks, "
        f"exchange {timetable.exchange}. Predicted bubble {lockstep.executor.bubble_fraction:.1%} in the executor's "
        f"lockstep, {lockstep.free.bubble_fraction:.1%} if ranks ran freely (lockstep costs a factor of "
        f"{lockstep.ratio:.3f})."
    )
    if search is not None:
        head += (
            f" Found in {search.seconds:.1f} s; no timetable within the limits of the search takes less than "
            f"{search.lower_bound / search.makespan:.1%} of its time."
        )
    return head + (_compare_schedules(timetable, lockstep, costs) if timetable.dag.has_backward else "")


def _compare_schedules(timetable: Timetable, used: Lockstep, costs: Mapping[bool, StageCosts]) -> str:
    """The other schedules for this stage graph; `costs` of whole backwards, and of split ones."""
    rows = [("schedule", "makespan", "free-running", "bubble", "residuals", "most in flight per rank")]
    others = []
    for name, options in [("1f1b", {"extra": 0}), *((name, {}) for name in SCHEDULES)]:
        try:
            other = make_timetable(name, timetable.dag, timetable.num_microbatches, **options)
        except ScheduleError:
            if name not in PLACEMENTS:
                raise
            others.append(name)  # made for another layout of stages
            continue
        both = compare_lockstep(other, costs[other.is_split])
        rows.append(
            (
                name + (" extra=0" if options else ""),
                f"{both.executor.makespan / used.executor.makespan:.3f}",
                f"{both.free.makespan / used.executor.makespan:.3f}",
                f"{both.executor.bubble_fraction:.1%}",
                format_bytes(int(max(both.executor.peak_bytes_on_rank))),
                " ".join(map(str, other.peak_in_flight_on_rank)),
            )
        )
    elsewhere = f"\nFor other layouts of stages on ranks: {', '.join(others)}." if others else ""
    title = "\nOf this step's stages, makespan relative to the schedule in use:\n"
    return title + format_table(rows) + elsewhere


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
