"""Storage for values that wait: how many slots, and which micro-batch is in which slot when.

The timetable is known before the program is built, so slots are allocated like registers: by colouring intervals,
the least number being the most that are alive at once.

    residuals   written by F at tick f, last read by B at tick b:              alive in [f, b)
    mailbox     sent at tick s, written at the end of tick s + exchange - 1 = w,
                last read at tick r:                                           alive in [w, r)
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from jaxpar import _jax
from jaxpar.lower.channels import Routing
from jaxpar.lower.packing import Item, Packing, pack_items
from jaxpar.plan import Bundle, Node, StageGraph
from jaxpar.schedule import Action, Timetable
from jaxpar.trace import Var

_WASTE = 0.05
_SMALL_BYTES = 64
_SMALL_MAIL_BYTES = 1 << 14  # each array of a payload is a transfer of its own
_ROW = ""  # the column that says which row of its rings a micro-batch has


def colour_intervals(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """A slot for each half-open interval, no two overlapping ones alike, with as few slots as possible.

    >>> colour_intervals([(0, 4), (1, 2), (2, 5), (4, 6)])
    [0, 1, 1, 0]
    """
    slots = [0] * len(intervals)
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    used = 0
    for i in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        start, end = intervals[i]
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            slots[i] = heapq.heappop(free)
        else:
            slots[i], used = used, used + 1
        heapq.heappush(busy, (max(end, start + 1), slots[i]))
    return slots


def item_of(var: Var, n: int) -> Item:
    shape, dtype = _jax.raw_shape(var.shape_at(n), var.dtype)
    return Item(shape, dtype)


# -- residuals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingPlace:
    """Where a bundle's value waits: a row of ring `ring`, or the elements from `offset` on of a flat one.

    `column` is which of the bundle's run-time values says where: the row, or what to add to the offset.
    """

    ring: int
    column: int
    shape: tuple[int, ...]
    offset: int | None = None


@dataclass(frozen=True)
class Residuals:
    """Rings that hold what stays on a rank between two of its actions."""

    rings: tuple[Item, ...]  # rows first; a flat ring has one dimension
    places: Mapping[Bundle, tuple[RingPlace, ...]]
    columns: Mapping[tuple[Bundle, int], tuple[int, ...]]  # (bundle, micro-batch) -> run-time value of each column
    used_bytes: tuple[int, ...]  # of each rank, at its peak

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.rings)


def allocate_residuals(graph: StageGraph, timetable: Timetable) -> Residuals:
    """Each value of a stage has a ring, as long as the most micro-batches in flight; the k-th value of one shape on
    each rank has the same one. Equal layers then read their residuals by equal code, which XLA compiles once.

    Shapes for which that would waste memory, because few ranks have them, share a flat ring.
    """
    local = [b for b in graph.bundles if not graph.changes_rank(b)]
    lives = {
        b: [(tick_of(timetable, b.source, m), last_read(timetable, b, m)) for m in range(timetable.num_microbatches)]
        for b in local
    }
    examples = [graph.share_on(rank).count for rank in range(graph.num_ranks)]
    units = [u for rank, n in enumerate(examples) for u in _make_units(graph, rank, local, lives, n)]
    units.sort(key=lambda u: -u.depth)  # long rings meet long rings
    need: list[dict[Item, list[int]]] = [defaultdict(list) for _ in range(graph.num_ranks)]
    for u in units:
        for item, count in u.counts.items():
            need[u.rank][item] += [u.depth] * count
    rows = _choose_rings(need)
    rings = [Item((k, *item.shape), item.dtype) for item, lengths in rows.items() for k in lengths]
    keys = [(item, k) for item, lengths in rows.items() for k in range(len(lengths))]
    ring_index = {key: i for i, key in enumerate(keys)}
    heaps = {i.dtype.name: i.dtype for c in need for i in c if i not in rows}
    flat_index = {name: len(rings) + k for k, name in enumerate(sorted(heaps))}
    filled = [dict.fromkeys(heaps, 0) for _ in range(graph.num_ranks)]
    used: list[Counter[Item]] = [Counter() for _ in range(graph.num_ranks)]
    places, columns = {}, {}
    for u in units:
        strides = {
            name: sum(i.elements * k for i, k in u.counts.items() if i not in rows and i.dtype.name == name)
            for name in heaps
        }
        for b in u.slots:
            kinds: dict[str, int] = {}  # elements of each flat ring that the bundle takes so far; one column each
            seen: Counter[Item] = Counter()
            found = []
            for v in b.values:
                item = item_of(v, examples[u.rank])
                kind = _ROW if item in rows else item.dtype.name
                offset = kinds.setdefault(kind, 0)
                column = list(kinds).index(kind)
                if kind == _ROW:
                    found.append(RingPlace(ring_index[item, used[u.rank][item] + seen[item]], column, item.shape))
                    seen[item] += 1
                else:
                    found.append(RingPlace(flat_index[kind], column, item.shape, offset))
                    kinds[kind] += item.elements
            places[b] = tuple(found)
            for m, slot in enumerate(u.slots[b]):
                columns[b, m] = tuple(
                    slot if kind == _ROW else filled[u.rank][kind] + slot * strides[kind] for kind in kinds
                )
        used[u.rank].update({item: count for item, count in u.counts.items() if item in rows})
        for name, stride in strides.items():
            filled[u.rank][name] += stride * u.depth
    # One element to spare: a value that fills its ring replaces it, and XLA:CPU then copies it in all other branches.
    rings += [Item((max(f[name] for f in filled) + 1,), heaps[name]) for name in flat_index]
    used_bytes = tuple(sum(i.bytes * sum(depths) for i, depths in c.items()) for c in need)
    return Residuals(tuple(rings), places, columns, used_bytes)


@dataclass(frozen=True, eq=False)
class _Unit:
    """Bundles of one rank that take turns in the same rings: those of its stages that live alike, or one alone."""

    rank: int
    counts: Counter[Item]  # the most values of each shape that one of them has
    slots: Mapping[Bundle, list[int]]  # by micro-batch

    @property
    def depth(self) -> int:
        return max(max(slots) for slots in self.slots.values()) + 1

    @property
    def bytes(self) -> int:
        return self.depth * sum(i.bytes * k for i, k in self.counts.items())


def _make_units(
    graph: StageGraph, rank: int, local: Sequence[Bundle], lives: Mapping[Bundle, list[tuple[int, int]]], n: int
) -> list[_Unit]:
    """Stages of a rank share rings where that takes less than rings of their own: their peaks come at other times."""
    groups: dict[tuple[str, str], list[Bundle]] = defaultdict(list)
    for b in local:
        if graph.rank_of[b.stage] == rank:
            groups[b.source[0], b.last_reader[0]].append(b)
    units = []
    for bundles in groups.values():
        together, apart = _make_unit(rank, bundles, lives, n), [_make_unit(rank, [b], lives, n) for b in bundles]
        units += [together] if together.bytes < sum(u.bytes for u in apart) else apart
    return units


def _make_unit(rank: int, bundles: Sequence[Bundle], lives: Mapping[Bundle, list[tuple[int, int]]], n: int) -> _Unit:
    counts: Counter[Item] = Counter()
    for b in bundles:
        counts |= Counter(item_of(v, n) for v in b.values)
    slots = iter(colour_intervals([life for b in bundles for life in lives[b]]))
    return _Unit(rank, counts, {b: [next(slots) for _ in lives[b]] for b in bundles})


def tick_of(timetable: Timetable, node: Node, microbatch: int) -> int:
    """When a program runs for a micro-batch; I and W may be done as one, as B."""
    kind, stage = node
    action = Action(kind, stage, microbatch)  # type: ignore[arg-type]
    if kind in "IW" and not timetable.has(action):
        action = Action("B", stage, microbatch)
    return timetable.tick_of(action)


def last_read(timetable: Timetable, bundle: Bundle, microbatch: int) -> int:
    return max(tick_of(timetable, reader, microbatch) for reader in bundle.readers)


def _choose_rings(need: Sequence[Mapping[Item, Sequence[int]]]) -> dict[Item, list[int]]:
    """The shapes that get rings of their own, and how many rows each: the most common first, within a small waste.

    Args:
        need: for each rank and shape, the rows that each value of it needs, most first.
    """
    left = [sum(i.bytes * sum(depths) for i, depths in c.items()) for c in need]
    limit = max(left, default=0) * (1 + _WASTE)
    kinds = {i for c in need for i in c if i.bytes > _SMALL_BYTES}
    common = sorted(kinds, key=lambda i: (-sum(i in c for c in need), -i.bytes, i.shape, str(i.dtype)))
    chosen: dict[Item, list[int]] = {}
    dedicated = 0
    for item in common:
        rows = [max(column) for column in zip_longest(*(c.get(item, ()) for c in need), fillvalue=0)]
        rest = [b - item.bytes * sum(c.get(item, ())) for b, c in zip(left, need, strict=True)]
        if dedicated + item.bytes * sum(rows) + max(rest) <= limit:
            chosen[item] = rows
            dedicated += item.bytes * sum(rows)
            left = rest
    return chosen


# -- mailboxes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mailbox:
    """Where the payload of one part of a channel waits: `rows` payloads of `packing`'s buffers."""

    channel: int
    packing: Packing
    rows: int
    arrival: np.ndarray  # [ticks, ranks]: the row that is written at the end of the tick, a dead one if nothing arrives


