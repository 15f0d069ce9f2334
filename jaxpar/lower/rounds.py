"""Work that happens once per step, before and after the micro-batches: each rank for the state that it owns.

Values live at one rank, or everywhere. An equation runs where its inputs live; scalars made of values of several
ranks (a global norm) are computed everywhere. The work is cut into rounds: in each, every rank computes what the
others need of it, and the values are exchanged; in the last it computes its results. Ranks of one group hold the same
state and do the same. A round starts from the stored
buffers and from what was exchanged: what little two rounds have in common is computed twice, so nothing else has to
be stored between them. What every rank would compute alike, from what all of them have, is done before the ranks'
own programs, once for all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpar import _jax
from jaxpar.lower.channels import colour_edges
from jaxpar.lower.packing import Item, Packing, Place, pack_items
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


def make_group(packing: Packing, rows: Sequence[Iterable[tuple[Place, Atom]]]) -> Group:
    """In the order of the places, which equal ranks have in common, whatever the order of the user's tree."""
    ordered = [sorted(row, key=lambda entry: (entry[0].buffer, entry[0].offset or 0)) for row in rows]
    return Group(
        packing, tuple(tuple(p for p, _ in row) for row in ordered), tuple(tuple(v for _, v in row) for row in ordered)
    )


@dataclass(frozen=True, eq=False)
class CommonWork:
    """What every rank does at the beginning of a round, and which of the values its own program reads."""

    inputs: tuple[tuple[Var, Source], ...]
    eqns: tuple[Eqn, ...]
    values: tuple[Var, ...]


