"""Every way to divide a small graph of operators into stages that form a graph without cycles.

A division is good if and only if the graph of its stages has no cycle; each stage is then convex, as a way out of it
and back would be one. The operators are taken in topological order, each put into one of the stages so far or a new
one, so that each division comes once, whatever order its stages are in. An edge between stages, once there, stays, and
a stage only grows: what is too much for a part of a division is too much for the whole, which is how `admits` prunes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxpar.plan.op_graph import OpGraph


@dataclass(frozen=True)
class Division:
    """Stages of the operators placed so far.

    Args:
      stages: the operators of each, as the bits of an integer.
      feeds: for each stage, the stages that it feeds, as bits.
      depth: for each stage, the stages on the longest path from it to a stage that feeds none, itself included.
    """

    stages: tuple[int, ...]
    feeds: tuple[int, ...]
    depth: tuple[int, ...]

    def order(self) -> tuple[int, ...]:
        """The stages, each after those that feed it."""
        return tuple(sorted(range(len(self.stages)), key=lambda k: (-self.depth[k], self.stages[k])))


def iterate_divisions(
    graph: OpGraph, max_stages: int, admits: Callable[[Division], bool] = lambda _: True
) -> Iterator[Division]:
    """All divisions into at most `max_stages` stages, each once.

    Args:
      graph: small: the number of divisions grows faster than exponentially.
      max_stages: the most stages.
      admits: asked after each operator; what it refuses is not pursued. It must refuse only what it would refuse with
        more operators in the stages, and with more stages.

    >>> from jaxpar.plan.op_graph import Op
    >>> chain = OpGraph.build([Op("a", 1.0), Op("b", 1.0), Op("c", 1.0)], [("a", "b"), ("b", "c")])
    >>> sorted(division.stages for division in iterate_divisions(chain, 3))
    [(1, 2, 4), (1, 6), (3, 4), (7,)]
    """
    order = graph.order
    sources = [graph.predecessors[op] for op in order]

    def extend(place: int, division: Division, stage_of: dict[int, int]) -> Iterator[Division]:
        if place == len(order):
            yield division
            return
        op, count = order[place], len(division.stages)
        for stage in range(min(count + 1, max_stages)):
            before = {stage_of[p] for p in sources[place]} - {stage}
            larger = _put(division, 1 << op, stage, before)
            if larger is not None and admits(larger):
                yield from extend(place + 1, larger, {**stage_of, op: stage})

    return extend(0, Division((), (), ()), {})


def _put(division: Division, op: int, stage: int, before: set[int]) -> Division | None:
    """The division with an operator put into `stage`, fed by the stages `before`; None if that makes a cycle."""
    stages, feeds = list(division.stages), list(division.feeds)
    if stage == len(stages):
        stages.append(op)
        feeds.append(0)
    else:
        stages[stage] |= op
        if before & _reach(feeds, stage):
            return None
    if all(feeds[source] >> stage & 1 for source in before) and stage < len(division.stages):
        return Division(tuple(stages), division.feeds, division.depth)
    for source in before:
        feeds[source] |= 1 << stage
    return Division(tuple(stages), tuple(feeds), _count_depth(feeds))


def _reach(feeds: Sequence[int], stage: int) -> set[int]:
    reached, todo = set(), [stage]
    while todo:
        mask = feeds[todo.pop()]
        for other in range(len(feeds)):
            if mask >> other & 1 and other not in reached:
                reached.add(other)
                todo.append(other)
    return reached


def _count_depth(feeds: Sequence[int]) -> tuple[int, ...]:
    depth = [0] * len(feeds)

    def of(stage: int) -> int:
        if not depth[stage]:
            mask = feeds[stage]
            depth[stage] = 1 + max((of(k) for k in range(len(feeds)) if mask >> k & 1), default=0)
        return depth[stage]

    return tuple(of(stage) for stage in range(len(feeds)))
