"""What happens once per step: the prelude before the micro-batches, the update after them, and where values are for
both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxpar.lower.invariants import expand_invariants
from jaxpar.lower.layout import StateLayout
from jaxpar.lower.packing import Packing, Place, pack_items
from jaxpar.lower.rounds import Group, Rounds, Source, build_rounds, is_small, make_group, place_equations
from jaxpar.lower.slots import item_of
from jaxpar.lower.totals import totals_on, totals_places
from jaxpar.plan import StageGraph
from jaxpar.trace import Atom, Eqn, Program, Var


@dataclass(frozen=True, eq=False)
class Outputs:
    """How the step's outputs leave the machine, by index of the output."""

    batched: tuple[int, ...]
    everywhere: tuple[int, ...]
    located: tuple[tuple[int, int, Place], ...]  # (output, rank, place)
    located_packing: Packing
    state: Mapping[int, int]  # output -> number of the state input
    num_updated: int  # state arguments that have a new value among the outputs


def batch_inputs(program: Program) -> list[Var]:
    return [
        v for v, role in zip(program.inputs, program.roles, strict=True) if role == "batch" and program.is_batched(v)
    ]


def batched_outputs(program: Program) -> list[Var]:
    return list(dict.fromkeys(v for v in program.outputs if isinstance(v, Var) and program.is_batched(v)))


def examples_of_output(graph: StageGraph, v: Var) -> int:
    """How many of a micro-batch's examples one rank computes of a per-example output."""
    return graph.shares[next(p.node[1] for p in graph.programs.values() if v in p.outputs)].count


def shared_values(program: Program, layouts: Sequence[StateLayout], early: Sequence[Eqn]) -> tuple[Var, ...]:
    state = iter(leaf for layout in layouts for leaf in layout.leaves)
    values = []
    for v, role in zip(program.inputs, program.roles, strict=True):
        if role == "state":
            if not next(state).ranks:
                values.append(v)
        elif not program.is_batched(v):
            values.append(v)
    return (*values, *program.consts, *(e.outputs[0] for e in early if e.name == "complete"))


def owned_sources(program: Program, layouts: Sequence[StateLayout], num_ranks: int) -> list[dict[Var, Source]]:
    state = iter(v for v, role in zip(program.inputs, program.roles, strict=True) if role == "state")
    rows: list[dict[Var, Source]] = [{} for _ in range(num_ranks)]
    for k, layout in enumerate(layouts):
        for leaf, v in zip(layout.leaves, state, strict=False):
            for rank in leaf.ranks:
                rows[rank][v] = Source(f"state{k}", leaf.place)
    return rows


def _homes(
    owned: Sequence[Mapping[Var, Source]], shared: Sequence[Var], groups: Sequence[Sequence[int]]
) -> dict[Var, int | None]:
    homes: dict[Var, int | None] = dict.fromkeys(shared)
    for group in groups:
        homes.update(dict.fromkeys(owned[group[0]], group[0]))
    return homes


def build_prelude(
    program: Program,
    graph: StageGraph,
    groups: Sequence[Sequence[int]],
    owned: Sequence[Mapping[Var, Source]],
    shared: Sequence[Var],
) -> tuple[Rounds, list[dict[Var, Source]]]:
    """What each rank's stage programs read besides its own state, computed once; and where they find all of it."""
    everyone = {v: Source("shared", None, i) for i, v in enumerate(shared)}
    wanted: list[list[Var]] = []
    for rank in range(graph.num_ranks):
        read = [v for n in graph.nodes_on(rank) for v in graph.programs[n].invariants]
        stored = dict.fromkeys(expand_invariants(program, read)[1])
        wanted.append([v for v in stored if v not in owned[rank]])
    packing = pack_items([[item_of(v, 1) for v in row] for row in wanted])
    group = make_group(packing, [zip(p, row, strict=True) for p, row in zip(packing.places, wanted, strict=True)])
    before = [e for e in program.eqns if program.phase[e] == "before"]
    sources = [{**everyone, **row} for row in owned]
    rounds = build_rounds(before, _homes(owned, shared, groups), sources, [group], groups)
    found = []
    for rank, row in enumerate(wanted):
        mine = dict(owned[rank])
        mine.update((v, Source("prelude", p)) for v, p in zip(row, packing.places[rank], strict=True))
        found.append(mine)
    return rounds, found


