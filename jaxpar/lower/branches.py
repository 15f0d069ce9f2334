"""Stage programs as branches of one switch.

Each (stage, action) becomes a branch that reads its registers, rings and mailboxes, evaluates its equations, and
writes. What differs between equal stages (which row, which micro-batch) comes from the timetable's table of
registers, so equal stages share one branch, however many layers there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpar import _jax
from jaxpar.lower.evaluate import Env, Rows, evaluate
from jaxpar.lower.invariants import expand_invariants
from jaxpar.lower.packing import Place, add_to_buffers, fill_buffers, keep_whole, read_place
from jaxpar.lower.rounds import Source
from jaxpar.lower.slots import Mail, Residuals, RingPlace
from jaxpar.lower.totals import COMBINE
from jaxpar.plan import Bundle, Node, StageGraph
from jaxpar.trace import Eqn, Var
from jaxpar.trace.fingerprint import fingerprint_eqns

Carry = dict[str, list[Any]]

# Columns of the table of registers: which branch, which way to store residuals, the number of the micro-batch, its
# first row in the replica's batch, and then where values are.
BRANCH, STORE, MICROBATCH, ROW, FIRST_COLUMN = 0, 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class Branch:
    """One action of one stage, in terms of buffers and columns of the register table."""

    node: Node
    examples: int  # that it works on
    eqns: tuple[Eqn, ...]
    invariants: tuple[tuple[Var, Source], ...]
    batch: tuple[tuple[Var, int], ...]
    ring_reads: tuple[tuple[Var, int, RingPlace], ...]  # (value, first column of its bundle, place)
    ring_writes: tuple[tuple[Var, int, RingPlace], ...]
    mail_reads: tuple[tuple[Var, int, int, Place], ...]  # (value, column, mailbox, place)
    sends: tuple[tuple[int, tuple[tuple[Var, Place], ...]], ...]  # per mailbox
    partials: tuple[tuple[Var, Place, str], ...]
    outputs: tuple[tuple[Var, int], ...]
    columns: tuple[tuple[str, Bundle], ...]  # where the columns after the first come from

    @property
    def key(self) -> str:
        reads = [v for group in (self.invariants, self.batch, self.ring_reads, self.mail_reads) for v, *_ in group]
        writes = [v for v, *_ in self.ring_writes] + [v for _, values in self.sends for v, _ in values]
        writes += [v for v, *_ in self.partials] + [v for v, _ in self.outputs]
        text = fingerprint_eqns(reads, self.eqns, writes)
        groups: tuple[tuple[tuple[Any, ...], ...], ...] = (
            self.invariants, self.batch, self.ring_reads, self.mail_reads, self.ring_writes, self.partials, self.outputs
        )  # fmt: skip
        rest = [[entry[1:] for entry in group] for group in groups]
        return f"{self.examples} {text} {rest} {[(box, [p for _, p in values]) for box, values in self.sends]}"


@dataclass(frozen=True, eq=False)
class Storage:
    """Where everything that a branch touches is."""

    residuals: Residuals
    mail: Mail
    invariants: Sequence[Mapping[Var, Source]]  # by rank
    batch: Mapping[Var, int]
    partials: Mapping[Var, tuple[Place, str]]
    outputs: Mapping[Var, int]


def make_branch(graph: StageGraph, node: Node, storage: Storage) -> Branch:
    """The branch of a program of the graph, or of I and W of a stage as one action."""
    kind, stage = node
    together = kind == "B" and graph.is_split
    program = graph.whole[stage] if together else graph.programs[node]
    parts = {("I", stage), ("W", stage)} if together else {node}
    inline, stored = expand_invariants(graph.program, program.invariants)
    columns: list[tuple[str, Bundle]] = []
    start: dict[Bundle, int] = {}
    ring_reads, ring_writes, mail_reads = [], [], []
    sends: dict[int, list[tuple[Var, Place]]] = {}

    def columns_of(kind: str, bundle: Bundle) -> int:
        if bundle not in start:
            start[bundle] = FIRST_COLUMN + len(columns)
            width = 1 if kind == "mail" else len({p.column for p in storage.residuals.places[bundle]})
            columns.extend([(kind, bundle)] * width)
        return start[bundle]

    wanted = set(program.reads)
    for b in graph.bundles:
        inside = parts.issuperset((b.source, *b.readers))
        if b.stage == stage and not parts.isdisjoint(b.readers):
            for j, v in enumerate(b.values):
                if v not in wanted:
                    continue
                if graph.changes_rank(b):
                    box, edge = storage.mail.box_of[b], storage.mail.edge_of[b]
                    place = storage.mail.boxes[box].packing.places[edge][j]
                    mail_reads.append((v, columns_of("mail", b), box, place))
                else:
                    ring_reads.append((v, columns_of("ring", b), storage.residuals.places[b][j]))
                wanted.discard(v)
        if b.source in parts and not graph.changes_rank(b) and not inside:
            ring_writes += [
                (v, columns_of("ring", b), p) for v, p in zip(b.values, storage.residuals.places[b], strict=True)
            ]
        if b.source in parts and graph.changes_rank(b):
            box, edge = storage.mail.box_of[b], storage.mail.edge_of[b]
            places = storage.mail.boxes[box].packing.places[edge]
            sends.setdefault(box, []).extend(zip(b.values, places, strict=True))
    return Branch(
        node,
        graph.shares[stage].count,
        (*inline, *program.eqns),
        tuple((v, storage.invariants[graph.rank_of[stage]][v]) for v in stored),
        tuple((v, storage.batch[v]) for v in program.batch),
        tuple(ring_reads),
        tuple(ring_writes),
        tuple(mail_reads),
        tuple((box, tuple(values)) for box, values in sorted(sends.items())),
        tuple((v, *storage.partials[v]) for v in program.partials),
        tuple((v, storage.outputs[v]) for v in program.outputs),
        tuple(columns),
    )


def register_values(branch: Branch, microbatch: int, residuals: Residuals, mail: Mail) -> list[int]:
    """The columns from `FIRST_COLUMN` on, for one micro-batch."""
    values: list[int] = []
    done: set[Bundle] = set()
    for kind, bundle in branch.columns:
        if bundle in done:
            continue
        done.add(bundle)
        if kind == "mail":
            values.append(mail.row[bundle, microbatch])
        else:
            values.extend(residuals.columns[bundle, microbatch])
    return values


# -- run time ----------------------------------------------------------------------------------------------------------


def run_branch(
    branch: Branch,
    registers: Any,
    carry: Carry,
    stored: Mapping[str, Sequence[Any]],
    batch: Sequence[Any],
    mail: Mail,
    rows: Rows,
    store: Sequence[tuple[int, int, RingPlace]] | None,
) -> Carry:
    """Evaluate one action.

    Args:
        rows: `rows.first` is that of the micro-batch.
        store: where to leave residuals for `Staging.store`, instead of writing them to the rings.
    """
    carry = {name: list(buffers) for name, buffers in carry.items()}
    column = functools.cache(lambda k: registers[k])  # most values of a bundle are in the same row of their rings
    env: Env = {}
    for v, source in branch.invariants:
        assert source.place is not None
        env[v] = _jax.wrap_key(read_place(stored[source.group], source.place), v.dtype)
    for v, leaf in branch.batch:
        env[v] = lax.dynamic_slice_in_dim(batch[leaf], registers[ROW], rows.count)
    for v, first, place in branch.ring_reads:
        ring = carry["rings"][place.ring]
        raw, carry["rings"][place.ring] = _read_ring(ring, column(first + place.column), place)
        env[v] = _jax.wrap_key(raw, v.dtype)
    for v, first, box, slot in branch.mail_reads:
        raw, carry["mail"][box] = _read_mail(carry["mail"][box], column(first), slot)
        env[v] = _jax.wrap_key(raw, v.dtype)
    evaluate(branch.eqns, env, rows)
    for i, (v, first, place) in enumerate(branch.ring_writes):
        value = _jax.unwrap_key(env[v])
        if store is not None:
            carry["staging"][store[i][0]] = value
        else:
            ring = carry["rings"][place.ring]
            carry["rings"][place.ring] = write_ring(ring, column(first + place.column), place, value)
    for box, values in branch.sends:
        packing = mail.boxes[box].packing
        payload = [keep_whole(_jax.unwrap_key(env[v])) for v, _ in values]
        carry["sent"][box] = fill_buffers(packing, [place for _, place in values], payload)
    for op in dict.fromkeys(op for *_, op in branch.partials):
        chosen = [(place, env[v]) for v, place, o in branch.partials if o == op]
        places, partials = zip(*chosen, strict=True)
        carry["totals"] = add_to_buffers(carry["totals"], places, partials, COMBINE[op])
    for v, index in branch.outputs:
        buffer = carry["outputs"][index]
        value = _jax.unwrap_key(env[v])[None].astype(buffer.dtype)
        carry["outputs"][index] = lax.dynamic_update_slice_in_dim(buffer, value, registers[MICROBATCH], 0)
    return carry


def _read_ring(ring: Any, at: Any, place: RingPlace) -> tuple[Any, Any]:
    if place.offset is None:
        value = lax.dynamic_index_in_dim(ring, at, keepdims=False)
    else:
        value = lax.dynamic_slice_in_dim(keep_whole(ring), at + place.offset, math.prod(place.shape))
        value = keep_whole(value).reshape(place.shape)
    # Without the barrier XLA:CPU copies the whole ring in every branch: it can't see that the read comes before the
    # write.
    return lax.optimization_barrier((value, ring))


def write_ring(ring: Any, at: Any, place: RingPlace, value: Any) -> Any:
    if place.offset is None:
        return lax.dynamic_update_index_in_dim(ring, value, at, 0)
    return lax.dynamic_update_slice_in_dim(ring, jnp.ravel(keep_whole(value)), at + place.offset, 0)


def _read_mail(box: Sequence[Any], row: Any, place: Place) -> tuple[Any, Sequence[Any]]:
    buffer = lax.dynamic_index_in_dim(box[place.buffer], row, keepdims=False)
    return lax.optimization_barrier((read_place([buffer], Place(0, place.shape, place.offset)), box))
