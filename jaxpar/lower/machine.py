"""The SPMD machine: one program for all ranks, one scan over the timetable's ticks.

    totals of the batch alone -> prelude (each rank's invariants)
        -> scan over ticks { exchange; switch over stage programs; deliver }
        -> one reduction over replicas (of the data axis, of each group of ranks) -> update rounds

`build_machine` is read from top to bottom; everything that it decides is data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpar.lower.axes import Axes
from jaxpar.lower.branches import (
    BRANCH,
    FIRST_COLUMN,
    MICROBATCH,
    ROW,
    STORE,
    Branch,
    Storage,
    make_branch,
    register_values,
)
from jaxpar.lower.channels import Routing, colour_channels
from jaxpar.lower.layout import StateLayout
from jaxpar.lower.once import (
    Outputs,
    batch_inputs,
    batched_outputs,
    build_prelude,
    build_update,
    owned_sources,
    shared_values,
)
from jaxpar.lower.packing import Packing
from jaxpar.lower.replicas import replicate_stages
from jaxpar.lower.rounds import Rounds
from jaxpar.lower.slots import Mail, Residuals, allocate_mailboxes, allocate_residuals
from jaxpar.lower.staging import Staging, plan_staging
from jaxpar.lower.totals import Doubling, early_eqns, pack_totals, plan_doubling, totals_places
from jaxpar.plan import Node, StageGraph
from jaxpar.schedule import Timetable
from jaxpar.trace import Eqn, Program, Var


@dataclass(frozen=True, eq=False)
class Machine:
    program: Program
    graph: StageGraph
    timetable: Timetable
    axes: Axes
    groups: tuple[tuple[int, ...], ...]  # ranks that are replicas of each other
    layouts: tuple[StateLayout, ...]  # of the state arguments
    routing: Routing
    residuals: Residuals
    mail: Mail
    branches: tuple[Branch, ...]
    staging: Staging | None  # of residuals, where the compiler needs it
    registers: np.ndarray  # [ticks, ranks, columns]
    arrivals: np.ndarray  # [ticks, ranks, mailboxes]
    totals: Packing
    doubling: tuple[Doubling, ...]  # the rounds that complete totals over each group
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
    program: Program,
    graph: StageGraph,
    timetable: Timetable,
    axes: Axes,
    groups: Sequence[Sequence[int]],
    layouts: Sequence[StateLayout],
    state_outputs: Mapping[int, int],
    staged: bool,
) -> Machine:
    """Lower a plan.

    Args:
        graph: stages on groups of ranks.
        timetable: of these groups.
        groups: of each group, its ranks.
        layouts: of the state arguments; their leaves, in order, are the program's state inputs.
        state_outputs: number of the state input that an output is the new value of.
        staged: keep residuals by way of a staging area.
    """
    replication = replicate_stages(graph, groups)
    graph, timetable = replication.graph, replication.timetable(timetable)
    routing = colour_channels(graph)
    residuals = allocate_residuals(graph, timetable)
    mail = allocate_mailboxes(graph, timetable, routing)
    totals = pack_totals(graph)
    early = early_eqns(program)
    shared = shared_values(program, layouts, early)
    owned = owned_sources(program, layouts, axes.num_ranks)
    prelude, invariants = build_prelude(program, graph, groups, owned, shared)
    storage = Storage(
        residuals,
        mail,
        invariants,
        {v: i for i, v in enumerate(batch_inputs(program))},
        {v: (place, tag) for (v, tag), place in totals_places(graph, totals).items()},
        {v: k for k, v in enumerate(batched_outputs(program))},
    )
    microbatch = program.num_examples // (axes.replicas * timetable.num_microbatches)
    branches, staging, registers = _build_branches(graph, timetable, storage, microbatch)
    arrivals = (
        np.stack([box.arrival for box in mail.boxes], -1)
        if mail.boxes
        else np.zeros((*registers.shape[:2], 0), np.int32)
    )
    update, outputs = build_update(program, graph, groups, layouts, totals, owned, shared, state_outputs)
    return Machine(
        program,
        graph,
        timetable,
        axes,
        tuple(map(tuple, groups)),
        tuple(layouts),
        routing,
        residuals,
        mail,
        branches,
        staging if staged else None,
        registers,
        arrivals,
        totals,
        plan_doubling(groups),
        early,
        prelude,
        update,
        outputs,
        shared,
    )


def _build_branches(
    graph: StageGraph, timetable: Timetable, storage: Storage, microbatch: int
) -> tuple[tuple[Branch, ...], Staging, np.ndarray]:
    """The distinct branches, the distinct places of their residuals, and the table of registers. Number 0 is idling."""
    nodes: set[Node] = {(a.kind, a.stage) for row in timetable.grid for a in row if a is not None and a.kind != "U"}
    made = {node: make_branch(graph, node, storage) for node in sorted(nodes, key=lambda n: ("FBIW".index(n[0]), n[1]))}
    number: dict[str, int] = {}
    branch_of = {node: number.setdefault(b.key, len(number)) for node, b in made.items()}
    kept = [next(made[n] for n in made if branch_of[n] == i) for i in range(len(number))]
    staging = plan_staging(kept, storage.residuals.rings)
    width = FIRST_COLUMN + max(len(b.columns) for b in made.values())
    table = np.zeros((timetable.num_ticks, timetable.dag.num_ranks, width), np.int32)
    for tick, row in enumerate(timetable.grid):
        for rank, action in enumerate(row):
            if action is None or action.kind == "U":  # all ranks update after the last tick
                continue
            node: Node = (action.kind, action.stage)
            values = register_values(made[node], action.microbatch, storage.residuals, storage.mail)
            table[tick, rank, BRANCH] = 1 + branch_of[node]
            table[tick, rank, STORE] = staging.number_of.get(kept[branch_of[node]], 0)
            table[tick, rank, MICROBATCH] = action.microbatch
            table[tick, rank, ROW] = action.microbatch * microbatch + graph.shares[action.stage].first
            table[tick, rank, FIRST_COLUMN : FIRST_COLUMN + len(values)] = values
    return tuple(kept), staging, table
