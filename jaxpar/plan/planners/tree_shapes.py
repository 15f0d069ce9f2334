"""What stages the blocks of a series-parallel tree may be made of, beside those of their parts.

In a series, each run of its parts; side by side, several whole branches, neighbours in the order in which the tree has
them, so that equal ones are together; and where branches meet (or part), their ends (or heads) with what comes after
(or before) them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.stage_prices import StageSets
from jaxpar.plan.series_parallel import Block, BlockFactory

_MOST_CUTS = 24  # of one parallel block


@dataclass(frozen=True)
class Cut:
    """Branches cut in two: the part that comes first, and the rest."""

    front: Block
    back: Block


@dataclass(frozen=True)
class SeriesShape:
    """The stages that a series may have, beside those within its parts; `rows` index `sets`.

    Args:
      sets: all of them.
      runs: `rows[first][last - first]`: whole parts, from the first to the last.
      cuts: for each part, the ways to cut it, if it is parallel.
      tails: `[part, cut]`: the back of a cut with the parts after it, up to each later one.
      heads: `[part, cut]`: the front of a cut with the parts before it, from each earlier one.
    """

    sets: StageSets
    runs: tuple[range, ...]
    cuts: tuple[tuple[Cut, ...], ...]
    tails: dict[tuple[int, int], range]
    heads: dict[tuple[int, int], range]


@dataclass(frozen=True)
class ParallelShape:
    """The stages that hold several whole branches: `rows[last][first]`, first up to last."""

    sets: StageSets
    rows: tuple[range, ...]


@dataclass
class TreeShapes:
    """What blocks may be made of; the same for all micro-batch sizes and bottlenecks."""

    graph: OpGraph
    tree: Block
    factory: BlockFactory
    wide: bool = True  # with stages that hold pieces of several branches; the paper's alone without
    _known: dict[int, SeriesShape | ParallelShape] = field(default_factory=dict)

    def series(self, block: Block) -> SeriesShape:
        if block.key not in self._known:
            self._known[block.key] = self._list_series(block)
        shape = self._known[block.key]
        assert isinstance(shape, SeriesShape)
        return shape

    def parallel(self, block: Block) -> ParallelShape:
        if block.key not in self._known:
            parts, sets, rows = block.parts, list[tuple[int, ...]](), []
            for last in range(len(parts)):
                firsts = range(last + 1) if self.wide else [0] * (last == len(parts) - 1)
                rows.append(range(len(sets), len(sets) + len(firsts)))
                sets += [join_ops(parts[first : last + 1]) for first in firsts]
            self._known[block.key] = ParallelShape(StageSets.of(self.graph, sets), tuple(rows))
        shape = self._known[block.key]
        assert isinstance(shape, ParallelShape)
        return shape

    def _list_series(self, block: Block) -> SeriesShape:
        parts, sets, runs = block.parts, list[tuple[int, ...]](), []
        for first in range(len(parts)):
            runs.append(range(len(sets), len(sets) + len(parts) - first))
            sets += [join_ops(parts[first : last + 1]) for last in range(first, len(parts))]
        cuts = tuple(tuple(self.list_cuts(part)) for part in parts)
        tails, heads = {}, {}
        for p, ways in enumerate(cuts):
            for c, cut in enumerate(ways):
                more = [(*cut.back.ops, *join_ops(parts[p + 1 : last + 1])) for last in range(p + 1, len(parts))]
                tails[p, c] = range(len(sets), len(sets) + len(more))
                sets += more
                more = [(*join_ops(parts[first:p]), *cut.front.ops) for first in range(p)]
                heads[p, c] = range(len(sets), len(sets) + len(more))
                sets += more
        return SeriesShape(StageSets.of(self.graph, sets), tuple(runs), cuts, tails, heads)

    def list_cuts(self, block: Block) -> Iterator[Cut]:
        """All branches cut so many steps from their ends or heads; some branches as a whole on either side."""
        if block.form != "parallel" or not self.wide:
            return
        seen: set[tuple[int, int]] = set()
        for front, back in self._divide(block):
            if front and back:
                cut = Cut(self.factory.parallel(front), self.factory.parallel(back))
                if (cut.front.key, cut.back.key) not in seen and len(seen) < _MOST_CUTS:
                    seen.add((cut.front.key, cut.back.key))
                    yield cut

    def _divide(self, block: Block) -> Iterator[tuple[list[Block], list[Block]]]:
        branches = [part.parts if part.form == "series" else (part,) for part in block.parts]
        longest = max(len(steps) for steps in branches)
        for count in range(1, longest):
            at = [max(len(steps) - count, 0) for steps in branches]
            yield self._cut_at(branches, at)
            yield self._cut_at(branches, [min(count, len(steps)) for steps in branches])
        edges = [i for i in range(1, len(block.parts)) if block.parts[i].key != block.parts[i - 1].key]
        for i in sorted({*edges, 1, len(block.parts) - 1}):
            yield list(block.parts[:i]), list(block.parts[i:])
            yield list(block.parts[i:]), list(block.parts[:i])
        for count in range(1, longest):  # one branch alone gives its end, or its head
            for i in sorted({*edges, 0}):
                whole = [len(steps) for steps in branches]
                none = [0] * len(branches)
                yield self._cut_at(branches, [*whole[:i], max(whole[i] - count, 0), *whole[i + 1 :]])
                yield self._cut_at(branches, [*none[:i], min(count, whole[i]), *none[i + 1 :]])

    def _cut_at(self, branches: Sequence[Sequence[Block]], at: Sequence[int]) -> tuple[list[Block], list[Block]]:
        pairs = [(steps[:i], steps[i:]) for steps, i in zip(branches, at, strict=True)]
        fronts = [self.factory.series(front) for front, _ in pairs if front]
        return fronts, [self.factory.series(back) for _, back in pairs if back]


def join_ops(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The operators of blocks, in their order."""
    return tuple(op for block in blocks for op in block.ops)
