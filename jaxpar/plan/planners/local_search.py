"""From good plans to better ones by small changes: operators to other stages, stages joined or cut, devices moved.

A best-first search: of all plans seen, the one with the least estimate whose neighbours weren't looked at comes next.
Its effort is counted in plans, not in seconds, so that it gives the same on every machine.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.step_model import BottleneckModel, Part, Sketch, StepModel


@dataclass(frozen=True)
class Moves:
    """The neighbours of a plan.

    Args:
      graph: the operators.
      replicas: how many devices a stage may have.
      microbatches: sizes of micro-batches.
      num_devices: how many devices may be used.
      recompute: whether stages may recompute.
    """

    graph: OpGraph
    replicas: Sequence[int]
    microbatches: Sequence[int]
    num_devices: int
    recompute: bool

    @cached_property
    def before(self) -> tuple[int, ...]:
        """For each operator, all from which a path leads to it, as bits."""
        found = [0] * self.graph.num_ops
        for op in self.graph.order:
            for source in self.graph.predecessors[op]:
                found[op] |= found[source] | 1 << source
        return tuple(found)

    @cached_property
    def after(self) -> tuple[int, ...]:
        """For each operator, all to which a path leads from it."""
        found = [0] * self.graph.num_ops
        for op in reversed(self.graph.order):
            for target in self.graph.successors[op]:
                found[op] |= found[target] | 1 << target
        return tuple(found)

    @cached_property
    def near(self) -> tuple[int, ...]:
        """For each operator, those that it reads or that read it, and those that read what it reads."""
        found = []
        for op in range(self.graph.num_ops):
            sources, targets = self.graph.predecessors[op], self.graph.successors[op]
            siblings = [t for s in sources for t in self.graph.successors[s]]
            siblings += [s for t in targets for s in self.graph.predecessors[t]]
            found.append(sum(1 << other for other in {*sources, *targets, *siblings} - {op}))
        return tuple(found)

    def of(self, sketch: Sketch) -> Iterator[Sketch]:
        """All neighbours, valid or not."""
        yield from self._move_operators(sketch)
        yield from self._change_devices(sketch)
        yield from self._merge(sketch)
        yield from self._split(sketch)
        yield from self._change_sizes(sketch)

    def _pieces(self, members: int) -> list[int]:
        """What may leave a stage: an operator, or one with all before it, or after it, in the stage."""
        found: dict[int, None] = {}
        rest = members
        while rest:
            op = (rest & -rest).bit_length() - 1
            rest &= rest - 1
            for piece in (1 << op, (self.before[op] & members) | 1 << op, (self.after[op] & members) | 1 << op):
                if piece != members:
                    found[piece] = None
        return list(found)

    def _move_operators(self, sketch: Sketch) -> Iterator[Sketch]:
        parts = sketch.parts
        for s, (members, devices, recompute) in enumerate(parts):
            for piece in self._pieces(members):
                near, rest = self._near(piece), (members & ~piece, devices, recompute)
                for t, (other, theirs, again) in enumerate(parts):
                    if t != s and (other & near or len(parts) <= 6):
                        yield self._replace(sketch, {s: rest, t: (other | piece, theirs, again)})

    def _near(self, piece: int) -> int:
        found = 0
        while piece:
            found |= self.near[(piece & -piece).bit_length() - 1]
            piece &= piece - 1
        return found

    def _change_devices(self, sketch: Sketch) -> Iterator[Sketch]:
        parts = sketch.parts
        for s, (members, devices, recompute) in enumerate(parts):
            if self.recompute:
                yield self._replace(sketch, {s: (members, devices, not recompute)})
            for d in self._steps(devices, sketch.microbatch):
                changed = members, d, recompute
                yield self._replace(sketch, {s: changed})
                if d > devices:
                    for t, (other, theirs, again) in enumerate(parts):
                        for fewer in self._steps(theirs, sketch.microbatch):
                            if t != s and fewer < theirs:
                                yield self._replace(sketch, {s: changed, t: (other, fewer, again)})

    def _steps(self, devices: int, microbatch: int) -> list[int]:
        """The next replica counts below and above."""
        possible = [d for d in self.replicas if microbatch % d == 0]
        below, above = [d for d in possible if d < devices], [d for d in possible if d > devices]
        return below[-1:] + above[:1]

    def _merge(self, sketch: Sketch) -> Iterator[Sketch]:
        parts = sketch.parts
        for s, t in itertools.combinations(range(len(parts)), 2):
            (members, devices, recompute), (other, more, again) = parts[s], parts[t]
            for d in [d for d in self.replicas if d <= devices + more and sketch.microbatch % d == 0][-2:]:
                kept = [part for i, part in enumerate(parts) if i not in (s, t)]
                yield Sketch.of(sketch.microbatch, [*kept, (members | other, d, recompute and again)])

    def _split(self, sketch: Sketch) -> Iterator[Sketch]:
        free = self.num_devices - sketch.devices
        for s, (members, devices, recompute) in enumerate(sketch.parts):
            ways = list(self._divide_devices(devices, free, sketch.microbatch))
            kept = [*sketch.parts[:s], *sketch.parts[s + 1 :]]
            for piece in self._pieces(members):
                for here, there in ways:
                    pair = (members & ~piece, here, recompute), (piece, there, recompute)
                    yield Sketch.of(sketch.microbatch, [*kept, *pair])

    def _divide_devices(self, devices: int, free: int, microbatch: int) -> Iterator[tuple[int, int]]:
        """Pairs that use what there is, or what the stage had, to the full."""
        possible = [d for d in self.replicas if microbatch % d == 0]
        for here in possible:
            there = [d for d in possible if here + d <= devices + free]
            yield from ((here, d) for d in there[-2:])

    def _change_sizes(self, sketch: Sketch) -> Iterator[Sketch]:
        at = list(self.microbatches).index(sketch.microbatch)
        for size in (*self.microbatches[max(at - 1, 0) : at], *self.microbatches[at + 1 : at + 2]):
            if all(size % devices == 0 for _, devices, _ in sketch.parts):
                yield Sketch(size, sketch.parts)

    @staticmethod
    def _replace(sketch: Sketch, changes: dict[int, Part]) -> Sketch:
        return Sketch.of(sketch.microbatch, [changes.get(i, part) for i, part in enumerate(sketch.parts)])


def improve(
    model: StepModel | BottleneckModel, moves: Moves, starts: Sequence[Sketch], effort: int
) -> dict[Sketch, float]:
    """The plans seen, with their estimates, the best first; those that can't be run are left out.

    Args:
      model: what estimates them.
      moves: their neighbours.
      starts: plans to begin with.
      effort: how many plans to estimate.
    """
    seen = {sketch: model.estimate(sketch) for sketch in starts}
    ticket = itertools.count()
    queue = [(value, next(ticket), sketch) for sketch, value in seen.items() if value < float("inf")]
    heapq.heapify(queue)
    while queue and len(seen) < effort:
        _, _, sketch = heapq.heappop(queue)
        for neighbour in moves.of(sketch):
            if neighbour not in seen:
                value = seen[neighbour] = model.estimate(neighbour)
                if value < float("inf"):
                    heapq.heappush(queue, (value, next(ticket), neighbour))
    ranked = sorted((value, place) for place, value in enumerate(seen.values()) if value < float("inf"))
    sketches = list(seen)
    return {sketches[place]: value for value, place in ranked}