def build_update(
    program: Program,
    graph: StageGraph,
    groups: Sequence[Sequence[int]],
    layouts: Sequence[StateLayout],
    totals: Packing,
    owned: Sequence[Mapping[Var, Source]],
    shared: Sequence[Var],
    state_outputs: Mapping[int, int],
) -> tuple[Rounds, Outputs]:
    """What happens after the last micro-batch: totals are complete, every rank updates what it owns."""
    sources: list[dict[Var, Source]] = [
        {**{v: Source("shared", None, i) for i, v in enumerate(shared)}, **row} for row in owned
    ]
    homes = _homes(owned, shared, groups)
    places_of = totals_places(graph, totals)
    for group in groups:
        for v, op in (key for rank in group[:1] for key in totals_on(graph, rank)):
            homes[v] = group[0]
            for rank in group:
                sources[rank][v] = Source("totals", places_of[v, op])
    eqns = [
        e for e in program.eqns if program.phase[e] in ("before", "linear", "after") or e.outputs[0] in program.late
    ]
    eqns = [e for e in eqns if program.phase[e] != "microbatch" and not any(v in homes for v in e.outputs)]
    eqns = _computable(eqns, homes)
    results, everywhere, hints = _new_state(program, layouts, state_outputs, graph.num_ranks)
    located: list[list[int]] = [[] for _ in range(graph.num_ranks)]
    peers = {rank: group for group in groups for rank in group}
    where = place_equations(eqns, homes, hints)
    for i, atom in enumerate(program.outputs):
        if i in state_outputs or program.is_batched(atom):
            continue
        home = where.get(atom) if isinstance(atom, Var) else None
        if home is None or is_small(atom):  # type: ignore[arg-type]
            everywhere.append(i)
        else:
            for rank in peers[home]:
                located[rank].append(i)
    packing = pack_items([[item_of(program.outputs[i], 1) for i in row] for row in located])  # type: ignore[arg-type]
    results.append(
        make_group(
            packing,
            [
                [(p, program.outputs[i]) for p, i in zip(places, row, strict=True)]
                for places, row in zip(packing.places, located, strict=True)
            ],
        )
    )
    wanted = [program.outputs[i] for i in everywhere]
    rounds = build_rounds(eqns, homes, sources, results, groups, wanted, hints)
    batched = tuple(i for i, a in enumerate(program.outputs) if program.is_batched(a))
    firsts = [group[0] for group in groups]
    places = tuple((i, r, p) for r in firsts for i, p in zip(located[r], packing.places[r], strict=True))
    return rounds, Outputs(batched, tuple(everywhere), places, packing, dict(state_outputs), len(results) - 1)


def _new_state(
    program: Program, layouts: Sequence[StateLayout], state_outputs: Mapping[int, int], num_ranks: int
) -> tuple[list[Group], list[int], dict[Var, int]]:
    """The new state as results of the update: groups of each updated argument, outputs that every rank keeps, and at
    which rank an owned leaf's new value is wanted."""
    output_of = {leaf: out for out, leaf in state_outputs.items()}
    groups, everywhere, hints = [], [], {}
    first = 0
    for layout in layouts:
        values: list[list[tuple[Place, Atom]]] = [[] for _ in range(num_ranks)]
        for k, leaf in enumerate(layout.leaves, first):
            if k not in output_of:
                continue
            atom = program.outputs[output_of[k]]
            if leaf.place is None:
                everywhere.append(output_of[k])
                continue
            for rank in leaf.ranks:
                values[rank].append((leaf.place, atom))
            if isinstance(atom, Var):
                hints[atom] = leaf.ranks[0]
        if first in output_of:
            groups.append(make_group(layout.packing, values))
        first += len(layout.leaves)
    return groups, everywhere, hints


def _computable(eqns: Sequence[Eqn], homes: Mapping[Var, int | None]) -> list[Eqn]:
    """The equations whose inputs are stored, or made by others of them."""
    known = set(homes)
    kept = []
    for eqn in eqns:
        if all(v in known for v in eqn.reads):
            kept.append(eqn)
            known.update(eqn.outputs)
    return kept
