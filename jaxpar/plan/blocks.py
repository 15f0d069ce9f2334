"""Coarsen the forward pass into blocks: the operators that a planner lays on stages.

A block is a convex set of forward equations, so that the graph of blocks has no cycle. Blocks are made from below:

    units      each equation; runs of element-wise ones in one module as one
    modules    a module that is light enough is one block, if it hangs together and is convex
    joins      element-wise work joins the product that it follows or prepares, within its module
    chains     neighbours in series, within one module, as long as they are light enough together

Light enough is at most `grain` of the whole step's time; it grows until there are few enough blocks. Branches are kept
apart: of u -> v, v joins u only if all that v reads besides comes from before u (then v is on no other branch), or u
joins v only if all that reads u besides comes after v. Either also keeps the graph without cycles. Equal modules are
cut alike, since nothing but structure and costs is looked at.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from jaxpar.plan.costs import HEAVY
from jaxpar.plan.flow import Flow
from jaxpar.trace import Eqn

Path = tuple[str, ...]
_Rank = tuple[int, bool, float, int, int]

_GROWTH = 1.4  # of the grain, while there are too many blocks
_NEGLIGIBLE = 0.02  # of the grain: so light that a unit may join one of another module


@dataclass(frozen=True, eq=False)
class Block:
    """Forward equations, in program order, that a plan keeps together."""

    name: str
    eqns: tuple[Eqn, ...]


def form_blocks(flow: Flow, seconds: Sequence[float], max_blocks: int = 256) -> tuple[Block, ...]:
    """The blocks of the forward pass, each after those that it reads from.

    Args:
        flow: the micro-batch equations.
        seconds: of each forward equation with the backward equations that belong to it; only ratios matter.
        max_blocks: how many there may be. A graph that is wider than that, in branches, keeps more.
    """
    graph = _EqnGraph(flow.forward)
    total = math.fsum(seconds) or 1.0
    grain = 4 * total / max_blocks  # a quarter of the blocks would do if all were equal; what hangs on needs the rest
    while True:
        units = _Coarsening(graph, seconds, grain).run()
        if len(units) <= max_blocks or grain >= total:
            return tuple(_name_blocks(graph, [sorted(u.members) for u in _sort_units(graph, units)], seconds))
        grain *= _GROWTH


@dataclass(eq=False)
class _Unit:
    members: list[int]
    path: Path  # the module that all of it is in
    seconds: float
    heavy: bool
    mask: int  # members, ancestors and descendants as sets of bits
    above: int
    below: int
    preds: set[_Unit] = field(default_factory=set)
    succs: set[_Unit] = field(default_factory=set)

    @property
    def key(self) -> int:
        return self.members[0]


class _EqnGraph:
    """The equations as nodes: neighbours, and who is before and behind whom."""

    def __init__(self, eqns: Sequence[Eqn]):
        self.eqns = eqns
        self.paths = [_modules(eqn) for eqn in eqns]
        maker = {v: i for i, eqn in enumerate(eqns) for v in eqn.outputs}
        self.preds = [sorted({maker[v] for v in eqn.reads if v in maker}) for eqn in eqns]
        self.succs: list[list[int]] = [[] for _ in eqns]
        for i, sources in enumerate(self.preds):
            for j in sources:
                self.succs[j].append(i)
        self.above = [0] * len(eqns)
        self.below = [0] * len(eqns)
        for i, sources in enumerate(self.preds):
            for j in sources:
                self.above[i] |= self.above[j] | 1 << j
        for i in reversed(range(len(eqns))):
            for j in self.succs[i]:
                self.below[i] |= self.below[j] | 1 << j


class _Coarsening:
    """Units that merge until nothing more may, for one grain."""

    def __init__(self, graph: _EqnGraph, seconds: Sequence[float], grain: float):
        self.graph, self.seconds = graph, seconds
        self.limit = grain * (1 + 1e-9)
        self.unit_of: dict[int, _Unit] = {}
        self.heavy = {
            i
            for i, (eqn, t) in enumerate(zip(graph.eqns, seconds, strict=True))
            if eqn.name in HEAVY and t > _NEGLIGIBLE * self.limit
        }
        self.heavy_in: dict[Path, int] = defaultdict(int)  # as a set of bits, by module
        for i in self.heavy:
            for depth in range(len(graph.paths[i]) + 1):
                self.heavy_in[graph.paths[i][:depth]] |= 1 << i

    def run(self) -> set[_Unit]:
        groups = self._separate_cycles([part for whole in self._whole_modules() for part in self._connected(whole)])
        units = {self._make_unit(group) for group in groups}
        for unit in units:
            for i in unit.members:
                unit.preds |= {self.unit_of[j] for j in self.graph.preds[i]} - {unit}
                unit.succs |= {self.unit_of[j] for j in self.graph.succs[i]} - {unit}
        self._merge(units)
        self._adopt(units)
        return units

    # -- to begin with: modules that are light enough, runs of element-wise equations, single equations ----------------

    def _whole_modules(self) -> Iterator[list[int]]:
        """Equations of the largest modules within the grain; of others, runs of their own element-wise ones."""
        cost: dict[Path, float] = defaultdict(float)
        paths = self.graph.paths
        for path, t in zip(paths, self.seconds, strict=True):
            for depth in range(len(path) + 1):
                cost[path[:depth]] += t
        modules: dict[Path, list[int]] = defaultdict(list)
        loose: list[int] = []
        for i, path in enumerate(paths):
            fits = (path[:depth] for depth in range(1, len(path) + 1) if cost[path[:depth]] <= self.limit)
            module = next(fits, None)
            if module is None:
                loose.append(i)
            else:
                modules[module].append(i)
        yield from modules.values()
        yield from self._runs(loose)

    def _runs(self, loose: Sequence[int]) -> Iterator[list[int]]:
        """Equations in series in one module, all but the first one element-wise."""
        run_of: dict[int, list[int]] = {}
        graph, candidates = self.graph, set(loose)
        for i in loose:
            before = graph.preds[i]
            alone = len(before) == 1 and before[0] in candidates and len(graph.succs[before[0]]) == 1
            if alone and graph.eqns[i].name not in HEAVY and graph.paths[i] == graph.paths[before[0]]:
                run_of[i] = run_of[before[0]]
                run_of[i].append(i)
            else:
                run_of[i] = [i]
        yield from {id(run): run for run in run_of.values()}.values()

    def _connected(self, group: list[int]) -> Iterator[list[int]]:
        """The parts of a group that hang together, and their equations one by one where a part isn't convex."""
        left = set(group)
        while left:
            stack, part = [min(left)], set()
            while stack:
                i = stack.pop()
                if i in left:
                    left.remove(i)
                    part.add(i)
                    stack.extend(self.graph.preds[i])
                    stack.extend(self.graph.succs[i])
            yield from [sorted(part)] if self._is_convex(part) else ([i] for i in sorted(part))

    def _is_convex(self, part: Iterable[int]) -> bool:
        mask = above = below = 0
        for i in part:
            mask |= 1 << i
            above |= self.graph.above[i]
            below |= self.graph.below[i]
        return not above & below & ~mask

    def _separate_cycles(self, groups: list[list[int]]) -> list[list[int]]:
        """Groups that wait for each other, each convex but together in a circle, fall apart into equations."""
        while True:
            group_of = {i: g for g, group in enumerate(groups) for i in group}
            edges = {(group_of[j], g) for i, g in group_of.items() for j in self.graph.preds[i] if group_of[j] != g}
            count = len(groups)
            rows, columns = zip(*edges, strict=True) if edges else ((), ())
            circles, label = connected_components(
                csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count)), connection="strong"
            )
            if circles == count:
                return groups
            size = np.bincount(label)
            stuck = size[label] > 1
            groups = [g for g, bad in zip(groups, stuck, strict=True) if not bad] + [
                [i] for g, bad in zip(groups, stuck, strict=True) if bad for i in g
            ]

    def _make_unit(self, members: list[int]) -> _Unit:
        graph = self.graph
        unit = _Unit(
            members,
            _common_path(graph.paths[i] for i in members),
            math.fsum(self.seconds[i] for i in members),
            not self.heavy.isdisjoint(members),
            sum(1 << i for i in members),
            _union(graph.above[i] for i in members),
            _union(graph.below[i] for i in members),
        )
        self.unit_of.update(dict.fromkeys(members, unit))
        return unit

    # -- merging -------------------------------------------------------------------------------------------------------

    def _merge(self, units: set[_Unit]) -> None:
        """Merge pairs, those deepest in the modules first, then the lightest, then in program order."""
        heap: list[tuple[_Rank, int, _Unit, _Unit]] = []
        count = itertools.count()

        def offer(pairs: Iterable[tuple[_Unit, _Unit]]) -> None:
            for u, v in pairs:
                if (rank := self._rank(u, v)) is not None:
                    heapq.heappush(heap, (rank, next(count), u, v))

        offer((u, v) for u in sorted(units, key=lambda u: u.key) for v in u.succs)
        while heap:
            _, _, u, v = heapq.heappop(heap)
            if u not in units or v not in units or self._rank(u, v) is None:
                continue
            w = self._join(u, v)
            units -= {u, v}
            units.add(w)
            # also pairs that waited for this: a third that they have to do with now lies before or behind them
            offer({(p, q) for p in w.preds for q in p.succs} | {(p, q) for q in w.succs for p in q.preds})

    def _adopt(self, units: set[_Unit]) -> None:
        """Element-wise work for the backward alone joins the unit, in its module, that reads what it reads."""
        for v in sorted((u for u in units if not u.succs and not u.heavy), key=lambda u: u.key):
            if v not in units:  # it has adopted another
                continue
            near = {s for p in v.preds for s in p.succs if s is not v and all(p.mask & s.above for p in v.preds)}
            near = {s for s in near if self._stays_home(v, _common_length(v.path, s.path))}
            if near:
                u = min(near, key=lambda s: (-_common_length(v.path, s.path), s.key))
                units -= {u, v}
                units.add(self._join(u, v))

    def _rank(self, u: _Unit, v: _Unit) -> _Rank | None:
        """Where the merge of u and v, u -> v, stands in the queue; None if it may not be."""
        scope = _common_length(u.path, v.path)
        follows = all(p is u or p.mask & u.above for p in v.preds)  # v is on no other branch
        prepares = all(s is v or s.mask & v.below for s in u.succs)  # u is for no other branch
        together = u.seconds + v.seconds
        both = u.heavy and v.heavy
        if not u.heavy and not v.heavy and together > self.limit:
            return None
        if both:
            series = follows and prepares and self._is_whole(u, scope) and self._is_whole(v, scope)
            allowed = series and together <= self.limit
        else:
            into_u = not v.heavy and follows and self._stays_home(v, scope)
            into_v = not u.heavy and prepares and self._stays_home(u, scope)
            allowed = into_u or into_v
        return (-scope, both, together, u.key, v.key) if allowed else None

    def _is_whole(self, u: _Unit, scope: int) -> bool:
        """Whether u has all of the modules that it has a part of, below the first `scope` levels."""
        return len(u.path) == scope or not self.heavy_in[u.path[: scope + 1]] & ~u.mask

    def _stays_home(self, light: _Unit, scope: int) -> bool:
        return scope >= len(light.path) - 1 or light.seconds <= _NEGLIGIBLE * self.limit

    def _join(self, u: _Unit, v: _Unit) -> _Unit:
        w = _Unit(
            sorted(u.members + v.members),
            u.path[: _common_length(u.path, v.path)] if u.heavy == v.heavy else (u if u.heavy else v).path,
            u.seconds + v.seconds,
            u.heavy or v.heavy,
            u.mask | v.mask,
            u.above | v.above,
            u.below | v.below,
            (u.preds | v.preds) - {u, v},
            (u.succs | v.succs) - {u, v},
        )
        for p in w.preds:
            p.succs -= {u, v}
            p.succs.add(w)
        for s in w.succs:
            s.preds -= {u, v}
            s.preds.add(w)
        return w


