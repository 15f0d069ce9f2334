"""The SPMD machine: one program for all ranks, one scan over the timetable's ticks.

    totals of the batch alone -> prelude (each rank's invariants)
        -> scan over ticks { exchange; switch over stage programs; deliver }
        -> one reduction over replicas -> update rounds

`build_machine` is read from top to bottom; everything that it decides is data, and `Machine.run` only follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.lower.branches import (
    BRANCH,
    FIRST_COLUMN,
    MICROBATCH,
    STORE,
    Branch,
    Carry,
    Storage,
    make_branch,
    register_values,
    run_branch,
    store_layout,
    store_residuals,
)
from jaxpar.lower.channels import Routing, colour_channels
from jaxpar.lower.evaluate import Env, Rows, evaluate
from jaxpar.lower.invariants import expand_invariants
from jaxpar.lower.layout import StateLayout
from jaxpar.lower.packing import Item, Packing, Place, pack_items
from jaxpar.lower.rounds import Group, Rounds, Source, build_rounds, is_small, place_equations, run_rounds
from jaxpar.lower.slots import Mail, Residuals, RingPlace, allocate_mailboxes, allocate_residuals, item_of
from jaxpar.plan import StageGraph
from jaxpar.schedule import Timetable
from jaxpar.trace import Atom, Eqn, Program, Var

_REDUCE = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}
_IDENTITY = {"sum": 0, "prod": 1, "or": 0}


@dataclass(frozen=True)
class Axes:
    """Names and sizes of the mesh axes that the machine handles. `data` is None for a mesh without replicas."""

    stage: str
    num_ranks: int
    data: str | None
    replicas: int

    @property
    def manual(self) -> frozenset[str]:
        return frozenset({self.stage} | ({self.data} if self.data else set()))


@dataclass(frozen=True, eq=False)
class Outputs:
    """How the step's outputs leave the machine, by index of the output."""

    batched: tuple[int, ...]
    everywhere: tuple[int, ...]
    located: tuple[tuple[int, int, Place], ...]  # (output, rank, place)
    located_packing: Packing
    state: Mapping[int, int]  # output -> number of the state input
    num_updated: int  # state arguments that have a new value among the outputs


@dataclass(frozen=True, eq=False)
class Machine:
    program: Program
    graph: StageGraph
    timetable: Timetable
    axes: Axes
    microbatch: int
    layouts: tuple[StateLayout, ...]  # of the state arguments
    routing: Routing
    residuals: Residuals
    mail: Mail
    branches: tuple[Branch, ...]
    stores: tuple[tuple[tuple[int, RingPlace], ...], ...]  # distinct places of an action's residuals, if staged
    registers: np.ndarray  # [ticks, ranks, columns]
    arrivals: np.ndarray  # [ticks, ranks, mailboxes]
    totals: Packing
    early: tuple[Eqn, ...]  # totals that depend on the batch alone, with what is behind them
    prelude: Rounds
    update: Rounds
    outputs: Outputs
    shared: tuple[Var, ...]  # values that every rank has: inputs, constants, early totals

    @property
    def num_stage_programs(self) -> int:
        """Distinct branches of the switch, idling not counted."""
        return len(self.branches)


def build_machine(
    program: Program, graph: StageGraph, timetable: Timetable, axes: Axes, microbatch: int,
    layouts: Sequence[StateLayout], state_outputs: Mapping[int, int], staged: bool,
) -> Machine:
    """Lower a plan.

    Args:
        layouts: of the state arguments; their leaves, in order, are the program's state inputs.
        state_outputs: number of the state input that an output is the new value of.
        staged: let a second conditional copy residuals to the rings, for compilers that would copy whole rings otherwise.
    """
    rank_of = timetable.dag.rank_of
    routing = colour_channels(graph, rank_of)
    residuals = allocate_residuals(graph, timetable, microbatch)
    mail = allocate_mailboxes(graph, timetable, routing, microbatch)
    totals = _pack_totals(graph, rank_of, axes.num_ranks)
    early = _early_eqns(program)
    shared = _shared_values(program, layouts, early)
    owned = _owned_sources(program, layouts, axes.num_ranks)
    prelude, invariants = _build_prelude(program, graph, rank_of, owned, shared, axes.num_ranks)
    storage = Storage(
        residuals, mail, invariants, {v: i for i, v in enumerate(batch_inputs(program))},
        {v: (place, tag) for (v, tag), place in _totals_places(graph, rank_of, totals).items()},
        {v: k for k, v in enumerate(_batched_outputs(program))},
    )
    branches, stores, registers = _build_branches(graph, timetable, storage)
    arrivals = np.stack([box.arrival for box in mail.boxes], -1) if mail.boxes else np.zeros((*registers.shape[:2], 0), np.int32)
    update, outputs = _build_update(program, graph, layouts, rank_of, totals, owned, shared, state_outputs, axes.num_ranks)
    return Machine(
        program, graph, timetable, axes, microbatch, tuple(layouts), routing, residuals, mail, branches, stores if staged else (), registers, arrivals, totals,
        early, prelude, update, outputs, shared,
    )


