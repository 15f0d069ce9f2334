"""Whether a program is still the one that a plan was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpar.errors import PlanError
from jaxpar.plan.op_graph import OpGraph

if TYPE_CHECKING:
    from jaxpar.plan.pipeline import PipelinePlan


def check_program(plan: PipelinePlan, graph: OpGraph) -> None:
    """See `PipelinePlan.check_program`."""
    changes: dict[str, list[str]] = {}
    for s, stage in enumerate(plan.stages):
        for i in stage.ops:
            if change := _find_change(plan.graph, i, graph):
                changes.setdefault(f"stage {s}", []).append(change)
    new = [repr(op.name) for op in graph.ops if op.name not in plan.graph.index]
    if new:
        changes["in no stage"] = [f"{name} is new" for name in new]
    if changes:
        lines = [f"{where}: {_join_some(what)}" for where, what in changes.items()]
        raise PlanError(
            "the plan is for another program than this one:\n  "
            + "\n  ".join(lines)
            + "\nPlan it again, or load the plan for the program that it was made for"
        )


def _find_change(old: OpGraph, i: int, graph: OpGraph) -> str:
    """What has become of operator `i` of the old graph; "" if nothing."""
    name = old.ops[i].name
    if name not in graph.index:
        return f"{name!r} is gone"
    j = graph.index[name]
    if old.ops[i].kind and graph.ops[j].kind and old.ops[i].kind != graph.ops[j].kind:
        return f"{name!r} computes something else"
    before = {old.ops[p].name for p in old.predecessors[i]}
    after = {graph.ops[p].name for p in graph.predecessors[j]}
    if before != after:
        parts = [
            f"{verb} {', '.join(map(repr, sorted(names)))}"
            for verb, names in (("no longer", before - after), ("now also", after - before))
            if names
        ]
        return f"{name!r} reads {' and '.join(parts)}"
    return ""


def _join_some(texts: Sequence[str], most: int = 4) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
