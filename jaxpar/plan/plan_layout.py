"""Where the stages of a plan go in its picture: columns by depth, and in a column an order with few crossings.

Layered drawing of a graph: Sugiyama, Tagawa, Toda 1981, "Methods for visual understanding of hierarchical system
structures". Edges over several columns get a place in each of them, so that they pass between the boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxpar.schedule.dag import Edge, StageDag

_SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Columns from 0 at the left, heights downwards in the unit of the heights given.

    Args:
      column: of each stage, its distance in depth from the deepest.
      middle: of each stage, where its middle is.
      bends: of each edge over several columns, `(column, middle)` of the places that it passes through.
      height: of the whole.
    """

    column: tuple[int, ...]
    middle: tuple[float, ...]
    bends: Mapping[Edge, tuple[tuple[int, float], ...]]
    height: float

    @property
    def num_columns(self) -> int:
        """How many columns."""
        return max(self.column) + 1


def lay_out(dag: StageDag, heights: Sequence[float], gap: float) -> Layout:
    """Place the stages of a graph.

    Args:
      dag: the stage graph.
      heights: of each stage's box.
      gap: between two boxes of a column.

    >>> diamond = StageDag(4, ((0, 1), (0, 2), (1, 3), (2, 3)), (), (0, 1, 2, 3), 4, has_backward=False)
    >>> layout = lay_out(diamond, [1.0] * 4, gap=0.5)
    >>> layout.column, layout.middle
    ((0, 1, 1, 2), (1.25, 0.5, 2.0, 1.25))
    """
    column = [max(dag.depth) - depth for depth in dag.depth]
    sizes, chains = list(heights), {}
    for a, b in dag.forward:
        passed = list(range(len(sizes), len(sizes) + column[b] - column[a] - 1))
        chains[a, b] = [a, *passed, b]
        column += range(column[a] + 1, column[b])
        sizes += [0.0] * len(passed)
    above: list[list[int]] = [[] for _ in sizes]
    below: list[list[int]] = [[] for _ in sizes]
    for chain in chains.values():
        for a, b in pairwise(chain):
            below[a].append(b)
            above[b].append(a)
    columns = [[i for i, c in enumerate(column) if c == at] for at in range(max(column) + 1)]
    middle = _place(columns, above, below, sizes, gap)
    bends = {edge: tuple((column[i], middle[i]) for i in chain[1:-1]) for edge, chain in chains.items()}
    height = max(m + size / 2 for m, size in zip(middle, sizes, strict=True))
    stages = dag.num_stages
    return Layout(tuple(column[:stages]), tuple(middle[:stages]), bends, height)


def _place(
    columns: list[list[int]], above: list[list[int]], below: list[list[int]], sizes: list[float], gap: float
) -> list[float]:
    """The middle of each box: sweeps to and fro, in which each goes to the mean of its neighbours, without overlaps."""
    middle = [0.0] * len(sizes)
    for boxes in columns:
        _stack(boxes, middle, sizes, gap)
    for sweep in range(2 * _SWEEPS):
        forwards = sweep % 2 == 0
        for boxes in columns if forwards else reversed(columns):
            for i in boxes:
                near = above[i] if forwards else below[i]
                if near:
                    middle[i] = sum(middle[j] for j in near) / len(near)
            boxes.sort(key=lambda i: middle[i])
            _push_apart(boxes, middle, sizes, gap)
    top = min(m - size / 2 for m, size in zip(middle, sizes, strict=True))
    return [m - top for m in middle]


def _stack(boxes: Sequence[int], middle: list[float], sizes: Sequence[float], gap: float) -> None:
    at = 0.0
    for i in boxes:
        middle[i] = at + sizes[i] / 2
        at += sizes[i] + gap


def _push_apart(boxes: Sequence[int], middle: list[float], sizes: Sequence[float], gap: float) -> None:
    """Move boxes that overlap as little as can be: groups that touch stand around the mean of where they want to be."""
    groups: list[tuple[list[int], list[float], float]] = []  # boxes, their middles from the first one's, the first's
    for i in boxes:
        members, offsets, first = [i], [0.0], middle[i]
        while groups:
            before, their_offsets, their_first = groups[-1]
            apart = (sizes[before[-1]] + sizes[members[0]]) / 2 + gap
            if their_first + their_offsets[-1] + apart <= first + 1e-9:
                break
            groups.pop()
            shift = their_offsets[-1] + apart
            count = len(before) + len(members)
            first = (len(before) * their_first + len(members) * (first - shift)) / count
            members, offsets = before + members, [*their_offsets, *(shift + x for x in offsets)]
        groups.append((members, offsets, first))
    for members, offsets, first in groups:
        for i, offset in zip(members, offsets, strict=True):
            middle[i] = first + offset