def _sort_units(graph: _EqnGraph, units: Iterable[_Unit]) -> Iterator[_Unit]:
    """Each unit after those that it reads from, in program order where there is a choice."""
    waits = {u: len(u.preds) for u in units}
    ready = [(u.key, u) for u, count in waits.items() if not count]
    heapq.heapify(ready)
    while ready:
        _, u = heapq.heappop(ready)
        yield u
        for v in u.succs:
            waits[v] -= 1
            if not waits[v]:
                heapq.heappush(ready, (v.key, v))


# -- names -------------------------------------------------------------------------------------------------------------


def _name_blocks(graph: _EqnGraph, blocks: Sequence[Sequence[int]], seconds: Sequence[float]) -> Iterator[Block]:
    """Blocks named after their modules: the whole one, a range of its children, or a part of it by its main operation.

    Names are unique: of several equal ones the second gets `.1`, the third `.2`.
    """
    bearing = [_that_matter(graph, members, seconds) for members in blocks]
    inside: Counter[Path] = Counter()
    for i in itertools.chain(*bearing):
        inside.update(graph.paths[i][:depth] for depth in range(len(graph.paths[i]) + 1))
    taken: Counter[str] = Counter()
    for members, mine in zip(blocks, bearing, strict=True):
        name = _describe(graph, mine, inside, seconds)
        taken[name] += 1
        suffix = f".{taken[name] - 1}" if taken[name] > 1 else ""
        yield Block(name + suffix, tuple(graph.eqns[i] for i in members))


