"""A graph of few blocks from one of many operators, so that planners stay fast.

Blocks are convex, and no two of them feed each other, so every plan of the blocks is one of the operators. An operator
joins the block of all its inputs, up to a weight that is the same everywhere: equal branches are cut alike. If there
are still too many, blocks are merged where that can't close a cycle: with the only one that reads them, and with
neighbours of their level, which no path joins to them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.errors import PlanError
from jaxpar.plan.op_graph import Op, OpEdge, OpGraph
from jaxpar.plan.time_curve import TimeCurve


@dataclass(frozen=True)
class Coarsening:
    """Blocks of operators.

    Args:
      original: the operators.
      graph: the blocks; a block's bytes and seconds are the sums of its members'.
      members: for each block, its operators.
    """

    original: OpGraph
    graph: OpGraph
    members: tuple[tuple[int, ...], ...]

    def expand(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """The operators of some blocks, in order."""
        return tuple(sorted(op for block in blocks for op in self.members[block]))


def coarsen(graph: OpGraph, max_ops: int) -> Coarsening:
    """Merge operators into at most `max_ops` blocks.

    Blocks are as even in their seconds of forward and backward for one example as that allows. Near-linear in the
    number of operators.

    Raises:
      PlanError: `max_ops` is less than 1.

    >>> graph = OpGraph.build([Op(f"op{i}", 1.0) for i in range(6)], [(f"op{i}", f"op{i + 1}") for i in range(5)])
    >>> coarsen(graph, 3).members
    ((0, 1), (2, 3), (4, 5))
    """
    if max_ops < 1:
        raise PlanError(f"a graph has at least one block, got max_ops={max_ops}")
    if graph.num_ops <= max_ops:
        return Coarsening(graph, graph, tuple((op,) for op in range(graph.num_ops)))
    weights = [float(x) for x in graph.forward_seconds(1) + graph.backward_seconds(1)]
    home = _merge_chains(graph, weights, max_ops)
    home = _merge_rest(graph, home, weights, max_ops)
    return _build(graph, home)


def _merge_chains(graph: OpGraph, weights: Sequence[float], max_ops: int) -> list[int]:
    """The block of each operator, at the least weight limit (within 5 %) that gives few enough, if one does."""
    total = sum(weights)
    low, high = 0.0, max(total, 1e-300) * (1 + 1e-9)
    best = _join_inputs(graph, weights, high)
    if _count(best) > max_ops:
        return best
    while low == 0 or high > low * 1.05:
        middle = (low + high) / 2 if low else high / 2
        home = _join_inputs(graph, weights, middle)
        if _count(home) <= max_ops:
            best, high = home, middle
        else:
            low = middle
        if high < total * 1e-9:
            break
    return best


def _join_inputs(graph: OpGraph, weights: Sequence[float], limit: float) -> list[int]:
    """Each operator joins the block that all of its inputs are in, if the two weigh no more than the limit."""
    home, weight = [-1] * graph.num_ops, dict[int, float]()
    for op in graph.order:
        blocks = {home[source] for source in graph.predecessors[op]}
        block = blocks.pop() if len(blocks) == 1 else op
        if block != op and weight[block] + weights[op] > limit:
            block = op
        home[op] = block
        weight[block] = weight.get(block, 0.0) + weights[op]
    return home


def _count(home: Sequence[int]) -> int:
    return len(set(home))


def _merge_rest(graph: OpGraph, home: list[int], weights: Sequence[float], max_ops: int) -> list[int]:
    """In rounds: blocks with their only reader, then neighbours of one level, the lightest first; until few enough."""
    while _count(home) > max_ops:
        quotient = _Quotient(graph, home, weights)
        merged = quotient.merge_into_readers(max_ops) or quotient.merge_levels(max_ops)
        home = [merged[block] for block in home]
    return home


class _Quotient:
    """The graph of the blocks."""

    def __init__(self, graph: OpGraph, home: Sequence[int], weights: Sequence[float]):
        self.blocks = sorted(set(home))
        self.weight = dict.fromkeys(self.blocks, 0.0)
        for op, block in enumerate(home):
            self.weight[block] += weights[op]
        self.readers: dict[int, set[int]] = {block: set() for block in self.blocks}
        for edge in graph.edges:
            if home[edge.source] != home[edge.target]:
                self.readers[home[edge.source]].add(home[edge.target])
        self.level = dict.fromkeys(self.blocks, 0)
        waits_for = dict.fromkeys(self.blocks, 0)
        for readers in self.readers.values():
            for reader in readers:
                waits_for[reader] += 1
        ready = [block for block in self.blocks if not waits_for[block]]
        for block in ready:
            for reader in sorted(self.readers[block]):
                self.level[reader] = max(self.level[reader], self.level[block] + 1)
                waits_for[reader] -= 1
                if not waits_for[reader]:
                    ready.append(reader)

    def merge_into_readers(self, max_ops: int) -> dict[int, int]:
        """Light blocks with the only one that reads them; a block takes part in one merge. Empty if there are none."""
        limit = 2 * sum(self.weight.values()) / max_ops
        single = [b for b in self.blocks if len(self.readers[b]) == 1]
        pairs = sorted((self.weight[b] + self.weight[r], b, r) for b in single for r in self.readers[b])
        return self._merge([(a, b) for weight, a, b in pairs if weight <= limit], max_ops)

    def merge_levels(self, max_ops: int) -> dict[int, int]:
        """The lightest blocks of one level in pairs: no path joins them. Where each is alone, those of two levels."""
        by_level: dict[int, list[int]] = {}
        for block in sorted(self.blocks, key=lambda b: (self.weight[b], b)):
            by_level.setdefault(self.level[block], []).append(block)
        pairs = [pair for blocks in by_level.values() for pair in zip(blocks[::2], blocks[1::2], strict=False)]
        if not pairs:  # one block a level: a chain, with edges that skip
            chain = [by_level[level][0] for level in sorted(by_level)]
            pairs = list(zip(chain[::2], chain[1::2], strict=False))
        pairs.sort(key=lambda pair: (self.weight[pair[0]] + self.weight[pair[1]], pair))
        return self._merge(pairs, max_ops)  # edges still go from lower levels to higher ones, so there is no cycle

    def _merge(self, pairs: Sequence[tuple[int, int]], max_ops: int) -> dict[int, int]:
        merged = {block: block for block in self.blocks}
        used: set[int] = set()
        surplus = len(self.blocks) - max_ops
        for a, b in pairs:
            if surplus and a not in used and b not in used:
                used |= {a, b}
                merged[a] = merged[b] = min(a, b)
                surplus -= 1
        return merged if used else {}


def _build(graph: OpGraph, home: Sequence[int]) -> Coarsening:
    """Blocks in a topological order of the operators that they end with."""
    groups: dict[int, list[int]] = {}
    for op in graph.order:
        groups.setdefault(home[op], []).append(op)
    members = list(groups.values())
    block_of = {op: i for i, ops in enumerate(members) for op in ops}
    values: dict[tuple[int, int], float] = {}
    for edge in graph.edges:
        target = block_of[edge.target]
        if block_of[edge.source] != target:
            values[edge.source, target] = max(edge.bytes, values.get((edge.source, target), 0.0))
    sizes: dict[tuple[int, int], float] = {}
    for (source, target), size in values.items():
        pair = block_of[source], target
        sizes[pair] = sizes.get(pair, 0.0) + size
    edges = tuple(OpEdge(a, b, size) for (a, b), size in sorted(sizes.items()))
    ops = [_sum_ops([graph.ops[i] for i in ops]) for ops in members]
    return Coarsening(graph, OpGraph(tuple(ops), edges, graph.device), tuple(tuple(sorted(m)) for m in members))


def _sum_ops(ops: Sequence[Op]) -> Op:
    """One operator that does the work of all."""
    if len(ops) == 1:
        return ops[0]
    total = lambda what: math.fsum(getattr(op, what) for op in ops)
    return Op(
        f"{ops[0].name} .. {ops[-1].name}",
        forward=TimeCurve.sum(op.forward for op in ops),
        input_backward=TimeCurve.sum(op.input_backward for op in ops),
        weight_backward=TimeCurve.sum(op.weight_backward for op in ops),
        parameter_bytes=total("parameter_bytes"),
        state_bytes=total("state_bytes"),
        gradient_bytes=total("gradient_bytes"),
        residual_bytes=total("residual_bytes"),
        output_bytes=ops[-1].output_bytes,
        kind=" + ".join(op.kind for op in ops) if all(op.kind for op in ops) else "",
    )
