"""A plan as a table: stages, what each is and costs, and what a step is thought to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpar.plan.op_names import describe_ops
from jaxpar.plan.predict import stage_memory
from jaxpar.text import format_bytes, format_table

if TYPE_CHECKING:
    from jaxpar.plan.pipeline import PipelinePlan


def format_plan(plan: PipelinePlan) -> str:
    """See `PipelinePlan.__str__`."""
    return "\n".join([_format_head(plan), format_table(_list_rows(plan)), _format_prediction(plan), *plan.notes])


def _format_head(plan: PipelinePlan) -> str:
    used = len({d for devices in plan.rank_devices for d in devices})
    by = f" by {plan.planner}" if plan.planner else ""
    seconds = f", found in {plan.search_seconds:.2g} s" if plan.search_seconds else ""
    options = "".join(f" {key}={option}" for key, option in plan.schedule_options.items())
    stages = (
        "1 stage"
        if len(plan.stages) == 1
        else f"{len(plan.stages)} stages{' in a chain' if plan.chain else ''}, depth {max(plan.depth)},"
    )
    return (
        f"Plan{by}{seconds}: {stages} on {used} of {plan.cluster.num_devices} devices; {plan.num_microbatches} "
        f"micro-batches of {plan.microbatch} examples, {plan.schedule}{options}\nCluster: {plan.cluster}"
    )


def _list_rows(plan: PipelinePlan) -> list[tuple[str, ...]]:
    shared = len(plan.rank_devices) < len(plan.stages)
    recomputes = any(stage.recompute for stage in plan.stages)
    head = ["stage", "operators", "devices", *["rank"] * shared, "replicas", "share", "F ms", "B ms"]
    rows = [(*head, "memory", "of", "in flight", *["recompute"] * recomputes, "sends")]
    whole = sum(len(s.devices) * sum(t) for s, t in zip(plan.stages, plan.stage_times, strict=True)) or 1.0
    for s, (stage, times) in enumerate(zip(plan.stages, plan.stage_times, strict=True)):
        memory = stage_memory(plan, s, plan.in_flight[s])
        most = min(plan.cluster.devices[d].memory_bytes for d in stage.devices)
        sends = [(b, size) for (a, b), size in plan.edges.items() if a == s]
        row = [
            str(s),
            describe_ops(plan.graph, stage.ops),
            format_ranges(stage.devices),
            *[str(plan.rank_of[s])] * shared,
            str(len(stage.devices)),
            f"{len(stage.devices) * sum(times) / whole:.1%}",
            f"{times[0] * 1e3:.4g}",
            f"{(times[1] + times[2]) * 1e3:.4g}",
            format_bytes(memory),
            f"{memory / most:.0%}",
            str(plan.in_flight[s]),
            *["yes" if stage.recompute else "no"] * recomputes,
            ", ".join(f"to {b}: {format_bytes(size * plan.microbatch)}" for b, size in sends) or "-",
        ]
        rows.append(tuple(row))
    return rows


def _format_prediction(plan: PipelinePlan) -> str:
    lockstep, free = plan.predict("executor"), plan.predict("free")
    return (
        f"Predicted: {lockstep.step_seconds:.4g} s a step in the executor's lockstep, "
        f"{lockstep.throughput:.4g} examples/s; {free.step_seconds:.4g} s if ranks ran freely\n"
        f"  timetable {lockstep.makespan:.4g} s with a bubble of {lockstep.bubble_fraction:.1%}, "
        f"gradients {lockstep.reduce_seconds:.3g} s, update {lockstep.update_seconds:.3g} s"
    )


def format_ranges(numbers: Sequence[int]) -> str:
    """
    >>> format_ranges([0, 1, 2, 3]), format_ranges([5]), format_ranges([0, 1, 4, 6, 7, 8])
    ('0-3', '5', '0,1,4,6-8')
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
