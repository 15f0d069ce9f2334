"""GraphPipe's dynamic programme over the series-parallel tree, on matrices.

Jeon et al. 2025, https://arxiv.org/abs/2406.17145. For a bottleneck T and a block X of the tree let

    X[k, e] = the fewest devices with which all of X's stages take at most T and fit into memory,
              if what X feeds has depth k, and X itself is at most e deep

where depth counts stages on the longest path to a sink, which decides how many micro-batches are in flight. Then

    one stage       X[k, e] = devices(X, depth k + 1)                                     e > k
    in series       (X then Y)[k, e] = min over d of Y[k, d] + X[d, e]                    downstream first
    side by side    X[k, e] = sum of the parts' [k, e]                                    the deepest part counts

which are the product, the sum and the minimum of matrices over (min, +). The stages of the paper are blocks, or runs of
a series' parts. Beside those, here a stage may hold several branches; equal branches may go through their steps
together, several to a stage; and the ends (or heads) of branches may be in one stage with what comes after (or before).

A matrix is computed once for each different structure: k equal branches cost no more than one, but for the choice of
how many of them go together. Where memory is no concern only depth differences count, and one row is enough.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxpar.plan.planners.base import Stage
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.stage_prices import FAR, Counts, Pricing, StageSets, StageTable
from jaxpar.plan.planners.tree_shapes import TreeShapes, join_ops
from jaxpar.plan.series_parallel import Block


@dataclass
class TreeSearch:
    """The programme for one micro-batch size.

    Args:
      shapes: of the tree.
      pricing: of the micro-batch size.
      deepest: the largest depth looked at.
    """

    shapes: TreeShapes
    pricing: Pricing
    deepest: int
    _tables: dict[int, StageTable] = field(default_factory=dict)

    def solve(self, limit: float, deepest: int | None = None) -> list[Stage] | None:
        """Stages of at most `limit` seconds a micro-batch with the least depth; None if the devices don't do.

        Args:
          limit: seconds.
          deepest: how deep they may be; `self.deepest` if not given.
        """
        solution = TreeSolution(self, limit)
        depths = np.flatnonzero(solution.by_depth <= self.pricing.num_devices)
        if not len(depths) or depths[0] > (self.deepest if deepest is None else deepest):
            return None
        return solution.read(int(depths[0]))

    def solve_deeper(self, limit: float, most: int = 4) -> list[list[Stage]]:
        """As `solve`, and deeper plans that do with fewer devices; the least depth first."""
        solution, found = TreeSolution(self, limit), list[list[Stage]]()
        fewest = self.pricing.num_devices + 1
        for depth, devices in enumerate(solution.by_depth):
            if devices < fewest and len(found) < most:
                fewest = devices
                found.append(solution.read(depth))
        return found

    def table(self, block: Block) -> StageTable:
        """Prices of the stages that a block may be made of."""
        if block.key not in self._tables:
            self._tables[block.key] = self.pricing.price(self._sets(block))
        return self._tables[block.key]

    def is_free(self, block: Block) -> bool:
        """Whether memory stops no stage of a block at any depth looked at."""
        return self.table(block).is_free(self.deepest)

    def _sets(self, block: Block) -> StageSets:
        if block.form == "leaf":
            return StageSets.of(self.shapes.graph, [block.ops])
        return (self.shapes.series(block) if block.form == "series" else self.shapes.parallel(block)).sets


class TreeSolution:
    """Matrices for one bottleneck; `by_depth[e]` is the fewest devices with a plan at most e stages deep."""

    def __init__(self, search: TreeSearch, limit: float):
        self.search, self.shapes, self.limit = search, search.shapes, limit
        self.size = search.deepest + 1
        self._stages: dict[int, Counts] = {}
        self._steps: dict[int, Counts] = {}  # of a series, from each part on; of branches, of the first so many
        self._matrices: dict[int, Counts] = {}
        self.by_depth = self._solve_rows(self.shapes.tree, 1)[0]

    def read(self, depth: int) -> list[Stage]:
        """The stages of a plan that is at most so deep, with `by_depth[depth]` devices."""
        return list(self._read(self.shapes.tree, 0, depth))

    def _matrix(self, block: Block) -> Counts:
        """`int[size, size]`, see the module."""
        if block.key not in self._matrices:
            free = self.search.is_free(block)
            rows = self._solve_rows(block, 1 if free else self.size)
            self._matrices[block.key] = _shift_down(rows[0], self.size) if free else rows
        return self._matrices[block.key]

    def _solve_rows(self, block: Block, rows: int) -> Counts:
        """The first rows of the matrix: the steps that lead to it are kept for `read`."""
        if block.key not in self._stages:
            self._stages[block.key] = self.search.table(block).fewest_devices(self.limit, self.size - 1)
        if block.form == "leaf":
            return self._stand_alone(self._stages[block.key], rows)[0]
        solve = self._solve_series if block.form == "series" else self._solve_parallel
        self._steps[block.key] = steps = solve(block, rows)
        return steps[0] if block.form == "series" else steps[-1]

    def _stand_alone(self, devices: Counts, rows: int) -> Counts:
        """`int[S, rows, size]`: each of some stages as a block, one deeper than what it feeds."""
        found = np.full((len(devices), rows, self.size), FAR, dtype=np.int32)
        for k in range(min(rows, self.size - 1)):
            found[:, k, k + 1 :] = devices[:, k + 1, None]
        return found

    def _nothing(self, rows: int) -> Counts:
        return np.where(np.arange(self.size) >= np.arange(rows)[:, None], 0, FAR).astype(np.int32)

    def _solve_series(self, block: Block, rows: int) -> Counts:
        """`int[parts + 1, rows, size]`: the parts from each on."""
        shape, devices = self.shapes.series(block), self._stages[block.key]
        count = len(block.parts)
        steps = np.full((count + 1, rows, self.size), FAR, dtype=np.int32)
        steps[count] = self._nothing(rows)
        backs: dict[tuple[int, int], Counts] = {}
        for first in reversed(range(count)):
            here = steps[first]
            here[:, 1:] = (steps[first + 1 :, :, :-1] + devices[shape.runs[first], None, 1:]).min(axis=0)
            part = block.parts[first]
            if part.form != "leaf":
                np.minimum(here, _multiply(steps[first + 1], self._matrix(part)), out=here)
            for c, cut in enumerate(shape.cuts[first]):
                if first + 1 < count:
                    tail = self._step_tail(steps, devices, shape.tails[first, c], first)
                    if (tail < FAR).any():
                        np.minimum(here, _multiply(tail, self._matrix(cut.front)), out=here)
                if first:
                    backs[first, c] = _multiply(steps[first + 1], self._matrix(cut.back))
            for (p, c), back in backs.items():
                if p > first:
                    here[:, 1:] = np.minimum(here[:, 1:], back[:, :-1] + devices[shape.heads[p, c][first], 1:])
            np.minimum(np.minimum.accumulate(here, axis=1), FAR, out=here)
        return steps

    def _step_tail(self, steps: Counts, devices: Counts, stages: range, first: int) -> Counts:
        """One stage of the back of a cut with some parts after it, and what follows."""
        tail = np.full_like(steps[first], FAR)
        tail[:, 1:] = (steps[first + 2 :, :, :-1] + devices[stages, None, 1:]).min(axis=0)
        return np.minimum(np.minimum.accumulate(tail, axis=1), FAR)

    def _solve_parallel(self, block: Block, rows: int) -> Counts:
        """`int[parts + 1, rows, size]`: the first so many branches."""
        shape, devices = self.shapes.parallel(block), self._stages[block.key]
        alone = self._stand_alone(devices, rows)
        steps = [self._nothing(rows)]
        for last, part in enumerate(block.parts):
            here = steps[-1] + self._matrix(part)[:rows]
            stages = shape.rows[last]
            if stages:
                np.minimum(here, (np.stack(steps[: len(stages)]) + alone[stages]).min(axis=0), out=here)
            for together in self._lockstep_sizes(block, last):
                joint = self.shapes.factory.lockstep(block.parts[last + 1 - together : last + 1])
                np.minimum(here, steps[last + 1 - together] + self._matrix(joint)[:rows], out=here)
            steps.append(np.minimum(here, FAR))
        return np.stack(steps)

    def _lockstep_sizes(self, block: Block, last: int) -> Iterator[int]:
        """How many equal branches, up to the last of them, may go through their steps together: even shares of all."""
        part = block.parts[last]
        if part.form != "series" or not self.shapes.wide:
            return
        before = sum(other.key == part.key for other in block.parts[: last + 1])
        whole = sum(other.key == part.key for other in block.parts)
        for size in sorted({-(-whole // shares) for shares in range(1, whole)}):
            if 2 <= size <= before:
                yield size

    def _read(self, block: Block, k: int, e: int) -> Iterator[Stage]:
        """The stages of one block at `[k, e]`."""
        if block is not self.shapes.tree and self.search.is_free(block):
            k, e = 0, e - k
        if block.form == "leaf":
            yield block.ops, self._choose(block, 0, k + 1)
        elif block.form == "series":
            yield from self._read_series(block, k, e)
        else:
            yield from self._read_parallel(block, k, e)

    def _choose(self, block: Block, stage: int, depth: int) -> Variant:
        return self.search.table(block).choose(stage, self.limit, depth)

    def _read_series(self, block: Block, k: int, e: int) -> Iterator[Stage]:
        steps, first = self._steps[block.key], 0
        while first < len(block.parts):
            stages, first, e = next(self._list_ways(block, steps, first, k, e))
            yield from stages

    def _list_ways(
        self, block: Block, steps: Counts, first: int, k: int, e: int
    ) -> Iterator[tuple[list[Stage], int, int]]:
        """The ways that reach `steps[first][k, e]`: their stages, the part to go on with, and its depth."""
        shape, devices = self.shapes.series(block), self._stages[block.key]
        value = steps[first, k, e]
        e = int(np.argmax(steps[first, k] == value))  # no deeper than needed
        parts, count = block.parts, len(block.parts)
        for last in reversed(range(first, count)):
            row = shape.runs[first][last - first]
            if e and steps[last + 1, k, e - 1] + devices[row, e] == value:
                yield [(join_ops(parts[first : last + 1]), self._choose(block, row, e))], last + 1, e - 1
        if parts[first].form != "leaf":
            for d in range(k, e):
                if steps[first + 1, k, d] + self._matrix(parts[first])[d, e] == value:
                    yield list(self._read(parts[first], d, e)), first + 1, d
        for p in range(first, count):
            for c, cut in enumerate(self.shapes.list_cuts(parts[p]) if shape.cuts[p] else ()):
                if p == first:
                    yield from self._list_tails(block, steps, shape.tails[p, c], (p, cut.front, cut.back), k, e)
                elif e:
                    row = shape.heads[p, c][first]
                    back = _multiply(steps[p + 1, k : k + 1], self._matrix(cut.back))[0]
                    if back[e - 1] + devices[row, e] == value:
                        stage = (*join_ops(parts[first:p]), *cut.front.ops), self._choose(block, row, e)
                        d = next(
                            d for d in range(e) if steps[p + 1, k, d] + self._matrix(cut.back)[d, e - 1] == back[e - 1]
                        )
                        yield [stage, *self._read(cut.back, d, e - 1)], p + 1, d

    def _list_tails(
        self, block: Block, steps: Counts, stages: range, cut: tuple[int, Block, Block], k: int, e: int
    ) -> Iterator[tuple[list[Stage], int, int]]:
        p, front, back = cut
        devices, value = self._stages[block.key], steps[p, k, e]
        for last in range(p + 1, len(block.parts)):
            row = stages[last - p - 1]
            for d in range(1, e):
                if steps[last + 1, k, d - 1] + devices[row, d] + self._matrix(front)[d, e] == value:
                    stage = (*back.ops, *join_ops(block.parts[p + 1 : last + 1])), self._choose(block, row, d)
                    yield [*self._read(front, d, e), stage], last + 1, d - 1

    def _read_parallel(self, block: Block, k: int, e: int) -> Iterator[Stage]:
        steps, shape = self._steps[block.key], self.shapes.parallel(block)
        devices, end = self._stages[block.key], len(block.parts)
        while end:
            value, last = steps[end, k, e], end - 1
            rows = shape.rows[last]
            alone = [i for i, row in enumerate(rows) if steps[i, k, e] + devices[row, k + 1] == value]
            joint = [q for q in self._lockstep_sizes(block, last) if self._is_lockstep(block, steps, end, q, k, e)]
            if alone:
                yield join_ops(block.parts[alone[0] : end]), self._choose(block, rows[alone[0]], k + 1)
                end = alone[0]
            elif joint:
                yield from self._read(self.shapes.factory.lockstep(block.parts[end - joint[-1] : end]), k, e)
                end -= joint[-1]
            else:
                yield from self._read(block.parts[last], k, e)
                end = last

    def _is_lockstep(self, block: Block, steps: Counts, end: int, together: int, k: int, e: int) -> bool:
        joint = self.shapes.factory.lockstep(block.parts[end - together : end])
        return bool(steps[end - together, k, e] + self._matrix(joint)[k, e] == steps[end, k, e])


def _multiply(left: Counts, right: Counts) -> Counts:
    """The product over (min, +) of `int[rows, size]` and `int[size, size]`."""
    return np.minimum((left[:, :, None] + right).min(axis=1), FAR)


def _shift_down(row: Counts, size: int) -> Counts:
    """The matrix whose entries depend on `e - k` alone."""
    difference = np.arange(size) - np.arange(size)[:, None]
    return np.where(difference >= 0, row[np.maximum(difference, 0)], FAR).astype(np.int32)