# -- totals ------------------------------------------------------------------------------------------------------------


def _total_item(v: Var, op: str) -> Item:
    """Sums of half-precision values are accumulated in single precision."""
    item = item_of(v, 1)
    half = item.dtype in (np.dtype(np.float16), np.dtype(jnp.bfloat16))
    return Item(item.shape, np.dtype(np.float32) if half and op == "sum" else item.dtype, tag=op)


def _node_totals(graph: StageGraph, rank: int, rank_of: Sequence[int]) -> list[Var]:
    nodes = sorted((n for n in graph.programs if rank_of[n[1]] == rank), key=lambda n: (n[1], n[0] != "F"))
    return [v for n in nodes for v in graph.programs[n].partials]


def _op(program: Program, v: Var) -> str:
    return program.types[v].op  # type: ignore[union-attr]


def _pack_totals(graph: StageGraph, rank_of: Sequence[int], num_ranks: int) -> Packing:
    rows = [[_total_item(v, _op(graph.program, v)) for v in _node_totals(graph, r, rank_of)] for r in range(num_ranks)]
    return pack_items(rows)


def _totals_places(graph: StageGraph, rank_of: Sequence[int], totals: Packing) -> dict[tuple[Var, str], Place]:
    return {
        (v, _op(graph.program, v)): place
        for rank, places in enumerate(totals.places)
        for v, place in zip(_node_totals(graph, rank, rank_of), places, strict=True)
    }


def _early_eqns(program: Program) -> tuple[Eqn, ...]:
    """Totals that depend on the batch alone, and the equations behind them: computed before the pipeline starts."""
    wanted: set[Var] = set()
    eqns = []
    for eqn in reversed(program.eqns):
        total = eqn.name == "complete" and eqn.outputs[0] not in program.late
        if total or not wanted.isdisjoint(eqn.outputs):
            eqns.append(eqn)
            wanted.update(eqn.reads)
    return tuple(reversed(eqns))


# -- where values are --------------------------------------------------------------------------------------------------


def batch_inputs(program: Program) -> list[Var]:
    return [v for v, role in zip(program.inputs, program.roles, strict=True) if role == "batch" and program.is_batched(v)]


def _batched_outputs(program: Program) -> list[Var]:
    return list(dict.fromkeys(v for v in program.outputs if isinstance(v, Var) and program.is_batched(v)))


def _shared_values(program: Program, layouts: Sequence[StateLayout], early: Sequence[Eqn]) -> tuple[Var, ...]:
    state = iter(leaf for layout in layouts for leaf in layout.leaves)
    values = []
    for v, role in zip(program.inputs, program.roles, strict=True):
        if role == "state":
            if next(state).rank is None:
                values.append(v)
        elif not program.is_batched(v):
            values.append(v)
    return (*values, *program.consts, *(e.outputs[0] for e in early if e.name == "complete"))


def _owned_sources(program: Program, layouts: Sequence[StateLayout], num_ranks: int) -> list[dict[Var, Source]]:
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


