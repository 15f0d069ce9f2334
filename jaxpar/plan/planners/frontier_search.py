"""The same programme over down-sets of the graph, for graphs of any form: exact where all down-sets are listed.

A division into stages without cycles is a chain of down-sets (what is left to do), each stage what lies between two of
them; so for a bottleneck T, from the sinks on,

    h(U) = fewest devices for the operators outside of the down-set U
         = min over down-sets V > U of h(V) + devices(V - U)

Depth is not that of the chain: stages that don't feed each other are side by side. So where memory matters, or depth is
asked for, a down-set has several labels, (devices, depth of each of the stages that something in U feeds), of which
those are left out that are no better than another in anything. Down-sets explode on wide graphs; a family of them, such
as the prefixes of one order, gives stages along that order, still with the depth of the true stage graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jaxpar.plan.down_sets import list_prefixes, members_of
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.base import Stage
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.stage_prices import FAR, Counts, Pricing, StageSets, StageTable


@dataclass(frozen=True)
class Frontiers:
    """A family of down-sets and the pairs of them, one within the other.

    Args:
      graph: the operators.
      cuts: the down-sets as bits, those within another before it; the first is empty, the last is everything.
      pairs: `int[P, 2]`, indices of the smaller and the larger down-set of each pair.
      stage_of_pair: `int[P]`, the row of `sets` with what lies between.
      sets: what lies between, each once.
    """

    graph: OpGraph
    cuts: tuple[int, ...]
    pairs: NDArray[np.int32]
    stage_of_pair: NDArray[np.int32]
    sets: StageSets
    bits: tuple[int, ...]  # of each row of `sets`

    @classmethod
    def of(cls, graph: OpGraph, cuts: Sequence[int]) -> "Frontiers":
        """All pairs of the given down-sets."""
        pairs, stages, rows = [], [], dict[int, int]()
        for i, small in enumerate(cuts):
            for j in range(i + 1, len(cuts)):
                if cuts[j] & small == small:
                    pairs.append((i, j))
                    stages.append(rows.setdefault(cuts[j] ^ small, len(rows)))
        sets = StageSets.of(graph, [members_of(bits) for bits in rows])
        return cls(graph, tuple(cuts), np.array(pairs, np.int32), np.array(stages, np.int32), sets, tuple(rows))

    @classmethod
    def of_order(cls, graph: OpGraph, order: Sequence[int]) -> "Frontiers":
        """The prefixes of an order of the operators."""
        return cls.of(graph, list_prefixes(order))

    @cached_property
    def by_start(self) -> tuple[NDArray[np.intp], ...]:
        """For each down-set, the pairs of which it is the smaller."""
        order = np.argsort(self.pairs[:, 0], kind="stable")
        return tuple(np.split(order, np.searchsorted(self.pairs[order, 0], np.arange(1, len(self.cuts)))))

    @cached_property
    def by_end(self) -> tuple[NDArray[np.intp], ...]:
        """For each down-set, the pairs of which it is the larger."""
        order = np.argsort(self.pairs[:, 1], kind="stable")
        return tuple(np.split(order, np.searchsorted(self.pairs[order, 1], np.arange(1, len(self.cuts)))))

    @cached_property
    def fed(self) -> tuple[tuple[int, ...], ...]:
        """For each down-set, the operators outside of it that something inside feeds."""
        found = []
        for cut in self.cuts:
            targets = {t for op in members_of(cut) for t in self.graph.successors[op] if not cut >> t & 1}
            found.append(tuple(sorted(targets)))
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """For each stage, the operators outside that it feeds, as bits."""
        return tuple(
            sum(1 << t for t in {t for op in members_of(bits) for t in self.graph.successors[op]} if not bits >> t & 1)
            for bits in self.bits
        )


@dataclass(frozen=True)
class Label:
    """One way to do all outside of a down-set.

    Args:
      devices: how many it has.
      depth: of the stage of each operator that the down-set feeds, in the order of `Frontiers.fed`.
      cut: the down-set.
      stage, variant: its first stage; None of a plan with none.
      rest: what comes after.
    """

    devices: int
    depth: tuple[int, ...]
    cut: int
    stage: int = -1
    stage_depth: int = 0
    variant: Variant | None = None
    rest: "Label | None" = None


@dataclass
class FrontierSearch:
    """The programme for one micro-batch size.

    Args:
      frontiers: the down-sets.
      pricing: of the micro-batch size.
      deepest: the largest depth looked at.
      most_labels: how many labels a down-set keeps: None for all, which is exact.
    """

    frontiers: Frontiers
    pricing: Pricing
    deepest: int
    most_labels: int | None = None
    _tables: list[StageTable] = field(default_factory=list)

    @property
    def table(self) -> StageTable:
        """Prices of the stages."""
        if not self._tables:
            self._tables.append(self.pricing.price(self.frontiers.sets))
        return self._tables[0]

    def solve(self, limit: float, deepest: int | None = None) -> list[Stage] | None:
        """Stages of at most `limit` seconds a micro-batch, with the fewest devices, and at most `deepest` in a row.

        None if there are none for the devices there are, or (with `most_labels`) none were found.
        """
        deepest = self.deepest if deepest is None else deepest
        devices = self.table.fewest_devices(limit, 1)[:, 1][self.frontiers.stage_of_pair]
        after, before = self._sweep(devices)
        if after[0] > self.pricing.num_devices:
            return None
        if self.table.is_free(self.deepest) and deepest >= self.deepest:
            return self._read_chain(devices, after, limit)
        useful = devices + after[self.frontiers.pairs[:, 1]] + before[self.frontiers.pairs[:, 0]]
        return self._search_labels(limit, deepest, useful <= self.pricing.num_devices, before)

    def _sweep(self, devices: Counts) -> tuple[Counts, Counts]:
        """Fewest devices outside and inside of each down-set, as if memory were what it is at depth 1."""
        frontiers = self.frontiers
        after = np.full(len(frontiers.cuts), FAR, dtype=np.int32)
        before = after.copy()
        after[-1] = before[0] = 0
        for cut in reversed(range(len(frontiers.cuts) - 1)):
            pairs = frontiers.by_start[cut]
            after[cut] = min((after[frontiers.pairs[pairs, 1]] + devices[pairs]).min(initial=FAR), FAR)
        for cut in range(1, len(frontiers.cuts)):
            pairs = frontiers.by_end[cut]
            before[cut] = min((before[frontiers.pairs[pairs, 0]] + devices[pairs]).min(initial=FAR), FAR)
        return after, before

    def _read_chain(self, devices: Counts, after: Counts, limit: float) -> list[Stage]:
        stages, cut = [], 0
        while cut < len(after) - 1:
            pairs = self.frontiers.by_start[cut]
            # Of those with as few devices the largest stage, which leaves fewest.
            pair = next(p for p in pairs[::-1] if after[self.frontiers.pairs[p, 1]] + devices[p] == after[cut])
            row = int(self.frontiers.stage_of_pair[pair])
            stages.append((members_of(self.frontiers.bits[row]), self.table.choose(row, limit, 1)))
            cut = int(self.frontiers.pairs[pair, 1])
        return stages

    def _search_labels(
        self, limit: float, deepest: int, useful: NDArray[np.bool_], before: Counts
    ) -> list[Stage] | None:
        fewest = self.table.fewest_devices(limit, deepest)
        kept: list[list[Label]] = [[] for _ in self.frontiers.cuts]
        kept[-1] = [Label(0, (), len(kept) - 1)]
        most = self.pricing.num_devices
        for cut in reversed(range(len(kept) - 1)):
            found: dict[tuple[int, tuple[int, ...]], Label] = {}
            for pair in self.frontiers.by_start[cut]:
                if useful[pair]:
                    row = int(self.frontiers.stage_of_pair[pair])
                    for rest in kept[self.frontiers.pairs[pair, 1]]:
                        label = self._extend(cut, row, rest, fewest[row], deepest)
                        if label and label.devices + before[cut] <= most:
                            found.setdefault((label.devices, label.depth), label)
            kept[cut] = _leave_best(list(found.values()), self.most_labels)
        if not kept[0]:
            return None
        return list(self._read_labels(kept[0][0], limit))

    def _extend(self, cut: int, row: int, rest: Label, fewest: Counts, deepest: int) -> Label | None:
        depths = dict(zip(self.frontiers.fed[rest.cut], rest.depth, strict=True))
        targets = self.frontiers.targets[row]
        depth = 1 + max((d for op, d in depths.items() if targets >> op & 1), default=0)
        if depth > deepest or fewest[depth] >= FAR:
            return None
        fed = tuple(depths.get(op, depth) for op in self.frontiers.fed[cut])
        return Label(rest.devices + int(fewest[depth]), fed, cut, row, depth, None, rest)

    def _read_labels(self, label: Label, limit: float) -> Iterator[Stage]:
        here: Label | None = label
        while here is not None and here.stage >= 0:
            yield members_of(self.frontiers.bits[here.stage]), self.table.choose(here.stage, limit, here.stage_depth)
            here = here.rest


def _leave_best(labels: list[Label], most: int | None) -> list[Label]:
    """Those that no other one is at least as good as, in devices and all depths; the ones with fewest devices first."""
    labels.sort(key=lambda label: (label.devices, sum(label.depth), label.depth))
    best: list[Label] = []
    for label in labels:
        if not any(all(a <= b for a, b in zip(other.depth, label.depth, strict=True)) for other in best):
            best.append(label)
            if len(best) == most:
                break
    return best
