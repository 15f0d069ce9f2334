"""Plans changed by hand: operators moved, stages merged and split. Each gives a new plan, or says why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from jaxpar.errors import PlanError
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.plan_check import find_stage_cycle

if TYPE_CHECKING:
    from jaxpar.plan.pipeline import PipelinePlan, PlannedStage


def sort_stages(graph: OpGraph, stages: Sequence[PlannedStage]) -> tuple[PlannedStage, ...]:
    """The stages in a topological order; where there is a choice, in the order given.

    Raises:
      PlanError: they form a cycle, and through which operators.
    """
    stage_of = [0] * graph.num_ops
    for s, stage in enumerate(stages):
        for op in stage.ops:
            stage_of[op] = s
    if problem := find_stage_cycle(graph, stage_of):
        raise PlanError(problem)
    sorter: TopologicalSorter[int] = TopologicalSorter({s: set() for s in range(len(stages))})
    for e in graph.edges:
        if stage_of[e.source] != stage_of[e.target]:
            sorter.add(stage_of[e.target], stage_of[e.source])
    sorter.prepare()
    order: list[int] = []
    ready: list[int] = []
    while len(order) < len(stages):
        ready = sorted([*ready, *sorter.get_ready()])
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return tuple(stages[s] for s in order)


def move_ops(plan: PipelinePlan, homes: dict[int, int]) -> PipelinePlan:
    """The plan with each operator of `homes` in the stage that it gives; see `PipelinePlan.move`."""
    strange = sorted({s for s in homes.values() if not 0 <= s < len(plan.stages)})
    if strange:
        raise PlanError(f"there is no stage {', '.join(map(str, strange))}: stages are 0 ... {len(plan.stages) - 1}")
    members: list[list[int]] = [[] for _ in plan.stages]
    for op, stage in enumerate(plan.stage_of):
        members[homes.get(op, stage)].append(op)
    if empty := [s for s, ops in enumerate(members) if not ops]:
        raise PlanError(
            f"the move leaves stage {', '.join(map(str, empty))} without operators: to give it up, merge it into "
            f"another with plan.merge({empty[0]}, ...)"
        )
    stages = [replace(stage, ops=tuple(ops)) for stage, ops in zip(plan.stages, members, strict=True)]
    return _edit(plan, stages, "after the move, ")


def merge_stages(plan: PipelinePlan, first: int, second: int, devices: Sequence[int] | None = None) -> PipelinePlan:
    """See `PipelinePlan.merge`."""
    _check_stage(plan, first, second)
    if first == second:
        raise PlanError(f"a merge takes two stages, got {first} twice")
    a, b = plan.stages[first], plan.stages[second]
    chosen = tuple(dict.fromkeys((*a.devices, *b.devices))) if devices is None else tuple(devices)
    merged = replace(a, ops=(*a.ops, *b.ops), devices=chosen, recompute=a.recompute and b.recompute)
    stages = [merged if s == first else stage for s, stage in enumerate(plan.stages) if s != second]
    return _edit(plan, stages, f"with the stages {first} and {second} as one, ")


def split_stage(plan: PipelinePlan, stage: int, ops: Sequence[int], devices: Sequence[int]) -> PipelinePlan:
    """See `PipelinePlan.split`."""
    _check_stage(plan, stage)
    whole = plan.stages[stage]
    if strange := [plan.graph.ops[op].name for op in ops if op not in whole.ops]:
        raise PlanError(f"stage {stage} can't give away {', '.join(map(repr, strange))}, which it doesn't hold")
    rest = tuple(op for op in whole.ops if op not in ops)
    kept = tuple(d for d in whole.devices if d not in devices)
    if not rest or not ops:
        raise PlanError(f"a split of stage {stage} gives away some of its {len(whole.ops)} operators, got {len(ops)}")
    if not kept:
        raise PlanError(
            f"stage {stage} has the devices {whole.devices} and keeps none: the new stage takes some of them, or others"
        )
    parts = [replace(whole, ops=rest, devices=kept), replace(whole, ops=tuple(ops), devices=tuple(devices))]
    stages = [*plan.stages[:stage], *parts, *plan.stages[stage + 1 :]]
    return _edit(plan, stages, f"with stage {stage} split, ")


def _check_stage(plan: PipelinePlan, *stages: int) -> None:
    for s in stages:
        if not 0 <= s < len(plan.stages):
            raise PlanError(f"there is no stage {s}: stages are 0 ... {len(plan.stages) - 1}")


def _edit(plan: PipelinePlan, stages: Sequence[PlannedStage], when: str) -> PipelinePlan:
    try:
        ordered = sort_stages(plan.graph, stages)
    except PlanError as error:
        raise PlanError(f"{when}{error}") from error
    planner = plan.planner if plan.planner.endswith("edited") else f"{plan.planner}, edited".removeprefix(", ")
    return replace(plan, stages=ordered, planner=planner, notes=())  # the notes are about the plan as it was