@dataclass(frozen=True)
class Mail:
    boxes: tuple[Mailbox, ...]
    box_of: Mapping[Bundle, int]
    edge_of: Mapping[Bundle, int]  # index into the box's packing
    row: Mapping[tuple[Bundle, int], int]  # (bundle, micro-batch) -> row

    @property
    def bytes(self) -> int:
        return sum(box.rows * box.packing.bytes for box in self.boxes)


def allocate_mailboxes(graph: StageGraph, timetable: Timetable, routing: Routing) -> Mail:
    """One mailbox for each channel and kind of last reader."""
    parts: dict[tuple[int, str], list[Bundle]] = defaultdict(list)
    for b in graph.bundles:
        if graph.changes_rank(b):
            parts[routing.channel_of[b], b.last_reader[0]].append(b)
    boxes: list[Mailbox] = []
    box_of: dict[Bundle, int] = {}
    edge_of: dict[Bundle, int] = {}
    row: dict[tuple[Bundle, int], int] = {}
    for (channel, _), bundles in sorted(parts.items(), key=lambda part: part[0]):
        items = [[item_of(v, graph.shares[b.stage].count) for v in b.values] for b in bundles]
        packing = pack_items(items, _SMALL_MAIL_BYTES)
        live: list[list[tuple[int, int, int]]] = [[] for _ in range(graph.num_ranks)]
        for edge, b in enumerate(bundles):
            box_of[b], edge_of[b] = len(boxes), edge
        for rank in range(graph.num_ranks):
            arriving = [b for b in bundles if graph.rank_of[b.stage] == rank]
            keys = [(b, m) for b in arriving for m in range(timetable.num_microbatches)]
            intervals = [_mail_interval(timetable, b, m) for b, m in keys]
            for key, slot, interval in zip(keys, colour_intervals(intervals), intervals, strict=True):
                row[key] = slot
                live[rank].append((*interval, slot))
        boxes.append(_make_box(channel, packing, live, timetable))
    return Mail(tuple(boxes), box_of, edge_of, row)


def _mail_interval(timetable: Timetable, bundle: Bundle, microbatch: int) -> tuple[int, int]:
    sent = tick_of(timetable, bundle.source, microbatch)
    return sent + timetable.exchange - 1, last_read(timetable, bundle, microbatch)


def _make_box(
    channel: int, packing: Packing, live: Sequence[Sequence[tuple[int, int, int]]], timetable: Timetable
) -> Mailbox:
    rows = max((slot + 1 for spans in live for *_, slot in spans), default=0)
    arrival = np.zeros((timetable.num_ticks, len(live)), np.int32)
    most = rows
    for rank, spans in enumerate(live):
        written = {start: slot for start, _, slot in spans}
        for tick in range(timetable.num_ticks):
            if tick in written:
                arrival[tick, rank] = written[tick]
                continue
            alive = {slot for start, end, slot in spans if start <= tick < end}
            dead = next(k for k in range(rows + 1) if k not in alive)
            arrival[tick, rank] = dead
            most = max(most, dead + 1)
    return Mailbox(channel, packing, most, arrival)
