"""What all planners have in common: how they are called, and how sets of operators become a plan on devices."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.chain_stages import Variant

Stage = tuple[tuple[int, ...], Variant]  # operators, and how they are run


Planner = Callable[..., PipelinePlan]
"""`(graph, cluster, batch_size, **options) -> PipelinePlan`; options are keywords, those of `plan` and its own."""


def order_stages(graph: OpGraph, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages in a topological order of their graph; branch after branch, the first operator deciding where it is free.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op("a", 1.0), Op("b", 1.0)], [("b", "a")])
    >>> order_stages(graph, [((0,), Variant(1)), ((1,), Variant(2))])
    (((1,), Variant(devices=2, recompute=False)), ((0,), Variant(devices=1, recompute=False)))
    """
    home = {op: s for s, (ops, _) in enumerate(stages) for op in ops}
    sources: list[set[int]] = [set() for _ in stages]
    for edge in graph.edges:
        if home[edge.source] != home[edge.target]:
            sources[home[edge.target]].add(home[edge.source])
    rank = {op: i for i, op in enumerate(graph.order)}
    first = [min(rank[op] for op in ops) for ops, _ in stages]
    order: list[int] = []
    placed: set[int] = set()
    while len(order) < len(stages):
        ready = [s for s in range(len(stages)) if s not in placed and sources[s] <= placed]
        # After what was placed last if it goes on, so that a branch is next to itself; else the first in the program.
        order.append(min(ready, key=lambda s: (not (order and order[-1] in sources[s]), first[s])))
        placed.add(order[-1])
    return tuple(stages[s] for s in order)


def place_in_order(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Device ids one after the other.

    >>> place_in_order([1, 2])
    ((0,), (1, 2))
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))


def place_aligned(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Device ids such that the large stages come first: powers of two then start at multiples of themselves, so that no
    stage of up to a node's size is in two nodes.

    >>> place_aligned([1, 2])
    ((2,), (0, 1))
    """
    order = sorted(range(len(sizes)), key=lambda s: -sizes[s])
    placed = dict(zip(order, place_in_order([sizes[s] for s in order]), strict=True))
    return tuple(placed[s] for s in range(len(sizes)))


def make_plan(
    graph: OpGraph,
    cluster: ClusterSpec,
    stages: Sequence[Stage],
    microbatch: int,
    num_microbatches: int,
    schedule: str = "1f1b",
    schedule_options: Mapping[str, Any] | None = None,
    *,
    aligned: bool = False,
    planner: str = "",
) -> PipelinePlan:
    """A plan of stages with neighbouring devices.

    Args:
      graph, cluster: what is planned for what.
      stages: in any order.
      microbatch, num_microbatches: b and M.
      schedule, schedule_options: the timetable; 1F1B with as many in flight as the depth by default.
      aligned: see `place_aligned`.
      planner: who made it.
    """
    ordered = order_stages(graph, stages)
    sizes = [variant.devices for _, variant in ordered]
    devices = place_aligned(sizes) if aligned else place_in_order(sizes)
    planned = tuple(PlannedStage(ops, ids, way.recompute) for (ops, way), ids in zip(ordered, devices, strict=True))
    options = {"extra": 0} if schedule_options is None and schedule == "1f1b" else dict(schedule_options or {})
    return PipelinePlan(graph, cluster, planned, microbatch, num_microbatches, schedule, options, planner)


def check_options(name: str, planner: Planner, options: Mapping[str, Any]) -> None:
    """Make sure that a planner knows its options.

    Raises:
      PlanError: names each unknown option, and those that there are.
    """
    parameters = inspect.signature(planner).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if unknown := [key for key in options if key not in known]:
        raise PlanError(f"planner {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
