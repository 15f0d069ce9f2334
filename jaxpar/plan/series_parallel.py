"""A graph of operators as a tree of blocks in series and side by side.

By order, not by edges: operator u is before v if a path leads from u to v. A set of operators is

    parallel    if it falls into parts with nothing before anything of another part
    series      if it falls into parts each of which is before *all* of the next

so that an edge that skips over a block changes nothing, and any number of ends may meet any number of starts. Such
orders are the series-parallel ones (Valdes, Tarjan and Lawler 1982, "The recognition of series parallel digraphs", SIAM
J. Comput. 11). What is neither is made a series by cutting it where fewest pairs of operators get an order that they
don't have: each plan of the tree is then one of the graph, since the tree only waits for more.

Blocks that are equal but for their operators' names have the same `key`, so that what is computed for one holds for
all: a key stands for the operators' costs and the bytes that each sends, and for the tree. It doesn't say which
operators an edge joins that skips over parts of a series, so that transfers may be counted as another block's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from jaxpar.plan.op_graph import Op, OpGraph

Form = Literal["leaf", "series", "parallel"]


@dataclass(frozen=True)
class Block:
    """A node of the tree.

    Args:
      form: of its parts; a leaf is one operator and has none.
      parts: in order for a series, each of which is no series; for side by side the equal ones together.
      ops: its operators, those of each part after those of the part before.
      key: equal for blocks that are equal but for names.
    """

    form: Form
    parts: tuple["Block", ...]
    ops: tuple[int, ...]
    key: int

    def groups(self) -> Iterator[tuple["Block", ...]]:
        """The parts in runs of equal ones."""
        return (tuple(equal) for _, equal in groupby(self.parts, lambda part: part.key))


@dataclass
class BlockFactory:
    """Makes blocks, with one key for each different structure.

    Args:
      leaf_kinds: for each operator, anything hashable that is equal for operators that cost the same.
    """

    leaf_kinds: Sequence[object]
    _keys: dict[object, int] = field(default_factory=dict)

    def leaf(self, op: int) -> Block:
        """One operator."""
        return Block("leaf", (), (op,), self._key_of("leaf", self.leaf_kinds[op]))

    def series(self, parts: Sequence[Block]) -> Block:
        """Blocks one after the other."""
        return self._join("series", parts)

    def parallel(self, parts: Sequence[Block]) -> Block:
        """Blocks side by side, equal ones next to each other."""
        flat = [inner for part in parts for inner in (part.parts if part.form == "parallel" else (part,))]
        return self._join("parallel", sorted(flat, key=lambda part: part.key))

    def lockstep(self, blocks: Sequence[Block]) -> Block:
        """Equal blocks as one, whose steps are those of all of them together."""
        first = blocks[0]
        if len(blocks) == 1:
            return first
        if first.form == "series":
            return self.series([self.lockstep(parts) for parts in zip(*(b.parts for b in blocks), strict=True)])
        return self.parallel(blocks)

    def _join(self, form: Form, parts: Sequence[Block]) -> Block:
        flat = [inner for part in parts for inner in (part.parts if part.form == form else (part,))]
        if len(flat) == 1:
            return flat[0]
        ops = tuple(op for part in flat for op in part.ops)
        return Block(form, tuple(flat), ops, self._key_of(form, tuple(part.key for part in flat)))

    def _key_of(self, *structure: object) -> int:
        return self._keys.setdefault(structure, len(self._keys))


def decompose(graph: OpGraph) -> tuple[Block, BlockFactory, bool]:
    """The tree of a graph, what makes more blocks like its own, and whether it has the graph's own order.

    >>> from jaxpar.plan.op_graph import Op
    >>> ops = [Op("in", 1.0), *(Op(f"{side}{i}", 1.0) for side in "ab" for i in (0, 1)), Op("out", 1.0)]
    >>> pairs = "in a0", "a0 a1", "in b0", "b0 b1", "a1 out", "b1 out"
    >>> graph = OpGraph.build(ops, [tuple(pair.split()) for pair in pairs])
    >>> tree, _, faithful = decompose(graph)
    >>> tree.form, [part.form for part in tree.parts], faithful
    ('series', ['leaf', 'parallel', 'leaf'], True)
    >>> a, b = tree.parts[1].parts
    >>> (a.ops, b.ops), a.key == b.key
    (((1, 2), (3, 4)), True)
    """
    factory = BlockFactory([_leaf_kind(graph, i) for i in range(graph.num_ops)])
    splitter = _Splitter(graph, factory)
    tree = splitter.split(graph.order)
    return tree, factory, not splitter.added


def _leaf_kind(graph: OpGraph, op: int) -> object:
    return cost_key(graph.ops[op]), tuple(sorted(graph.edge_bytes[op, target] for target in graph.successors[op]))


def cost_key(op: Op) -> tuple[object, ...]:
    """Equal for operators that are equal but for their names and what they send."""
    curves = (op.forward, op.input_backward, op.weight_backward)
    return op.kind, curves, op.state_bytes, op.gradient_bytes, op.residual_bytes


class _Splitter:
    """Sets of operators are bits of an integer, in the graph's topological order."""

    def __init__(self, graph: OpGraph, factory: BlockFactory):
        self.factory, self.added = factory, 0
        self.before, self.after = [0] * graph.num_ops, [0] * graph.num_ops
        for op in graph.order:
            for source in graph.predecessors[op]:
                self.before[op] |= self.before[source] | 1 << source
        for op in reversed(graph.order):
            for target in graph.successors[op]:
                self.after[op] |= self.after[target] | 1 << target

    def split(self, ops: Sequence[int]) -> Block:
        """The tree of operators that are given in a topological order."""
        if len(ops) == 1:
            return self.factory.leaf(ops[0])
        for divide, join in (
            (self._series, self.factory.series),
            (self._parallel, self.factory.parallel),
            (self._complete, self.factory.series),
        ):
            parts: list[list[int]] = divide(ops)
            if len(parts) > 1:
                make: Callable[[Sequence[Block]], Block] = join
                return make([self.split(part) for part in parts])
        raise AssertionError("a set of two operators or more can always be cut")

    def _series(self, ops: Sequence[int]) -> list[list[int]]:
        """Cut wherever all that come first are before all that come later."""
        whole = sum(1 << op for op in ops)
        parts: list[list[int]] = [[]]
        common = whole  # what is before all the later ones
        later = []
        for op in reversed(ops):
            later.append(common)
            common &= self.before[op]
        later.reverse()  # later[i]: what is before all of ops[i + 1:]
        first = 0
        for op, common in zip(ops, later, strict=True):
            parts[-1].append(op)
            first |= 1 << op
            if first & common == first and first != whole:
                parts.append([])
        return parts

    def _parallel(self, ops: Sequence[int]) -> list[list[int]]:
        """The parts with no order between them."""
        left = sum(1 << op for op in ops)
        parts = []
        while left:
            part = fringe = left & -left
            left ^= part
            while fringe:
                op = (fringe & -fringe).bit_length() - 1
                fringe &= fringe - 1
                found = (self.before[op] | self.after[op]) & left
                left ^= found
                part |= found
                fringe |= found
            parts.append([op for op in ops if part >> op & 1])
        return parts

    def _complete(self, ops: Sequence[int]) -> list[list[int]]:
        """Cut in two at a level, or before or after one operator, where the added order is least for its size."""
        best: tuple[float, int] | None = None
        for first in self._candidates(ops):
            size = first.bit_count()
            rest = [op for op in ops if not first >> op & 1]
            added = sum((first & ~self.before[op]).bit_count() for op in rest)
            share = added / (size * len(rest))
            if best is None or share < best[0] * (1 - 1e-9):
                best = share, first
        assert best is not None
        self.added += 1
        return [[op for op in ops if best[1] >> op & 1], [op for op in ops if not best[1] >> op & 1]]

    def _candidates(self, ops: Sequence[int]) -> Iterator[int]:
        """Down-sets of a set of operators, the empty one and the whole left out."""
        inside = sum(1 << op for op in ops)
        level: dict[int, int] = {}
        for op in ops:
            above = self.before[op] & inside
            level[op] = 1 + max((level[u] for u in ops if above >> u & 1), default=0) if above else 0
        found = {sum(1 << op for op in ops if level[op] < cut): None for cut in range(1, max(level.values()) + 1)}
        for op in ops:
            found[self.before[op] & inside | 1 << op] = None
            found[inside & ~self.after[op] & ~(1 << op)] = None
        return (first for first in found if first and first != inside)
