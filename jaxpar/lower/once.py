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
from jaxpar.lower.totals import totals_places
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


def shared_values(program: Program, layouts: Sequence[StateLayout], early: Sequence[Eqn]) -> tuple[Var, ...]:
    state = iter(leaf for layout in layouts for leaf in layout.leaves)
    values = []
    for v, role in zip(program.inputs, program.roles, strict=True):
        if role == "state":
            if next(state).rank is None:
                values.append(v)
        elif not program.is_batched(v):
            values.append(v)
    return (*values, *program.consts, *(e.outputs[0] for e in early if e.name == "complete"))


def owned_sources(program: Program, layouts: Sequence[StateLayout], num_ranks: int) -> list[dict[Var, Source]]:
    state = iter(v for v, role in zip(program.inputs, program.roles, strict=True) if role == "state")
    rows: list[dict[Var, Source]] = [{} for _ in range(num_ranks)]
    for k, layout in enumerate(layouts):
        for leaf, v in zip(layout.leaves, state, strict=False):
            if leaf.rank is not None:
                rows[leaf.rank][v] = Source(f"state{k}", leaf.place)
    return rows


def _homes(owned: Sequence[Mapping[Var, Source]], shared: Sequence[Var]) -> dict[Var, int | None]:
    homes: dict[Var, int | None] = dict.fromkeys(shared)
    for rank, sources in enumerate(owned):
        homes.update(dict.fromkeys(sources, rank))
    return homes


def build_prelude(
    program: Program,
    graph: StageGraph,
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
    rounds = build_rounds(before, _homes(owned, shared), [{**everyone, **row} for row in owned], [group])
    found = []
    for rank, row in enumerate(wanted):
        sources = dict(owned[rank])
        sources.update((v, Source("prelude", p)) for v, p in zip(row, packing.places[rank], strict=True))
        found.append(sources)
    return rounds, found


def build_update(
    program: Program,
    graph: StageGraph,
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
    homes = _homes(owned, shared)
    for (v, _), place in totals_places(graph, totals).items():
        rank = graph.rank_of[graph.partial_home[v]]
        homes[v] = rank
        sources[rank][v] = Source("totals", place)
    eqns = [
        e for e in program.eqns if program.phase[e] in ("before", "linear", "after") or e.outputs[0] in program.late
    ]
    eqns = [e for e in eqns if program.phase[e] != "microbatch" and not any(v in homes for v in e.outputs)]
    eqns = _computable(eqns, homes)
    groups, everywhere, hints = _new_state(program, layouts, state_outputs, graph.num_ranks)
    located: list[list[int]] = [[] for _ in range(graph.num_ranks)]
    where = place_equations(eqns, homes, hints)
    for i, atom in enumerate(program.outputs):
        if i in state_outputs or program.is_batched(atom):
            continue
        home = where.get(atom) if isinstance(atom, Var) else None
        if home is None or is_small(atom):  # type: ignore[arg-type]
            everywhere.append(i)
        else:
            located[home].append(i)
    packing = pack_items([[item_of(program.outputs[i], 1) for i in row] for row in located])  # type: ignore[arg-type]
    groups.append(
        make_group(
            packing,
            [
                [(p, program.outputs[i]) for p, i in zip(places, row, strict=True)]
                for places, row in zip(packing.places, located, strict=True)
            ],
        )
    )
    rounds = build_rounds(eqns, homes, sources, groups, [program.outputs[i] for i in everywhere], hints)
    batched = tuple(i for i, a in enumerate(program.outputs) if program.is_batched(a))
    places = tuple((i, r, p) for r, row in enumerate(located) for i, p in zip(row, packing.places[r], strict=True))
    return rounds, Outputs(batched, tuple(everywhere), places, packing, dict(state_outputs), len(groups) - 1)


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
            if leaf.rank is None or leaf.place is None:
                everywhere.append(output_of[k])
                continue
            values[leaf.rank].append((leaf.place, atom))
            if isinstance(atom, Var):
                hints[atom] = leaf.rank
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
