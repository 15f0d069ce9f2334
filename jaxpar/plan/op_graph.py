"""What a planner is given of a program: operators with their costs, and the bytes between them."""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from jaxpar.errors import PlanError
from jaxpar.plan.time_curve import TimeCurve

Numbers = NDArray[np.float64]

_CURVES = ("forward", "input_backward", "weight_backward")
_BYTES = ("parameter_bytes", "state_bytes", "gradient_bytes", "residual_bytes", "output_bytes")


@dataclass(frozen=True, init=False)
class Op:
    """One operator, or a block of them that is never cut.

    Args:
      name: unique in its graph; module paths such as `GPT/layer_0/mlp` let pins and tables use their prefixes.
      forward: seconds of the forward for n examples at once. A plain number is seconds per example.
      input_backward: seconds of the part of the backward that leads to the cotangents of its inputs ("I").
      weight_backward: seconds of the part that leads only to gradients ("W"); the whole backward is I + W.
      parameter_bytes: of its weights.
      state_bytes: of its weights and optimizer state; by default three times its weights, as Adam has it.
      gradient_bytes: of its gradient accumulator, which its replicas add up; by default as many as its weights.
      residual_bytes: kept from the forward to the backward, per example.
      output_bytes: of its value, per example; what an edge carries unless the edge says otherwise.
      kind: the same for operators that compute the same thing; "" if nothing is known.

    Raises:
      PlanError: a number is negative, infinite or NaN; all such numbers of this operator are named.

    >>> Op("mlp", forward=1e-4, input_backward=1e-4, weight_backward=1e-4, parameter_bytes=8e6).state_bytes
    24000000.0
    """

    name: str
    forward: TimeCurve
    input_backward: TimeCurve
    weight_backward: TimeCurve
    parameter_bytes: float
    state_bytes: float
    gradient_bytes: float
    residual_bytes: float
    output_bytes: float
    kind: str

    def __init__(
        self,
        name: str,
        forward: TimeCurve | float,
        input_backward: TimeCurve | float = 0.0,
        weight_backward: TimeCurve | float = 0.0,
        parameter_bytes: float = 0.0,
        state_bytes: float | None = None,
        gradient_bytes: float | None = None,
        residual_bytes: float = 0.0,
        output_bytes: float = 0.0,
        kind: str = "",
    ):
        problems = []
        for what, given in zip(_CURVES, (forward, input_backward, weight_backward), strict=True):
            try:
                curve = given if isinstance(given, TimeCurve) else TimeCurve.per_example(given)
                object.__setattr__(self, what, curve)
            except PlanError as error:
                problems.append(f"{what}: {error}")
        state_bytes = 3 * parameter_bytes if state_bytes is None else state_bytes
        gradient_bytes = parameter_bytes if gradient_bytes is None else gradient_bytes
        sizes = (parameter_bytes, state_bytes, gradient_bytes, residual_bytes, output_bytes)
        for what, size in zip(_BYTES, sizes, strict=True):
            if not 0 <= size < math.inf:
                problems.append(f"{what} is {size:g}, but must be finite and at least 0")
            object.__setattr__(self, what, float(size))
        if problems:
            raise PlanError(f"operator {name!r}: " + "; ".join(problems))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "kind", kind)

    @property
    def has_backward(self) -> bool:
        """Whether its backward takes any time."""
        return bool(self.input_backward) or bool(self.weight_backward)


@dataclass(frozen=True)
class OpEdge:
    """The value of operator `source` is read by operator `target`; its cotangent comes back the same way.

    Args:
      source: index of the operator that makes the value.
      target: index of the one that reads it.
      bytes: of what is read, per example. A cotangent has as many.
    """

    source: int
    target: int
    bytes: float