@dataclass(frozen=True, eq=False)
class RankProgram:
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
class Round:
    common: CommonWork
    programs: tuple[RankProgram, ...]
    program_of: tuple[int, ...]  # by rank
    small: Packing
    sends: tuple[tuple[Item, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class Rounds:
    rounds: tuple[Round, ...]
    groups: tuple[Group, ...]

    @property
    def num_programs(self) -> int:
        return sum(len(r.programs) for r in self.rounds)


def build_rounds(
    eqns: Iterable[Eqn],
    home: Mapping[Var, int | None],
    sources: Sequence[Mapping[Var, Source]],
    groups: Sequence[Group],
    replicas: Sequence[Sequence[int]],
    everywhere: Sequence[Atom] = (),
    hints: Mapping[Var, int] | None = None,
) -> Rounds:
    """Plan the rounds.

    Args:
        eqns: the equations that may be needed, in order.
        home: rank of each stored value, the first of its group; None for one that every rank has.
        sources: for each rank, where it finds the stored values that it has.
        groups: results that each rank stores.
        replicas: the ranks in groups, of which all members hold and want the same.
        everywhere: results that all ranks compute.
        hints: preferred rank of values that could be computed at several.
    """
    return _Planner(list(eqns), home, sources, groups, replicas, everywhere, hints or {}).plan()


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
        replicas: Sequence[Sequence[int]],
        everywhere: Sequence[Atom],
        hints: Mapping[Var, int],
    ):
        self.peers = {rank: tuple(members) for members in replicas for rank in members}
        self.sources, self.groups, self.everywhere = sources, groups, everywhere
        self.num_ranks = len(sources)
        self.producer = {v: eqn for eqn in eqns for v in eqn.outputs}
        self.home = place_equations(eqns, home, hints)
        self.level: dict[tuple[Var, int], int] = {}
        self.exchanged: dict[tuple[Var, int], int] = {}  # (value, its rank) -> level of the exchange
        self.large: dict[tuple[Var, int, int], int] = {}  # (value, from, to) -> level
        self.first_stored = _find_first_stored(eqns, self.home, sources)
        self.common: dict[Var, Source] = {}
        self.small_place: dict[tuple[Var, int], tuple[int, Place]] = {}
        self.send_index: dict[tuple[Var, int], tuple[int, int]] = {}

    # -- who needs what, when --------------------------------------------------------------------------------------

    def _need(self, v: Var, rank: int) -> int:
        """The round in which `rank` can first have `v`; notes the exchanges that this takes."""
        stack = [(v, rank)]
        while stack:
            u, at = stack[-1]
            owner = self.home[u]
            home = at if owner is None or at in self.peers[owner] else owner
            if home != at:
                before = [(u, peer) for peer in self.peers[home]]
            elif u in self.producer and u not in self.sources[at]:
                before = [(w, at) for w in self.producer[u].reads]
            else:
                before = []
            if missing := [key for key in before if key not in self.level]:
                stack.extend(missing)
                continue
            stack.pop()
            level = max((self.level[key] for key in before), default=0)
            if home != at:
                if is_small(u):
                    self.exchanged[u, home] = level
                else:
                    self.large[u, home, at] = level
                level += 1
            self.level[u, at] = level
        return self.level[v, rank]

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

    def _build_round(self, level: int, final: bool) -> Round:
        small = [self._exchanged_by(r, level) for r in range(self.num_ranks)]
        packing = pack_items([[_item(v) for v in values] for values in small])
        for rank, values in enumerate(small):
            for v, place in zip(values, packing.places[rank], strict=True):
                self.small_place[v, rank] = (level, place)
        sends = self._group_sends(level)
        common = self._find_common(level, small, sends, final)
        programs = [self._program(r, level, small[r], packing, sends, final) for r in range(self.num_ranks)]
        distinct: dict[str, int] = {}
        program_of = tuple(distinct.setdefault(p.key, len(distinct)) for p in programs)
        kept = tuple(programs[program_of.index(i)] for i in range(len(distinct)))
        for number, (_, pairs, carried) in enumerate(sends):
            for (_src, dst), v in zip(pairs, carried, strict=True):
                self.send_index[v, dst] = (level, number)
        return Round(common, kept, program_of, packing, tuple((item, pairs) for item, pairs, _ in sends))

    def _exchanged_by(self, rank: int, level: int) -> list[Var]:
        """What `rank` tells all others in a round, in an order that equal ranks have in common."""
        values = [v for (v, home), at in self.exchanged.items() if at == level and rank in self.peers[home]]
        return sorted(values, key=self.first_stored.__getitem__)

    def _find_common(self, level: int, small: Sequence[Sequence[Var]], sends: Sequence[Any], final: bool) -> CommonWork:
        """The part of a round that all ranks have in common: they all need it, and make it from what they all have."""
        closures = [
            self._closure(r, level, self._targets(r, small[r], _outgoing(sends, r), final))
            for r in range(self.num_ranks)
        ]
        wanted = set.intersection(*(set(eqns) for _, eqns in closures))
        sources, eqns = closures[0]
        given = {v: s for v, s in sources if s.group.startswith(("small", "shared", "common"))}
        made: dict[Var, None] = {}
        kept = []
        for eqn in eqns:
            if eqn in wanted and all(v in given or v in made for v in eqn.reads):
                kept.append(eqn)
                made.update(dict.fromkeys(eqn.outputs))
        used = {v for eqn in kept for v in eqn.reads}
        inner = set(kept)
        leaving = {v for _, own in closures for eqn in own if eqn not in inner for v in eqn.reads}
        leaving.update(v for r in range(self.num_ranks) for v in self._targets(r, small[r], _outgoing(sends, r), final))
        values = tuple(v for v in made if v in leaving)
        self.common.update((v, Source(f"common{level}", None, i)) for i, v in enumerate(values))
        return CommonWork(tuple((v, s) for v, s in given.items() if v in used), tuple(kept), values)

    def _group_sends(self, level: int) -> list[tuple[Item, tuple[tuple[int, int], ...], tuple[Var, ...]]]:
        """Large values of one shape travel together where their ranks allow it."""
        by_item: dict[Item, list[tuple[Var, int, int]]] = defaultdict(list)
        for (v, home, dst), at in self.large.items():
            if at == level:
                owners, readers = self.peers[home], self.peers[dst]
                by_item[_item(v)].append((v, owners[readers.index(dst) % len(owners)], dst))
        groups = []
        for item, moves in by_item.items():
            colours = colour_edges([(src, dst) for _, src, dst in moves])
            for c in range(max(colours) + 1):
                mine = [m for m, colour in zip(moves, colours, strict=True) if colour == c]
                groups.append((item, tuple((s, d) for _, s, d in mine), tuple(v for v, _, _ in mine)))
        return groups

    def _targets(self, rank: int, small: Sequence[Var], outgoing: Sequence[Var | None], final: bool) -> list[Var]:
        atoms = [*small, *outgoing, *(self._results(rank) if final else ())]
        return [v for v in atoms if isinstance(v, Var)]

    def _program(
        self, rank: int, level: int, small: Sequence[Var], packing: Packing, sends: Sequence[Any], final: bool
    ) -> RankProgram:
        outgoing = _outgoing(sends, rank)
        groups: tuple = ()
        everywhere: tuple[Atom, ...] = ()
        if final:
            groups = tuple(tuple(zip(g.places[rank], g.values[rank], strict=True)) for g in self.groups)
            everywhere = tuple(self.everywhere)
        inputs, eqns = self._closure(rank, level, self._targets(rank, small, outgoing, final))
        placed = tuple(zip(packing.places[rank], small, strict=True))
        return RankProgram(inputs, eqns, placed, outgoing, groups, everywhere)

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
        if v in self.common:
            return self.common[v]
        home = self.home[v]
        if home is not None and self.exchanged.get((v, home), level) < level:
            sent, place = self.small_place[v, home]
            return Source(f"small{sent}", place, home)
        if v in self.sources[rank]:
            return self.sources[rank][v]
        if home is None or rank in self.peers[home]:
            return None
        sent, number = self.send_index[v, rank]
        return Source(f"sent{sent}", None, number)


def _outgoing(sends: Sequence[Any], rank: int) -> tuple[Var | None, ...]:
    """For each exchange of large values, the one that `rank` sends."""
    return tuple(
        next((v for (src, _), v in zip(pairs, carried, strict=True) if src == rank), None)
        for _, pairs, carried in sends
    )


def _find_first_stored(
    eqns: Iterable[Eqn], home: Mapping[Var, int | None], sources: Sequence[Mapping[Var, Source]]
) -> dict[Var, tuple]:
    """For each value, the first place among the stored values of its rank that it is made of."""
    found: dict[Var, tuple] = {}
    for rank, row in enumerate(sources):
        for v, s in row.items():
            if home.get(v) == rank:
                place = (s.place.buffer, s.place.offset or 0) if s.place is not None else (-1, s.index)
                found[v] = (s.group, *place)
    for eqn in eqns:
        first = min((found[v] for v in eqn.reads if v in found and home[v] == home[eqn.outputs[0]]), default=())
        for v in eqn.outputs:
            found.setdefault(v, first)
    return found


def is_small(v: Var) -> bool:
    return v.bytes_at(1) <= _SMALL_BYTES


def _item(v: Var) -> Item:
    shape, dtype = _jax.raw_shape(v.shape_at(1), v.dtype)
    return Item(shape, dtype)
