"""Whether a plan can be run: all that stands in the way, and what would help."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.predict import stage_memory
from jaxpar.schedule.registry import SCHEDULES
from jaxpar.text import format_bytes

if TYPE_CHECKING:
    from jaxpar.plan.pipeline import PipelinePlan

_ROUNDING = 1e-9  # of memory: sums of floats


def check_plan(plan: PipelinePlan) -> None:
    """See `PipelinePlan.check`."""
    schedule_problems = list(_find_schedule_problems(plan))
    problems = [*_find_device_problems(plan), *schedule_problems]
    cycle = find_stage_cycle(plan.graph, plan.stage_of)
    if cycle:
        problems.append(cycle)
    else:
        in_order = list(_find_order_problems(plan))
        problems += in_order
        # What is in flight is known of schedules that can run, and of chains only if they don't wait for themselves.
        if not schedule_problems and not (plan.chain and in_order):
            problems += find_memory_problems(plan)
    if problems:
        raise PlanError(f"the plan of {len(plan.stages)} stages can't be run:\n  " + "\n  ".join(problems))


def find_misfits(plan: PipelinePlan) -> list[str]:
    """Whether the numbers of a plan refer to operators and devices that are there."""
    graph, problems = plan.graph, []
    if plan.microbatch < 1 or plan.num_microbatches < 1:
        problems.append(f"b and M are at least 1, got {plan.microbatch} and {plan.num_microbatches}")
    home: dict[int, int] = {}
    for s, stage in enumerate(plan.stages):
        for what, given, count in (
            ("operators", stage.ops, graph.num_ops),
            ("devices", stage.devices, plan.cluster.num_devices),
        ):
            strange = [i for i in given if not 0 <= i < count]
            if strange:
                problems.append(f"stage {s} has the {what} {strange}, but {what} are 0 ... {count - 1}")
            if not given:
                problems.append(f"stage {s} has no {what}")
            if len(set(given)) < len(given):
                problems.append(f"stage {s} has some {what} more than once: {given}")
        for op in set(stage.ops):
            if 0 <= op < graph.num_ops and home.setdefault(op, s) != s:
                problems.append(f"operator {graph.ops[op].name!r} is in the stages {home[op]} and {s}")
    missing = [op.name for i, op in enumerate(graph.ops) if i not in home]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        problems.append(f"in no stage: {', '.join(map(repr, missing[:5]))}{more}")
    return problems


def _find_device_problems(plan: PipelinePlan) -> Iterator[str]:
    holder: dict[int, int] = {}
    if plan.graph.device:
        try:
            plan.cluster.find_device(plan.graph.device)
        except PlanError as error:
            yield str(error)
    for s, stage in enumerate(plan.stages):
        for device in stage.devices:
            other = holder.setdefault(device, s)
            if plan.stages[other].devices != stage.devices:
                yield (
                    f"device {device} is in the stages {other} and {s}, which have the devices "
                    f"{plan.stages[other].devices} and {stage.devices}: stages share all of their devices or none"
                )
                break
        if plan.microbatch % len(stage.devices):
            yield (
                f"stage {s} has {len(stage.devices)} replicas, which can't share a micro-batch of {plan.microbatch} "
                f"examples evenly: take a multiple of {len(stage.devices)}, or other replicas"
            )


def _find_schedule_problems(plan: PipelinePlan) -> Iterator[str]:
    """Names and options; whether the schedule is for such a stage graph shows when its timetable is made."""
    if plan.schedule not in SCHEDULES:
        yield f"no schedule is called {plan.schedule!r}; known: {', '.join(SCHEDULES)}"
        return
    takes = list(signature(SCHEDULES[plan.schedule]).parameters)[2:]
    if unknown := [option for option in plan.schedule_options if option not in takes]:
        yield f"schedule {plan.schedule!r} takes {', '.join(takes)}, not {', '.join(unknown)}"
    extra = plan.schedule_options.get("extra") or 0
    if extra < 0:
        yield f"extra (micro-batches in flight beyond a stage's depth) is at least 0, got {extra}"


def _find_order_problems(plan: PipelinePlan) -> Iterator[str]:
    for a, b in plan.edges:
        if a > b:
            yield f"stage {a} feeds stage {b}: list stages in a topological order, each after those that feed it"


def find_stage_cycle(graph: OpGraph, stage_of: Sequence[int]) -> str:
    """Why stages can't run one after the other: a path of operators that leaves a stage and comes back; "" if none."""
    crossing = {(stage_of[e.source], stage_of[e.target]): e for e in graph.edges}
    sources: dict[int, set[int]] = {}
    for a, b in crossing:
        if a != b:
            sources.setdefault(b, set()).add(a)
    try:
        tuple(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle: list[int] = error.args[1]
    else:
        return ""
    for stage in sorted(set(cycle)):
        if path := find_way_back(graph, [i for i, s in enumerate(stage_of) if s == stage]):
            names = " -> ".join(f"{graph.ops[i].name!r}" for i in path)
            others = ", ".join(map(str, sorted({stage_of[i] for i in path} - {stage})))
            return f"stage {stage} is not convex: {names} leaves it for stage {others} and comes back"
    steps = []
    for a, b in pairwise(cycle):
        e = crossing[a, b]
        steps.append(f"stage {a} feeds stage {b} by {graph.ops[e.source].name!r} -> {graph.ops[e.target].name!r}")
    return "the stages wait for each other: " + ", ".join(steps)


def find_way_back(graph: OpGraph, ops: Sequence[int]) -> list[int]:
    """A path that leaves a set of operators and comes back to it, one of the shortest; empty if the set is convex."""
    inside = set(ops)
    came_from: dict[int, int] = {}
    queue: deque[int] = deque()
    for op in ops:
        for target in graph.successors[op]:
            if target not in inside and target not in came_from:
                came_from[target] = op
                queue.append(target)
    while queue:
        op = queue.popleft()
        for target in graph.successors[op]:
            if target in inside:
                path = [target, op]
                while path[-1] not in inside:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if target not in came_from:
                came_from[target] = op
                queue.append(target)
    return []


def find_memory_problems(plan: PipelinePlan) -> Iterator[str]:
    """For each rank that needs more memory than its smallest device has: how much, and what would help."""
    for rank, devices in enumerate(plan.rank_devices):
        stages = [s for s, r in enumerate(plan.rank_of) if r == rank]
        need = sum(stage_memory(plan, s, plan.in_flight[s]) for s in stages)
        smallest = min((plan.cluster.devices[d] for d in devices), key=lambda device: device.memory_bytes)
        if need <= smallest.memory_bytes * (1 + _ROUNDING):
            continue
        fixed = sum(stage_memory(plan, s, 0) for s in stages)
        names = f"stage {stages[0]} needs" if len(stages) == 1 else f"the stages {', '.join(map(str, stages))} need"
        flight = ", ".join(str(plan.in_flight[s]) for s in stages)
        limit = smallest.memory_bytes
        yield (
            f"{names} {format_bytes(need)} on each device, {format_bytes(need - limit)} more than the "
            f"{format_bytes(limit)} of {smallest.name}: {format_bytes(fixed)} of state and gradients, the rest for "
            f"{flight} micro-batches of {plan.microbatch} examples in flight. {_suggest(plan, stages, limit)}"
        )


def _suggest(plan: PipelinePlan, stages: Sequence[int], limit: float) -> str:
    """What would make the stages of a rank fit, if anything of a kind would by itself."""

    def fits(changed: PipelinePlan, in_flight: Sequence[int]) -> bool:
        return sum(stage_memory(changed, s, in_flight[s]) for s in stages) <= limit

    ideas = []
    if sum(stage_memory(plan, s, 0) for s in stages) > limit:
        return "Its state alone is too much: cut it into more stages, or shard its state over more devices."
    if fits(plan, plan.depth) and any(plan.depth[s] < plan.in_flight[s] for s in stages):
        ideas.append("no more in flight than the stages downstream (schedule '1f1b' with extra=0)")
    replicas = max(len(stage.devices) for stage in plan.stages)
    for smaller in sorted((d for d in range(1, plan.microbatch) if plan.microbatch % d == 0), reverse=True):
        if smaller % replicas == 0 and fits(replace(plan, microbatch=smaller), plan.in_flight):
            ideas.append(f"micro-batches of {smaller} examples")
            break
    recomputing = [replace(s, recompute=True) if i in stages else s for i, s in enumerate(plan.stages)]
    if fits(replace(plan, stages=tuple(recomputing)), plan.in_flight):
        ideas.append("recomputation (recompute=True)")
    ideas.append("moving operators to other stages, or more replicas")
    return "What would help: " + "; ".join(ideas) + "."


def check_request(graph: OpGraph, cluster: ClusterSpec, batch_size: int, num_devices: int | None = None) -> None:
    """Make sure that what a planner is asked for makes sense.

    Args:
      graph: the program.
      cluster: the machine.
      batch_size: examples in a step.
      num_devices: how many of the cluster's devices to use; None for all.

    Raises:
      PlanError: the batch is empty, the devices aren't there, or there are more than could ever be used: each operator
        on a device of its own, or with a replica for each example.
    """
    problems = []
    wanted = cluster.num_devices if num_devices is None else num_devices
    if batch_size < 1:
        problems.append(f"the batch has {batch_size} examples, but needs at least one")
    if not 1 <= wanted <= cluster.num_devices:
        problems.append(f"{wanted} devices are asked for, and the cluster has {cluster.num_devices}")
    most = graph.num_ops * max(batch_size, 1)
    if wanted > most:
        problems.append(
            f"{wanted} devices are more than can be used: {graph.num_ops} operators with a replica for each of the "
            f"{batch_size} examples take {most}; ask for num_devices={most} or fewer, or a larger batch"
        )
    if graph.device:
        cluster.find_device(graph.device)
    if problems:
        raise PlanError("no plan can be made: " + "; ".join(problems))
