"""From good plans to better ones by small changes: operators to other stages, stages joined or cut, devices moved.

A best-first search: of all plans seen, the one with the least estimate whose neighbours weren't looked at comes next.
Its effort is counted in plans, not in seconds, so that it gives the same on every machine.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jaxpar.plan.down_sets import members_of
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.step_model import BottleneckModel, Part, Sketch, StepModel
from jaxpar.plan.series_parallel import cost_key


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
        yield from self._change_equal_stages(sketch)
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

    def _change_equal_stages(self, sketch: Sketch) -> Iterator[Sketch]:
        """All stages that are equal at once, those of equal branches above all: one alone would change nothing."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for s, (members, devices, recompute) in enumerate(sketch.parts):
            groups.setdefault((self._kind_of(members), devices, recompute), []).append(s)
        for equal in groups.values():
            _, devices, recompute = sketch.parts[equal[0]]
            ways = [(d, recompute) for d in self._steps(devices, sketch.microbatch)]
            for d, again in ways + [(devices, not recompute)] * self.recompute if len(equal) > 1 else ():
                yield self._replace(sketch, {s: (sketch.parts[s][0], d, again) for s in equal})

    def _kind_of(self, members: int) -> tuple[int, ...]:
        return tuple(sorted(self._kinds[op] for op in members_of(members)))

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        """A number for each operator, equal for those that cost the same."""
        numbers: dict[object, int] = {}
        return tuple(numbers.setdefault(cost_key(op), len(numbers)) for op in self.graph.ops)

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


@dataclass
class LocalSearch:
    """What has been seen so far; goes on where it stopped.

    Args:
      model: what estimates plans.
      moves: their neighbours.
      seen: the plans seen, with their estimates, infinite for those that can't be run.
    """

    model: StepModel | BottleneckModel
    moves: Moves
    seen: dict[Sketch, float] = field(default_factory=dict)
    _queue: list[tuple[float, int, Sketch]] = field(default_factory=list)

    def add(self, sketches: Iterable[Sketch]) -> None:
        """Plans to look around."""
        for sketch in sketches:
            if sketch not in self.seen:
                value = self.seen[sketch] = self.model.estimate(sketch)
                if value < math.inf:
                    heapq.heappush(self._queue, (value, len(self.seen), sketch))

    def run(self, effort: int) -> dict[Sketch, float]:
        """Estimate some `effort` plans more, and give all that can be run, the best first."""
        most = len(self.seen) + effort
        while self._queue and len(self.seen) < most:
            _, _, sketch = heapq.heappop(self._queue)
            self.add(self.moves.of(sketch))
        ranked = sorted((value, n) for n, value in enumerate(self.seen.values()) if value < math.inf)
        sketches = list(self.seen)
        return {sketches[n]: value for value, n in ranked}