def _build_prelude(
    program: Program, graph: StageGraph, rank_of: Sequence[int], owned: Sequence[Mapping[Var, Source]],
    shared: Sequence[Var], num_ranks: int,
) -> tuple[Rounds, list[dict[Var, Source]]]:
    """What each rank's stage programs read besides its own state, computed once; and where they find all of it."""
    everyone = {v: Source("shared", None, i) for i, v in enumerate(shared)}
    wanted: list[list[Var]] = []
    for rank in range(num_ranks):
        nodes = sorted((n for n in graph.programs if rank_of[n[1]] == rank), key=lambda n: (n[1], n[0] != "F"))
        stored = dict.fromkeys(v for n in nodes for v in expand_invariants(program, graph.programs[n].invariants)[1])
        wanted.append([v for v in stored if v not in owned[rank]])
    packing = pack_items([[item_of(v, 1) for v in row] for row in wanted])
    group = Group(packing, packing.places, tuple(map(tuple, wanted)))
    before = [e for e in program.eqns if program.phase[e] == "before"]
    rounds = build_rounds(before, _homes(owned, shared), [{**everyone, **row} for row in owned], [group])
    found = []
    for rank, row in enumerate(wanted):
        sources = dict(owned[rank])
        sources.update((v, Source("prelude", p)) for v, p in zip(row, packing.places[rank], strict=True))
        found.append(sources)
    return rounds, found


def _build_branches(
    graph: StageGraph, timetable: Timetable, storage: Storage
) -> tuple[tuple[Branch, ...], tuple[tuple[tuple[int, RingPlace], ...], ...], np.ndarray]:
    """The distinct branches, the distinct places of their residuals, and the table of registers. Number 0 is idling."""
    rank_of = timetable.dag.rank_of
    made = {node: make_branch(graph, node, rank_of[node[1]], storage) for node in graph.programs}
    number: dict[str, int] = {}
    branch_of = {node: number.setdefault(b.key, len(number)) for node, b in made.items()}
    kept = [next(made[n] for n in made if branch_of[n] == i) for i in range(len(number))]
    stores = tuple(dict.fromkeys(layout for b in made.values() if (layout := store_layout(b))))
    width = FIRST_COLUMN + max(len(b.columns) for b in made.values())
    table = np.zeros((timetable.num_ticks, timetable.dag.num_ranks, width), np.int32)
    for tick, row in enumerate(timetable.grid):
        for rank, action in enumerate(row):
            if action is None:
                continue
            node = (action.kind, action.stage)
            values = register_values(made[node], action.microbatch, storage.residuals, storage.mail)
            table[tick, rank, BRANCH] = 1 + branch_of[node]
            if layout := store_layout(made[node]):
                table[tick, rank, STORE] = 1 + stores.index(layout)
            table[tick, rank, MICROBATCH] = action.microbatch
            table[tick, rank, FIRST_COLUMN : FIRST_COLUMN + len(values)] = values
    return tuple(kept), stores, table


def _build_update(
    program: Program, graph: StageGraph, layouts: Sequence[StateLayout], rank_of: Sequence[int], totals: Packing,
    owned: Sequence[Mapping[Var, Source]], shared: Sequence[Var], state_outputs: Mapping[int, int], num_ranks: int,
) -> tuple[Rounds, Outputs]:
    """What happens after the last micro-batch: totals are complete, every rank updates what it owns."""
    sources: list[dict[Var, Source]] = [
        {**{v: Source("shared", None, i) for i, v in enumerate(shared)}, **row} for row in owned
    ]
    homes = _homes(owned, shared)
    for (v, _), place in _totals_places(graph, rank_of, totals).items():
        rank = rank_of[graph.partial_home[v]]
        homes[v] = rank
        sources[rank][v] = Source("totals", place)
    eqns = [e for e in program.eqns if program.phase[e] in ("before", "linear", "after") or e.outputs[0] in program.late]
    eqns = [e for e in eqns if program.phase[e] != "microbatch" and not any(v in homes for v in e.outputs)]
    eqns = _computable(eqns, homes)
    groups, everywhere, hints = _new_state(program, layouts, state_outputs, num_ranks)
    located: list[list[int]] = [[] for _ in range(num_ranks)]
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
    groups.append(Group(packing, packing.places, tuple(tuple(program.outputs[i] for i in row) for row in located)))
    rounds = build_rounds(eqns, homes, sources, groups, [program.outputs[i] for i in everywhere], hints)
    batched = tuple(i for i, a in enumerate(program.outputs) if program.is_batched(a))
    places = tuple((i, r, p) for r, row in enumerate(located) for i, p in zip(row, packing.places[r], strict=True))
    return rounds, Outputs(batched, tuple(everywhere), places, packing, dict(state_outputs), len(groups) - 1)


