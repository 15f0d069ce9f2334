"""The whole pass: from a function and the shapes of its arguments to a jitted step on the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxpar import _jax
from jaxpar.arguments import Arguments, OutputTree
from jaxpar.arrange import Arrangement, arrange_stages
from jaxpar.errors import ScheduleError, TraceError
from jaxpar.lower import Axes, Machine, StateLayout, build_machine, jit_step, keep_axes, make_layout
from jaxpar.options import Options
from jaxpar.plan import Plan, Roofline, plan_stages
from jaxpar.schedule import (
    MemoryLimit,
    SearchResult,
    StageCosts,
    StageDag,
    Timetable,
    find_timetable,
    make_timetable,
    simulate,
)
from jaxpar.trace import Program
from jaxpar.tracing import trace_step

Spec = tuple[Any, ...]

AUTO = "auto"
_SEARCH_OPTIONS = ("memory_limit", "memory_bytes", "split_backward", "seconds", "seed", "progress", "cache")


@dataclass(frozen=True, eq=False)
class Built:
    """Everything about the step for arguments of one shape."""

    arguments: Arguments
    program: Program
    plan: Plan
    arrangement: Arrangement
    timetable: Timetable
    search: SearchResult | None  # that found the timetable, for schedule="auto"
    machine: Machine
    layouts: tuple[StateLayout, ...]
    output_tree: OutputTree
    jitted: Any

    @property
    def updated(self) -> tuple[int, ...]:
        """Positions of the state arguments that have a new value."""
        return self.output_tree.updated


def run_passes(
    arguments: Arguments,
    specs: Sequence[Spec],
    mesh: Mesh,
    axes: Axes,
    options: Options,
    layouts: tuple[StateLayout, ...] | None,
) -> Built:
    """trace, plan, schedule, lower.

    Args:
        arguments: shapes and roles of the flat arguments.
        specs: each leaf's sharding over the axes that are left to the compiler.
        layouts: where the state is, if it is placed already: the plan then follows it.
    """
    known = options.num_microbatches or getattr(options.plan, "num_microbatches", None)
    expected = microbatch_size(arguments, axes, known or 1)
    traced = trace_step(arguments, options.new_state, expected)
    program, outputs = traced.program, traced.outputs
    arrangement = arrange_stages(traced, mesh, axes, options, layouts)
    platform = mesh.devices.flat[0].platform
    plan = plan_stages(
        program,
        arrangement.rank_of,
        arrangement.groups,
        microbatch_size(arguments, axes, arrangement.num_microbatches),
        Roofline.for_platform(platform),
        judge=lambda dag, costs: _simulated_seconds(arrangement, dag, costs),
        updated=traced.updated,
        cuts=options.cuts,
        owners=_owners(arguments, layouts) if layouts is not None else None,
        forward_stage=arrangement.forward_stage,
        recompute=arrangement.recompute,
    )
    timetable, search = _choose_timetable(arrangement, plan)
    plan = plan.with_backwards(timetable.is_split)
    if layouts is None:
        layouts = _lay_out(arguments, plan, specs, mesh, axes)
    staged = _jax.copies_rings(platform)
    groups, state_outputs = arrangement.groups, outputs.state_outputs
    machine = build_machine(program, plan.graph, timetable, axes, groups, layouts, state_outputs, staged)
    jitted = jit_step(machine, mesh, outputs.updated, options.donate)
    return Built(arguments, program, plan, arrangement, timetable, search, machine, layouts, outputs, jitted)


def microbatch_size(arguments: Arguments, axes: Axes, count: int) -> int:
    """Examples in one micro-batch on one replica.

    Raises: TraceError where the batch doesn't split evenly.
    """
    total, step = arguments.num_examples, axes.replicas * count
    if total % step:
        batch = [
            name
            for name, role, x in zip(arguments.names, arguments.roles, arguments.leaves, strict=True)
            if role == "batch" and x.shape
        ]
        below = total // step * step
        replicas = f"{axes.replicas} replica{'s' * (axes.replicas > 1)}"
        raise TraceError(
            f"the batch ({batch[0]}{', ...' if len(batch) > 1 else ''}) has {total} examples, which don't split "
            f"evenly into {count} micro-batches on {replicas}: the batch size must be a multiple of {step}, such as "
            f"{f'{below} or ' if below else ''}{below + step}."
        )
    return total // step


def _choose_timetable(arrangement: Arrangement, plan: Plan) -> tuple[Timetable, SearchResult | None]:
    dag, count, extra = plan.graph.dag, arrangement.num_microbatches, dict(arrangement.schedule_options)
    if arrangement.schedule != AUTO:
        return make_timetable(arrangement.schedule, dag, count, **extra), None
    if unknown := [key for key in extra if key not in _SEARCH_OPTIONS]:
        known = ", ".join(_SEARCH_OPTIONS)
        raise ScheduleError(f"schedule {AUTO!r} takes {known}, not {', '.join(unknown)}")
    if not dag.has_backward:
        return make_timetable("1f1b", dag, count), None
    if jax.process_count() > 1:
        raise ScheduleError(
            f"schedule {AUTO!r} is a search that the clock may end, and {jax.process_count()} processes might find "
            "different timetables. Search once, with jaxpar.schedule.find_timetable on the plan's graph and "
            "costs, and give all of them the result: schedule=Timetable.from_text(text, dag=...)."
        )
    split = extra.pop("split_backward", True)
    if (limit := extra.pop("memory_bytes", None)) is None:
        found = [find_timetable(dag, count, plan.with_backwards(split).costs, split_backward=split, **extra)]
    else:  # a backward that is whole keeps less for each micro-batch
        found = []
        for is_split in (False, True) if split else (False,):
            costs = plan.with_backwards(is_split).costs
            most = MemoryLimit.in_bytes(dag, costs, limit)
            found.append(find_timetable(dag, count, costs, split_backward=is_split, memory_limit=most, **extra))
    best = min(found, key=lambda result: result.makespan)
    return best.timetable, best


def _simulated_seconds(arrangement: Arrangement, dag: StageDag, costs: StageCosts) -> float:
    """The makespan of a candidate plan. A timetable that is made for one plan only: plans are compared under 1F1B."""
    later = isinstance(arrangement.schedule, Timetable) or arrangement.schedule == AUTO
    schedule = "1f1b" if later else arrangement.schedule
    extra = {} if later else arrangement.schedule_options
    return simulate(make_timetable(schedule, dag, arrangement.num_microbatches, **extra), costs).makespan


def _lay_out(
    arguments: Arguments, plan: Plan, specs: Sequence[Spec], mesh: Mesh, axes: Axes
) -> tuple[StateLayout, ...]:
    """A layout for each state argument."""
    state, homes = arguments.leaves_of("state"), plan.homes
    layouts, start = [], 0
    for i in arguments.signature.state_argnums:
        tree = arguments.trees[i]
        mine = state[start : start + tree.num_leaves]
        start += tree.num_leaves
        leaves = [(arguments.names[j], arguments.leaves[j].shape, arguments.leaves[j].dtype, specs[j]) for j in mine]
        stages = [homes.stage[j] for j in mine]
        order = {k: (homes.stage[j] or 0, homes.order.get(j, (0, j))) for k, j in enumerate(mine)}
        layouts.append(make_layout(mesh, axes.stage, (tree,), leaves, stages, plan.graph.rank_of, plan.groups, order))
    return tuple(layouts)


def _owners(arguments: Arguments, layouts: Sequence[StateLayout]) -> dict[int, int | None]:
    leaves = [leaf for layout in layouts for leaf in layout.leaves]
    return {i: leaf.stage for i, leaf in zip(arguments.leaves_of("state"), leaves, strict=True)}


def free_spec(x: Any, axes: Axes) -> Spec:
    """A leaf's sharding over the axes that are left to the compiler, as the user has it."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return ()
    entries = [keep_axes(entry, axes.manual) for entry in sharding.spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)
