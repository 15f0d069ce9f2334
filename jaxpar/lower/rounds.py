"""Work that happens once per step, before and after the micro-batches: each rank for the state that it owns.

Values live at one rank, or everywhere. An equation runs where its inputs live; scalars made of values of several
ranks (a global
norm) are computed everywhere. The work is cut into rounds: in each, every rank computes what the others need of it,
and the
values are exchanged; in the last it computes its results. A round starts from the stored buffers and from what was
exchanged: what little two rounds have in common is computed twice, so nothing else has to be stored between them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpar import _jax
from jaxpar.lower.channels import colour_edges
from jaxpar.lower.evaluate import Env, Rows, evaluate, read
from jaxpar.lower.packing import Item, Packing, Place, fill_buffers, pack_items, read_place
from jaxpar.trace import Atom, Eqn, Var
from jaxpar.trace.fingerprint import fingerprint_eqns

_SMALL_BYTES = 1 << 16  # exchanged with all ranks at once, rather than sent from one to another
_SCALAR_ELEMENTS = 16


@dataclass(frozen=True)
class Source:
    """Where a rank finds a value: `place` in the buffers called `group`, or number `index` of the values called
    `group`."""

    group: str
    place: Place | None = None
    index: int = 0


@dataclass(frozen=True)
class Group:
    """Results that each rank stores in the buffers of `packing`, `places[r]` being those of `values[r]`."""

    packing: Packing
    places: tuple[tuple[Place, ...], ...]
    values: tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True, eq=False)
class _Program:
    """What one rank does in one round."""

    inputs: tuple[tuple[Var, Source], ...]
    eqns: tuple[Eqn, ...]
    small: tuple[tuple[Place, Var], ...]
    sends: tuple[Var | None, ...]
    groups: tuple[tuple[tuple[Place, Atom], ...], ...]
    everywhere: tuple[Atom, ...]

    @property
    def key(self) -> str:
        outputs: list[Atom] = []
        outputs += [v for _, v in self.small] + [v for v in self.sends if v is not None]
        outputs += [v for group in self.groups for _, v in group] + list(self.everywhere)
        text = fingerprint_eqns([v for v, _ in self.inputs], self.eqns, outputs)
        places = [[place for place, _ in group] for group in (self.small, *self.groups)]
        return f"{text} {[s for _, s in self.inputs]} {places} {[v is not None for v in self.sends]}"


@dataclass(frozen=True, eq=False)
class _Round:
    programs: tuple[_Program, ...]
    program_of: tuple[int, ...]  # by rank
    small: Packing
    sends: tuple[tuple[Item, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class Rounds:
    rounds: tuple[_Round, ...]
    groups: tuple[Group, ...]

    @property
    def num_programs(self) -> int:
        return sum(len(r.programs) for r in self.rounds)


def build_rounds(
    eqns: Iterable[Eqn],
    home: Mapping[Var, int | None],
    sources: Sequence[Mapping[Var, Source]],
    groups: Sequence[Group],
    everywhere: Sequence[Atom] = (),
    hints: Mapping[Var, int] | None = None,
) -> Rounds:
    """Plan the rounds.

    Args:
        eqns: the equations that may be needed, in order.
        home: rank of each stored value, None for one that every rank has.
        sources: for each rank, where it finds the stored values that it has.
        groups: results that each rank stores.
        everywhere: results that all ranks compute.
        hints: preferred rank of values that could be computed at several.
    """
    return _Planner(list(eqns), home, sources, groups, everywhere, hints or {}).plan()


def place_equations(
    eqns: Iterable[Eqn], home: Mapping[Var, int | None], hints: Mapping[Var, int]
) -> dict[Var, int | None]:
    """The rank at which each value is computed, None for those that any rank can compute.

    Scalars made of values of several ranks, and what is added to them, are computed everywhere: a chain of additions
    over all parameters then takes one exchange, in whatever order it visits the ranks.
    """
    found = dict(home)
    mixed: set[Var] = set()
    for eqn in eqns:
        weight: dict[int, int] = defaultdict(int)
        for v in eqn.reads:
            if (rank := found[v]) is not None:
                weight[rank] += v.bytes_at(1)
        scalar = all(_elements(v) <= _SCALAR_ELEMENTS for v in (*eqn.reads, *eqn.outputs))
        where: int | None
        if scalar and (len(weight) > 1 or not mixed.isdisjoint(eqn.reads)):
            where = None
            mixed.update(eqn.outputs)
        elif len(weight) > 1 and (hint := hints.get(eqn.outputs[0])) in weight:
            where = hint
        else:
            where = max(weight, key=lambda r: (weight[r], -r), default=None)
        for v in eqn.outputs:
            found.setdefault(v, where)
    return found


def _elements(v: Var) -> int:
    return math.prod(v.shape_at(1))


class _Planner:
    def __init__(
        self,
        eqns: list[Eqn],
        home: Mapping[Var, int | None],
        sources: Sequence[Mapping[Var, Source]],
        groups: Sequence[Group],
        everywhere: Sequence[Atom],
        hints: Mapping[Var, int],
    ):
        self.sources, self.groups, self.everywhere = sources, groups, everywhere
        self.num_ranks = len(sources)
        self.producer = {v: eqn for eqn in eqns for v in eqn.outputs}
        self.home = place_equations(eqns, home, hints)
        self.level: dict[tuple[Var, int], int] = {}
        self.exchanged: dict[tuple[Var, int], int] = {}  # (value, its rank) -> level of the exchange
        self.large: dict[tuple[Var, int, int], int] = {}  # (value, from, to) -> level
        self.small_place: dict[tuple[Var, int], tuple[int, Place]] = {}
        self.send_index: dict[tuple[Var, int], tuple[int, int]] = {}

    # -- who needs what, when --------------------------------------------------------------------------------------

    def _need(self, v: Var, rank: int) -> int:
        """The round in which `rank` can first have `v`; notes the exchanges that this takes."""
        if (v, rank) in self.level:
            return self.level[v, rank]
        home = self.home[v]
        if home is not None and home != rank:
            sent = self._need(v, home)
            if is_small(v):
                self.exchanged[v, home] = sent
            else:
                self.large[v, home, rank] = sent
            level = sent + 1
        elif v in self.producer and v not in self.sources[rank]:
            level = max((self._need(u, rank) for u in self.producer[v].reads), default=0)
        else:
            level = 0
        self.level[v, rank] = level
        return level

    def plan(self) -> Rounds:
        last = 0
        for rank in range(self.num_ranks):
            for atom in self._results(rank):
                if isinstance(atom, Var):
                    last = max(last, self._need(atom, rank))
        rounds = [self._build_round(level, final=level == last) for level in range(last + 1)]
        return Rounds(tuple(rounds), tuple(self.groups))

    def _results(self, rank: int) -> list[Atom]:
        return [v for g in self.groups for v in g.values[rank]] + list(self.everywhere)

    def _build_round(self, level: int, final: bool) -> _Round:
        small = [
            [v for (v, home), at in self.exchanged.items() if at == level and home == r] for r in range(self.num_ranks)
        ]
        packing = pack_items([[_item(v) for v in values] for values in small])
        for rank, values in enumerate(small):
            for v, place in zip(values, packing.places[rank], strict=True):
                self.small_place[v, rank] = (level, place)
        sends = self._group_sends(level)
        programs = [self._program(r, level, small[r], packing, sends, final) for r in range(self.num_ranks)]
        distinct: dict[str, int] = {}
        program_of = tuple(distinct.setdefault(p.key, len(distinct)) for p in programs)
        kept = tuple(programs[program_of.index(i)] for i in range(len(distinct)))
        for number, (_, pairs, carried) in enumerate(sends):
            for (_src, dst), v in zip(pairs, carried, strict=True):
                self.send_index[v, dst] = (level, number)
        return _Round(kept, program_of, packing, tuple((item, pairs) for item, pairs, _ in sends))

    def _group_sends(self, level: int) -> list[tuple[Item, tuple[tuple[int, int], ...], tuple[Var, ...]]]:
        """Large values of one shape travel together where their ranks allow it."""
        by_item: dict[Item, list[tuple[Var, int, int]]] = defaultdict(list)
        for (v, src, dst), at in self.large.items():
            if at == level:
                by_item[_item(v)].append((v, src, dst))
        groups = []
        for item, moves in by_item.items():
            colours = colour_edges([(src, dst) for _, src, dst in moves])
            for c in range(max(colours) + 1):
                mine = [m for m, colour in zip(moves, colours, strict=True) if colour == c]
                groups.append((item, tuple((s, d) for _, s, d in mine), tuple(v for v, _, _ in mine)))
        return groups

    def _program(
        self, rank: int, level: int, small: Sequence[Var], packing: Packing, sends: Sequence[Any], final: bool
    ) -> _Program:
        outgoing = tuple(
            next((v for (src, _), v in zip(pairs, carried, strict=True) if src == rank), None)
            for _, pairs, carried in sends
        )
        groups: tuple = ()
        everywhere: tuple[Atom, ...] = ()
        if final:
            groups = tuple(tuple(zip(g.places[rank], g.values[rank], strict=True)) for g in self.groups)
            everywhere = tuple(self.everywhere)
        targets = [*small, *(v for v in outgoing if v is not None), *(v for g in groups for _, v in g), *everywhere]
        inputs, eqns = self._closure(rank, level, [v for v in targets if isinstance(v, Var)])
        placed = tuple(zip(packing.places[rank], small, strict=True))
        return _Program(inputs, eqns, placed, outgoing, groups, everywhere)

    def _closure(
        self, rank: int, level: int, targets: Sequence[Var]
    ) -> tuple[tuple[tuple[Var, Source], ...], tuple[Eqn, ...]]:
        """Equations behind the targets in depth-first order, which doesn't depend on the order of the user's tree."""
        inputs: dict[Var, Source] = {}
        eqns: dict[Eqn, None] = {}
        stack: list[tuple[Var, bool]] = [(v, False) for v in reversed(targets)]
        while stack:
            v, ready = stack.pop()
            if v in inputs or self.producer.get(v) in eqns:
                continue
            source = self._find_source(v, rank, level)
            if source is not None:
                inputs[v] = source
            elif ready:
                eqns[self.producer[v]] = None
            else:
                stack.append((v, True))
                stack.extend((u, False) for u in reversed(self.producer[v].reads))
        return tuple(inputs.items()), tuple(eqns)

    def _find_source(self, v: Var, rank: int, level: int) -> Source | None:
        """Where a rank finds a value in round `level`; None if it has to compute it.

        What all ranks were given, its owner reads from there too: so the work that all ranks do is the same program.
        """
        home = self.home[v]
        if home is not None and self.exchanged.get((v, home), level) < level:
            sent, place = self.small_place[v, home]
            return Source(f"small{sent}", place, home)
        if v in self.sources[rank]:
            return self.sources[rank][v]
        if home is None or home == rank:
            return None
        sent, number = self.send_index[v, rank]
        return Source(f"sent{sent}", None, number)


def is_small(v: Var) -> bool:
    return v.bytes_at(1) <= _SMALL_BYTES


def _item(v: Var) -> Item:
    shape, dtype = _jax.raw_shape(v.shape_at(1), v.dtype)
    return Item(shape, dtype)


# -- run time ----------------------------------------------------------------------------------------------------------


def run_rounds(
    rounds: Rounds, buffers: Mapping[str, Sequence[Any]], rows: Rows, rank: Any, axis: str
) -> tuple[list[list[Any]], list[Any]]:
    """Run on each rank of the mesh axis `axis`.

    Args:
        buffers: stored values by group, those of this rank.
        rank: this rank's index, traced.

    Returns: for each group its buffers, and the results that every rank has.
    """
    stored = {name: list(values) for name, values in buffers.items()}
    results: tuple = ((), (), (), ())
    for level, r in enumerate(rounds.rounds):
        branches = [lambda p=p, r=r: _run_program(p, r, rounds.groups, stored, rows) for p in r.programs]
        which = jnp.asarray(r.program_of, jnp.int32)[rank]
        results = lax.switch(which, branches) if len(branches) > 1 else branches[0]()
        small, sends, _, _ = results
        stored[f"small{level}"] = [lax.all_gather(x, axis) for x in small]
        stored[f"sent{level}"] = [lax.ppermute(x, axis, pairs) for x, (_, pairs) in zip(sends, r.sends, strict=True)]
    return list(map(list, results[2])), list(results[3])


def _run_program(
    p: _Program, r: _Round, groups: Sequence[Group], stored: Mapping[str, Sequence[Any]], rows: Rows
) -> Any:
    env: Env = {v: _fetch(stored, s, v) for v, s in p.inputs}
    evaluate(p.eqns, env, rows)

    def store(atom: Atom) -> Any:
        return _jax.unwrap_key(jnp.asarray(read(env, atom)))

    small = fill_buffers(r.small, [place for place, _ in p.small], [store(v) for _, v in p.small])
    sends = [
        jnp.zeros(item.shape, item.dtype) if v is None else store(v)
        for v, (item, _) in zip(p.sends, r.sends, strict=True)
    ]
    filled = [
        fill_buffers(g.packing, [place for place, _ in values], [store(v) for _, v in values])
        for g, values in zip(groups, p.groups, strict=False)
    ]
    return small, sends, filled, [store(v) for v in p.everywhere]


def _fetch(stored: Mapping[str, Sequence[Any]], source: Source, v: Var) -> Any:
    values = stored[source.group]
    if source.group.startswith("small"):
        assert source.place is not None
        values = [x[source.index] for x in values]
    raw = read_place(values, source.place) if source.place is not None else values[source.index]
    return _jax.wrap_key(raw, v.dtype) if _jax.is_key(v.dtype) else raw.astype(v.dtype)