def _new_state(
    program: Program, layouts: Sequence[StateLayout], state_outputs: Mapping[int, int], num_ranks: int
) -> tuple[list[Group], list[int], dict[Var, int]]:
    """The new state as results of the update: groups of each updated argument, outputs that every rank keeps, and at which
    rank an owned leaf's new value is wanted."""
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
            groups.append(_group(layout.packing, values))
        first += len(layout.leaves)
    return groups, everywhere, hints


def _group(packing: Packing, values: Sequence[Sequence[tuple[Place, Atom]]]) -> Group:
    return Group(packing, tuple(tuple(p for p, _ in row) for row in values), tuple(tuple(v for _, v in row) for row in values))


def _computable(eqns: Sequence[Eqn], homes: Mapping[Var, int | None]) -> list[Eqn]:
    """The equations whose inputs are stored, or made by others of them."""
    known = set(homes)
    kept = []
    for eqn in eqns:
        if all(v in known for v in eqn.reads):
            kept.append(eqn)
            known.update(eqn.outputs)
    return kept


# -- run time ----------------------------------------------------------------------------------------------------------


def run_machine(machine: Machine, state: Sequence[Sequence[Any]], shared: Sequence[Any], batch: Sequence[Any]) -> tuple[list, list, list, list]:
    """The step on one rank, inside `shard_map`.

    Args:
        state: this rank's buffers of each state argument.
        shared: values of the inputs that every rank has.
        batch: this replica's rows of each batch leaf.

    Returns: new buffers of each updated state argument, results that every rank has, buffers of located results, per-example results `[M, ...]`.
    """
    axes, program = machine.axes, machine.program
    rank = lax.axis_index(axes.stage)
    replica = lax.axis_index(axes.data) if axes.data else 0
    local = program.num_examples // axes.replicas
    first = jnp.asarray(replica * local, jnp.int32)
    everyone = [*shared, *map(jnp.asarray, program.consts.values())]
    everyone += _run_early_totals(machine, everyone, batch, Rows(local, program.num_examples, first, axes.manual))
    once = Rows(program.num_examples, program.num_examples, jnp.int32(0), axes.manual)
    stored: dict[str, Sequence[Any]] = {"shared": everyone}
    stored.update((f"state{k}", buffers) for k, buffers in enumerate(state))
    (prelude,), _ = run_rounds(machine.prelude, stored, once, rank, axes.stage)
    stored["prelude"] = prelude
    carry = _run_ticks(machine, stored, batch, first)
    stored["totals"] = [_reduce(x, item.tag, axes) for x, item in zip(carry["totals"], machine.totals.buffers, strict=True)]
    groups, everywhere = run_rounds(machine.update, stored, once, rank, axes.stage)
    return groups[:-1], everywhere, groups[-1], carry["outputs"]


def _run_early_totals(machine: Machine, everyone: Sequence[Any], batch: Sequence[Any], rows: Rows) -> list[Any]:
    program = machine.program
    env: Env = dict(zip(machine.shared, everyone, strict=False))
    env.update(zip(batch_inputs(program), batch, strict=True))
    for eqn in machine.early:
        if eqn.name == "complete":
            env[eqn.outputs[0]] = _reduce(env[eqn.reads[0]], eqn.params["op"], machine.axes)
        else:
            evaluate([eqn], env, rows)
    return [env[eqn.outputs[0]] for eqn in machine.early if eqn.name == "complete"]


