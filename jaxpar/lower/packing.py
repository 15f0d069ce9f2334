"""Uniform storage for ranks that hold different things.

All ranks of an SPMD program have the same buffers. Each rank has a list of items; `pack_items` maps them onto common
buffers:

    slot   a buffer of one shape: the k-th item of that shape on each rank
    pool   one flat buffer per dtype, for small items and for shapes that few ranks have

Slots cost every rank their bytes, also one without such an item; the pool costs every rank the largest rank's share.
Shapes become slots, the most common first, as long as the whole stays within a few per cent of the largest rank's own
bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

_WASTE = 0.05


@dataclass(frozen=True)
class Item:
    """An array to be stored. Items of different `tag`s don't share buffers; one with `whole` never goes to a pool."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tag: Hashable = None
    whole: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where an item is: `buffer` at large, or the elements from `offset` of a pool."""

    buffer: int
    shape: tuple[int, ...]
    offset: int | None = None


@dataclass(frozen=True)
class Packing:
    """Buffers (slots first, then pools) and the place of every rank's every item."""

    buffers: tuple[Item, ...]
    num_slots: int
    places: tuple[tuple[Place, ...], ...]
    used_bytes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(b.bytes for b in self.buffers)

    @property
    def waste(self) -> float:
        """Bytes of the buffers over those of the rank that has most, less one."""
        most = max(self.used_bytes, default=0)
        return self.bytes / most - 1 if most else 0.0


def pack_items(ranks: Sequence[Sequence[Item]], small_bytes: int = 16) -> Packing:
    """A packing of each rank's items, in order: ranks with equal lists get equal places.

    Args:
        small_bytes: items up to this size go to a pool. Equal layers read their slots by equal code, but each place in
        a pool by code of its own, which takes longer to compile; where buffers are sent, few of them are better.
    """
    counts = [Counter(i for i in items) for items in ranks]
    slots = _choose_slots(counts, small_bytes)
    slot_index: dict[tuple[Item, int], int] = {}
    buffers: list[Item] = []
    for item, number in slots.items():
        for k in range(number):
            slot_index[item, k] = len(buffers)
            buffers.append(item)
    pools: dict[tuple[np.dtype, Hashable], int] = {}
    pool_index: dict[tuple[np.dtype, Hashable], int] = {}
    for items in ranks:
        for item in items:
            pool_index.setdefault((item.dtype, item.tag), len(buffers) + len(pool_index))
    places = []
    for items in ranks:
        seen: Counter[Item] = Counter()
        filled: Counter[tuple[np.dtype, Hashable]] = Counter()
        row = []
        for item in items:
            key = (item.dtype, item.tag)
            if (item, seen[item]) in slot_index:
                row.append(Place(slot_index[item, seen[item]], item.shape))
            else:
                row.append(Place(pool_index[key], item.shape, filled[key]))
                filled[key] += item.elements
                pools[key] = max(pools.get(key, 0), filled[key])
            seen[item] += 1
        places.append(tuple(row))
    # pools that stayed empty keep a place of no elements, so that the indices hold
    buffers += [Item((pools.get(key, 0),), key[0], key[1]) for key in pool_index]
    used = tuple(sum(i.bytes for i in items) for items in ranks)
    return Packing(tuple(buffers), len(slot_index), tuple(places), used)


def _choose_slots(counts: Sequence[Counter[Item]], small_bytes: int) -> dict[Item, int]:
    """How many slots each kind of item gets."""
    left = [sum(i.bytes * k for i, k in c.items()) for c in counts]
    limit = max(left, default=0) * (1 + _WASTE)
    kinds = sorted(
        {i for c in counts for i in c},
        key=lambda i: (i.bytes, i.shape, str(i.dtype), str(i.tag), i.whole),
        reverse=True,
    )
    chosen: dict[Item, int] = {}
    dedicated = 0
    steps = [(sum(c[i] > k for c in counts), i, k) for i in kinds for k in range(max(c[i] for c in counts))]
    for _, item, k in sorted(steps, key=lambda s: -s[0]):
        if chosen.get(item, 0) != k or (item.bytes <= small_bytes and not item.whole):
            continue
        rest = [b - item.bytes * (c[item] > k) for b, c in zip(left, counts, strict=True)]
        if item.whole or dedicated + item.bytes + max(rest) <= limit:
            chosen[item] = k + 1
            dedicated += item.bytes
            left = rest
    return chosen


# -- run time ----------------------------------------------------------------------------------------------------------


def keep_whole(x: Any) -> Any:
    """`x` on every device of the axes that are left to the compiler.

    Flat buffers mix values of different shardings; were they sharded, each slice of them would be an exchange.
    """
    return keep_sharding(x, ())


def keep_sharding(x: Any, spec: Any) -> Any:
    """`x` sharded by `spec` over the axes that are left to the compiler, if the mesh has any."""
    mesh = jax.sharding.get_abstract_mesh()
    free = mesh.axis_names and any(t == AxisType.Auto for t in mesh.axis_types)
    return lax.with_sharding_constraint(x, PartitionSpec(*spec)) if free else x


def read_place(buffers: Sequence[Any], place: Place) -> Any:
    buffer = buffers[place.buffer]
    if place.offset is None:
        return buffer
    end = place.offset + math.prod(place.shape)
    return keep_whole(lax.slice(keep_whole(buffer), (place.offset,), (end,))).reshape(place.shape)


def fill_buffers(packing: Packing, places: Sequence[Place], values: Sequence[Any]) -> list[Any]:
    """All buffers of one rank, holding the values at the places; zero elsewhere."""
    parts: dict[int, list[tuple[int, Any]]] = {}
    out: list[Any] = [None] * len(packing.buffers)
    for place, value in zip(places, values, strict=True):
        if place.offset is None:
            out[place.buffer] = value
        else:
            parts.setdefault(place.buffer, []).append((place.offset, value))
    for i, buffer in enumerate(packing.buffers):
        if out[i] is None:
            out[i] = _concatenate_pool(buffer, sorted(parts.get(i, []), key=lambda p: p[0]))
    return out


def _concatenate_pool(buffer: Item, parts: Sequence[tuple[int, Any]]) -> Any:
    if not parts:
        return jnp.zeros(buffer.shape, buffer.dtype)
    flat = [jnp.ravel(keep_whole(value)) for _, value in parts]
    missing = buffer.elements - sum(x.size for x in flat)
    if missing:
        flat.append(jnp.zeros((missing,), buffer.dtype))
    return keep_whole(jnp.concatenate(flat))


def add_to_buffers(buffers: Sequence[Any], places: Sequence[Place], values: Sequence[Any], combine: Any) -> list[Any]:
    """The buffers with `combine(old, value)` at each place. Neighbours in a pool are combined as one."""
    out = list(buffers)
    pooled = []
    for place, value in zip(places, values, strict=True):
        if place.offset is None:
            out[place.buffer] = combine(out[place.buffer], value.astype(out[place.buffer].dtype))
        else:
            pooled.append((place.buffer, place.offset, value))
    pooled.sort(key=lambda p: p[:2])
    while pooled:
        buffer, start, _ = pooled[0]
        run, end = [], start
        while pooled and pooled[0][0] == buffer and pooled[0][1] == end:
            run.append(jnp.ravel(keep_whole(pooled.pop(0)[2])).astype(out[buffer].dtype))
            end += run[-1].size
        old = lax.slice(out[buffer], (start,), (end,))
        joined = run[0] if len(run) == 1 else jnp.concatenate(run)
        out[buffer] = keep_whole(lax.dynamic_update_slice(out[buffer], combine(old, joined), (start,)))
    return out