def _that_matter(graph: _EqnGraph, members: Sequence[int], seconds: Sequence[float]) -> Sequence[int]:
    """The products and the like that take at least a twentieth of the block's time; without any, all in a module."""
    least = 0.05 * math.fsum(seconds[i] for i in members)
    heavy = [i for i in members if graph.eqns[i].name in HEAVY and seconds[i] >= least]
    return heavy or [i for i in members if graph.paths[i]] or members


def _describe(graph: _EqnGraph, mine: Sequence[int], inside: Counter[Path], seconds: Sequence[float]) -> str:
    paths = [graph.paths[i] for i in mine]
    shared = _common_path(paths)
    if shared and inside[shared] == len(mine):
        return "/".join(shared)
    children = list(dict.fromkeys(path[: len(shared) + 1] for path in paths if len(path) > len(shared)))
    if len(children) > 1 and sum(inside[child] for child in children) == len(mine):
        return "/".join((*shared, f"{children[0][-1]}…{children[-1][-1]}"))
    main = max(mine, key=lambda i: seconds[i])
    return f"{'/'.join(shared)}:{graph.eqns[main].name}".lstrip(":")


def _modules(eqn: Eqn) -> Path:
    """The modules that an equation is in; einsums, which JAX names after their subscripts, are none."""
    return tuple(name for name in eqn.path if "->" not in name)


def _common_path(paths: Iterable[Path]) -> Path:
    shared: Path | None = None
    for path in paths:
        shared = path if shared is None else shared[: _common_length(shared, path)]
    return shared or ()


def _common_length(a: Path, b: Path) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)


def _union(masks: Iterable[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