def _run_ticks(machine: Machine, stored: Mapping[str, Sequence[Any]], batch: Sequence[Any], first: Any) -> Carry:
    axes, mail, n = machine.axes, machine.mail, machine.microbatch
    rank = lax.axis_index(axes.stage)
    # unsigned, so that indexing with them need not look out for negative ones
    registers = jnp.asarray(machine.registers, jnp.uint32)[:, rank]
    arrivals = jnp.asarray(machine.arrivals, jnp.uint32)[:, rank]

    def exchange(sent: Sequence[Sequence[Any]]) -> list[list[Any]]:
        pairs = [machine.routing.channels[box.channel].pairs for box in mail.boxes]
        return [[lax.ppermute(x, axes.stage, p) for x in payload] for payload, p in zip(sent, pairs, strict=True)]

    def act(row: Any, carry: Carry) -> Carry:
        rows = Rows(n, machine.program.num_examples, first + lax.convert_element_type(row[MICROBATCH] * n, jnp.int32), axes.manual)
        fresh = partial(_fresh_staging, machine)  # made inside the branches: what they don't fill, they needn't pass on
        branches = [lambda c: {**c, **fresh()}]
        branches += [lambda c, b=b: run_branch(b, row, {**c, **fresh()}, stored, batch, mail, rows) for b in machine.branches]
        return lax.switch(lax.convert_element_type(row[BRANCH], jnp.int32), branches, carry)

    def store(row: Any, rings: list[Any], staging: list[Any]) -> list[Any]:
        for k, places in enumerate(machine.stores, 1):  # one conditional each: with two writers in one, rings are copied again
            write = partial(store_residuals, places, row)
            rings = lax.cond(row[STORE] == k, write, lambda rings, _: rings, rings, staging)
        return rings

    def tick(carry: Carry, xs: tuple[Any, Any]) -> tuple[Carry, None]:
        row, slots = xs
        early = exchange(carry["sent"]) if machine.timetable.exchange == 2 else None
        carry = act(row, carry)
        if machine.stores:
            carry["rings"] = store(row, carry["rings"], carry.pop("staging"))
        received = early if early is not None else exchange(carry["sent"])
        carry["mail"] = [
            [lax.dynamic_update_index_in_dim(box, x, slots[k], 0) for box, x in zip(boxes, payload, strict=True)]
            for k, (boxes, payload) in enumerate(zip(carry["mail"], received, strict=True))
        ]
        return carry, None

    carry, _ = lax.scan(tick, _initial_carry(machine), (registers, arrivals))
    return carry


def _initial_carry(machine: Machine) -> Carry:
    n, count = machine.microbatch, machine.timetable.num_microbatches
    boxes = machine.mail.boxes
    outputs = []
    for v in _batched_outputs(machine.program):
        item = item_of(v, n)
        outputs.append(jnp.zeros((count, *item.shape), item.dtype))
    return {
        "totals": [_identity(item) for item in machine.totals.buffers],
        "rings": [jnp.zeros(r.shape, r.dtype) for r in machine.residuals.rings],
        "mail": [[jnp.zeros((box.rows, *i.shape), i.dtype) for i in box.packing.buffers] for box in boxes],
        "sent": [[jnp.zeros(i.shape, i.dtype) for i in box.packing.buffers] for box in boxes],
        "outputs": outputs,
    }


def _fresh_staging(machine: Machine) -> Carry:
    """For each ring, room for one micro-batch's residuals: values for a ring of rows, elements for a flat one."""
    if not machine.stores:
        return {}
    places = [place for layout in machine.stores for _, place in layout]
    staging: list[Any] = []
    for k, ring in enumerate(machine.residuals.rings):
        mine = [p for p in places if p.ring == k]
        if mine and mine[0].flat:
            staging.append(jnp.zeros(max(p.index + math.prod(p.shape) for p in mine), ring.dtype))
        else:
            staging.append([jnp.zeros(ring.shape[1:], ring.dtype)] * max((p.index + 1 for p in mine), default=0))
    return {"staging": staging}


def _identity(item: Item) -> Any:
    op = item.tag
    assert isinstance(op, str)
    if op in _IDENTITY:
        return jnp.full(item.shape, _IDENTITY[op], item.dtype)
    if op == "and":
        return jnp.full(item.shape, -1 if item.dtype.kind in "iu" else True, item.dtype)
    if item.dtype.kind in "iu":
        info = np.iinfo(item.dtype)
        return jnp.full(item.shape, info.min if op == "max" else info.max, item.dtype)
    return jnp.full(item.shape, -np.inf if op == "max" else np.inf, item.dtype)


def _reduce(x: Any, op: Any, axes: Axes) -> Any:
    """The reduction over replicas."""
    if axes.data is None or axes.replicas == 1:
        return x
    if op in _REDUCE:
        return _REDUCE[op](x, axes.data)
    gathered = lax.all_gather(x, axes.data)
    return {"prod": jnp.prod, "and": jnp.bitwise_and.reduce, "or": jnp.bitwise_or.reduce}[op](gathered, axis=0)