@dataclass(frozen=True)
class OpGraph:
    """A program as a planner sees it: operators in a graph without cycles.

    Equal by value. One value is sent to a stage once, however many operators read it there: from operator u to a set T
    of operators go `max(bytes of u -> v, v in T)` bytes per example.

    Args:
      ops: the operators.
      edges: who reads whose value.
      device: name of the `DeviceSpec` that the times are for; "" if they are for whatever device there is.

    Raises:
      PlanError: names each duplicate name, each edge that is out of range, repeated, a self-loop or has negative or NaN
        bytes, and a cycle if there is one.

    >>> ops = [Op("embed", 1.0, output_bytes=8), Op("left", 2.0), Op("right", 2.0), Op("join", 1.0)]
    >>> edges = [("embed", "left"), ("embed", "right"), ("left", "join", 4), ("right", "join", 4)]
    >>> graph = OpGraph.build(ops, edges)
    >>> graph.successors[graph.index["embed"]], graph.forward_seconds(2)
    ((1, 2), array([2., 4., 4., 2.]))
    """

    ops: tuple[Op, ...]
    edges: tuple[OpEdge, ...]
    device: str = ""
    _seconds: dict[tuple[str, float], Numbers] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(self.ops))
        object.__setattr__(self, "edges", tuple(self.edges))
        problems = list(_find_problems(self))
        if not problems and len(self.order) < len(self.ops):
            cycle = " -> ".join(repr(self.ops[i].name) for i in _find_cycle(self))
            problems.append(f"the operators form a cycle: {cycle}")
        if problems:
            raise PlanError(f"not a graph of {len(self.ops)} operators:\n  " + "\n  ".join(problems))

    @classmethod
    def build(
        cls, ops: Iterable[Op], edges: Iterable[tuple[str, str] | tuple[str, str, float]], device: str = ""
    ) -> OpGraph:
        """Make a graph by names.

        Args:
          ops: the operators.
          edges: `(source, target)`, which carries the source's `output_bytes`, or `(source, target, bytes)`.
          device: name of the device that the times are for.

        Raises:
          PlanError: an edge names an operator that isn't there; or as the constructor.
        """
        ops = tuple(ops)
        index = {op.name: i for i, op in enumerate(ops)}
        found, unknown = [], []
        for source, target, *rest in edges:
            strange = [name for name in (source, target) if name not in index]
            unknown += [f"edge {source!r} -> {target!r}: there is no operator {name!r}" for name in strange]
            if not strange:
                size = float(rest[0]) if rest else ops[index[source]].output_bytes  # type: ignore[arg-type]
                found.append(OpEdge(index[source], index[target], size))
        if unknown:
            raise PlanError(f"not a graph of {len(ops)} operators:\n  " + "\n  ".join(unknown))
        return cls(ops, tuple(found), device)

    @property
    def num_ops(self) -> int:
        """How many operators."""
        return len(self.ops)

    @cached_property
    def has_backward(self) -> bool:
        """Whether any backward takes time; a graph without is planned as a forward-only step."""
        return any(op.has_backward for op in self.ops)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The index of each operator by its name."""
        return MappingProxyType({op.name: i for i, op in enumerate(self.ops)})

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, those that read its value, in order."""
        return _join(self.num_ops, ((e.source, e.target) for e in self.edges))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, those whose values it reads, in order."""
        return _join(self.num_ops, ((e.target, e.source) for e in self.edges))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The operators, each after those that it reads; the lowest index first where there is a choice."""
        waits_for = [len(sources) for sources in self.predecessors]
        ready = [i for i, count in enumerate(waits_for) if not count]
        order = []
        while ready:
            order.append(i := heapq.heappop(ready))
            for target in self.successors[i]:
                waits_for[target] -= 1
                if not waits_for[target]:
                    heapq.heappush(ready, target)
        return tuple(order)

    @cached_property
    def edge_bytes(self) -> Mapping[tuple[int, int], float]:
        """Bytes per example of each edge `(source, target)`."""
        return MappingProxyType({(e.source, e.target): e.bytes for e in self.edges})

    def forward_seconds(self, n: float) -> Numbers:
        """Seconds of each operator's forward for n examples at once; `float64[num_ops]`, read-only, kept for each n."""
        return self._seconds_of("forward", n)

    def input_backward_seconds(self, n: float) -> Numbers:
        """As `forward_seconds`, of I."""
        return self._seconds_of("input_backward", n)

    def weight_backward_seconds(self, n: float) -> Numbers:
        """As `forward_seconds`, of W."""
        return self._seconds_of("weight_backward", n)

    def backward_seconds(self, n: float) -> Numbers:
        """As `forward_seconds`, of the whole backward, I + W."""
        return self.input_backward_seconds(n) + self.weight_backward_seconds(n)

    def _seconds_of(self, what: str, n: float) -> Numbers:
        key = (what, float(n))
        if key not in self._seconds:
            times: dict[TimeCurve, float] = {}  # equal operators share their curves
            curves = [getattr(op, what) for op in self.ops]
            for curve in curves:
                if curve not in times:
                    times[curve] = curve(n)
            self._seconds[key] = _freeze([times[curve] for curve in curves])
        return self._seconds[key]

    @cached_property
    def parameter_bytes(self) -> Numbers:
        """Of each operator's weights; `float64[num_ops]`, read-only."""
        return _freeze([op.parameter_bytes for op in self.ops])

    @cached_property
    def state_bytes(self) -> Numbers:
        """Of each operator's weights and optimizer state."""
        return _freeze([op.state_bytes for op in self.ops])

    @cached_property
    def gradient_bytes(self) -> Numbers:
        """Of each operator's gradient accumulator."""
        return _freeze([op.gradient_bytes for op in self.ops])

    @cached_property
    def residual_bytes(self) -> Numbers:
        """Kept by each operator from its forward to its backward, per example."""
        return _freeze([op.residual_bytes for op in self.ops])

    @cached_property
    def output_bytes(self) -> Numbers:
        """Of each operator's value, per example."""
        return _freeze([op.output_bytes for op in self.ops])

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal graph."""
        from jaxpar.plan.graph_json import graph_to_dict, write_json

        return write_json(graph_to_dict(self))

    @classmethod
    def from_json(cls, text: str) -> OpGraph:
        """Read what `to_json` wrote, or what a person typed: numbers for curves, absent fields for defaults.

        Raises:
          PlanError: the text is not JSON or not a graph; all that is wrong with it is named.

        >>> graph = OpGraph.from_json('{"ops": [{"name": "a", "forward": 1e-3}, {"name": "b", "forward": 2e-3}],'
        ...                           ' "edges": [["a", "b", 4096]]}')
        >>> OpGraph.from_json(graph.to_json()) == graph
        True
        """
        from jaxpar.plan.graph_json import graph_from_dict, read_json

        return graph_from_dict(read_json(text, "a graph of operators"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OpGraph:
        """Read a file that `save` wrote.

        Raises:
          PlanError: as `from_json`.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _freeze(values: Sequence[float]) -> Numbers:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


def _join(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    joined: list[list[int]] = [[] for _ in range(count)]
    for a, b in pairs:
        joined[a].append(b)
    return tuple(tuple(sorted(others)) for others in joined)


def _find_problems(graph: OpGraph) -> Iterator[str]:
    """Everything wrong but cycles, which can be looked for only in edges that are in range."""
    if not graph.ops:
        yield "there must be at least one operator"
    for name, count in Counter(op.name for op in graph.ops).items():
        if count > 1:
            yield f"{count} operators are called {name!r}: names are unique"
    counts = Counter((e.source, e.target) for e in graph.edges)
    for (source, target), count in counts.items():
        if not (0 <= source < len(graph.ops) and 0 <= target < len(graph.ops)):
            yield f"edge {source} -> {target} leaves the graph: operators are 0 ... {len(graph.ops) - 1}"
            continue
        edge = f"edge {graph.ops[source].name!r} -> {graph.ops[target].name!r}"
        if source == target:
            yield f"{edge} joins an operator to itself"
        if count > 1:
            yield f"{edge} is given {count} times: give each edge once, with the bytes of all that is read"
    for e in graph.edges:
        if not 0 <= e.bytes < math.inf:
            yield f"edge {e.source} -> {e.target} has {e.bytes:g} bytes, but must have finitely many and at least 0"


def _find_cycle(graph: OpGraph) -> list[int]:
    """The operators of one cycle, its first repeated at the end."""
    stuck = set(range(graph.num_ops)) - set(graph.order)
    path = [min(stuck)]
    while path[-1] not in path[:-1]:  # each stuck operator reads a stuck one, so walking up must come round
        path.append(next(i for i in graph.predecessors[path[-1]] if i in stuck))
    return path[path.index(path[-1]) :][::-1]
