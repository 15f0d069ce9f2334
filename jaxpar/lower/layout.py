"""Where each leaf of the training state is kept, and the state in that form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar import _jax
from jaxpar.errors import LowerError
from jaxpar.lower.packing import Item, Packing, Place, pack_items


@dataclass(frozen=True)
class Leaf:
    """One leaf of the user's state, kept by the ranks of its stage; `stage` is None where every rank keeps it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    stage: int | None
    ranks: tuple[int, ...]  # replicas of the stage, each with a copy; none where every rank keeps it
    spec: tuple[Any, ...]  # sharding over the axes that jaxpar leaves to the compiler
    place: Place | None  # in its ranks' buffers
    shared: int | None  # number among the leaves that every rank keeps

    @property
    def rank(self) -> int | None:
        """The first of its ranks; None where every rank keeps it."""
        return self.ranks[0] if self.ranks else None


@dataclass(frozen=True, eq=False)
class StateLayout:
    """Registers of the state on a mesh: buffers with a leading axis of ranks, and leaves that every rank keeps."""

    mesh: Mesh
    stage_axis: str
    trees: tuple[Any, ...]  # of the state arguments
    leaves: tuple[Leaf, ...]
    packing: Packing
    rank_of: tuple[int, ...]  # the group of each stage
    groups: tuple[tuple[int, ...], ...]  # ranks that are replicas of each other

    @cached_property
    def token(self) -> str:
        """Equal for equal layouts, also in another process."""
        devices = [d.id for d in self.mesh.devices.flat]
        text = repr((devices, dict(self.mesh.shape), self.rank_of, self.groups, self.leaves, self.packing.buffers))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StateLayout) and self.token == other.token

    def __hash__(self) -> int:
        return hash(self.token)

    def buffer_sharding(self, index: int) -> NamedSharding:
        spec = self.packing.buffers[index].tag if index < self.packing.num_slots else None  # pools are flat
        return NamedSharding(self.mesh, PartitionSpec(self.stage_axis, *(spec if isinstance(spec, tuple) else ())))

    @property
    def shared(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self.leaves if not leaf.ranks)

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """Bytes of its own state that each rank has."""
        return self.packing.used_bytes

    @property
    def user_tree(self) -> Any:
        """The user's own form of the state, as shapes."""
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves]
        return jax.tree.unflatten(self.trees[0], shapes)

    def abstract(self) -> PlacedState:
        """The placed state's shapes and shardings, for compiling ahead of time."""
        num_ranks = self.mesh.shape[self.stage_axis]
        buffers = tuple(
            jax.ShapeDtypeStruct((num_ranks, *b.shape), b.dtype, sharding=self.buffer_sharding(i))
            for i, b in enumerate(self.packing.buffers)
        )
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shared = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in self.shared)
        return PlacedState(buffers, shared, self)


@jax.tree_util.register_pytree_with_keys_class
class PlacedState:
    """The training state on its ranks.

    A pytree: `buffers` have a leading axis of ranks, sharded over the stage axis; `shared` leaves are on every rank.
    It can be saved and restored as it is; `gather` of the step that placed it gives the user's own tree back.
    """

    def __init__(self, buffers: Sequence[Any], shared: Sequence[Any], layout: StateLayout):
        self.buffers, self.shared, self.layout = tuple(buffers), tuple(shared), layout

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], StateLayout]:
        key = jax.tree_util.GetAttrKey
        return [(key("buffers"), self.buffers), (key("shared"), self.shared)], self.layout

    def tree_flatten(self) -> tuple[tuple[Any, Any], StateLayout]:
        return (self.buffers, self.shared), self.layout

    @classmethod
    def tree_unflatten(cls, layout: StateLayout, children: tuple[Any, Any]) -> PlacedState:
        return cls(*children, layout)

    @property
    def is_deleted(self) -> bool:
        arrays = [x for x in (*self.buffers, *self.shared) if isinstance(x, jax.Array)]
        return any(x.is_deleted() for x in arrays if not isinstance(x, jax.core.Tracer))

    def __repr__(self) -> str:
        leaves, most = self.layout.leaves, max(self.layout.rank_bytes, default=0)
        mesh = " x ".join(f"{n} {a}" for a, n in self.layout.mesh.shape.items())
        gone = ", given away to a step" if self.is_deleted else ""
        return f"PlacedState({len(leaves)} leaves on {mesh}, {most / 2**20:.2f} MiB on the fullest rank{gone})"


def make_layout(
    mesh: Mesh,
    stage_axis: str,
    trees: Sequence[Any],
    leaves: Sequence[tuple[str, tuple[int, ...], Any, tuple[Any, ...]]],
    stages: Sequence[int | None],
    rank_of: Sequence[int],
    groups: Sequence[Sequence[int]],
    order: Mapping[int, Any],
) -> StateLayout:
    """Lay out leaves `(name, shape, dtype, spec)`, whose owners are `stages`, in each rank's canonical `order`.

    Args:
        rank_of: the group of each stage.
        groups: of each group, its ranks.
    """
    num_ranks = mesh.shape[stage_axis]
    ranks = [() if s is None else tuple(groups[rank_of[s]]) for s in stages]
    mine = [sorted((i for i, rs in enumerate(ranks) if rank in rs), key=order.__getitem__) for rank in range(num_ranks)]

    def item(i: int) -> Item:
        _, shape, dtype, spec = leaves[i]
        raw, raw_dtype = _jax.raw_shape(shape, dtype)
        return Item(raw, raw_dtype, tag=spec or None, whole=bool(spec))

    packing = pack_items([[item(i) for i in rank] for rank in mine])
    places = {i: p for rank, row in zip(mine, packing.places, strict=True) for i, p in zip(rank, row, strict=True)}
    shared = {i: k for k, i in enumerate(i for i, rs in enumerate(ranks) if not rs)}
    made = [
        Leaf(name, shape, dtype, stages[i], ranks[i], spec, places.get(i), shared.get(i))
        for i, (name, shape, dtype, spec) in enumerate(leaves)
    ]
    return StateLayout(mesh, stage_axis, tuple(trees), tuple(made), packing, tuple(rank_of), tuple(map(tuple, groups)))


def place_leaves(layout: StateLayout, values: Sequence[Any]) -> PlacedState:
    """The user's leaves, each put on the rank that owns it. No device ever holds the whole state."""
    num_ranks = layout.mesh.shape[layout.stage_axis]
    held: list[dict[int, list[tuple[Place, Any]]]] = [{} for _ in layout.packing.buffers]
    for leaf, value in zip(layout.leaves, values, strict=True):
        for rank in leaf.ranks:
            assert leaf.place is not None
            held[leaf.place.buffer].setdefault(rank, []).append((leaf.place, value))
    buffers = []
    for i, (item, ranks) in enumerate(zip(layout.packing.buffers, held, strict=True)):

        def shard(index: Any, item: Item = item, ranks: dict = ranks) -> np.ndarray:
            rank = index[0].start or 0
            assert num_ranks == 1 or (index[0].stop or num_ranks) - rank == 1
            return _host_buffer(item, ranks.get(rank, ()))[index[1:]][None]

        shape = (num_ranks, *item.shape)
        buffers.append(jax.make_array_from_callback(shape, layout.buffer_sharding(i), shard, dtype=item.dtype))
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    shared = [
        # a copy, so that donating the placed state leaves the user's own arrays alone
        jax.device_put(_copy(v), everywhere)
        for leaf, v in zip(layout.leaves, values, strict=True)
        if not leaf.ranks
    ]
    return PlacedState(buffers, shared, layout)


def _copy(x: Any) -> Any:
    return x.copy() if isinstance(x, jax.Array) else np.array(x)


def _host_buffer(item: Item, parts: Sequence[tuple[Place, Any]]) -> np.ndarray:
    buffer = np.zeros(item.shape, item.dtype)
    for place, value in parts:
        raw = np.asarray(_jax.unwrap_key(value) if hasattr(value, "dtype") else value)
        if place.offset is None:
            return raw.astype(item.dtype, copy=False)
        buffer[place.offset : place.offset + raw.size] = raw.ravel()
    return buffer


def gather_leaves(state: PlacedState) -> list[Any]:
    """The user's leaves, on the host; PRNG keys as key arrays."""
    if state.is_deleted:
        raise LowerError(
            "this placed state was donated to a step that has run since: its buffers are gone. Use the state that "
            "the step returned, or build the step with donate=False."
        )
    rows: dict[tuple[int, int], np.ndarray] = {}
    values = []
    for leaf in state.layout.leaves:
        if leaf.place is None:
            raw = _fetch(state.shared[leaf.shared or 0])
        else:
            key = (leaf.place.buffer, leaf.ranks[0])
            if key not in rows:
                rows[key] = _fetch_row(state.buffers[leaf.place.buffer], leaf.ranks[0])
            raw = rows[key]
            if leaf.place.offset is not None:
                size = int(np.prod(leaf.place.shape, dtype=np.int64))
                raw = raw[leaf.place.offset : leaf.place.offset + size].reshape(leaf.place.shape)
        values.append(_jax.wrap_key(raw, leaf.dtype) if _jax.is_key(leaf.dtype) else raw)
    return values


def _fetch(x: Any) -> np.ndarray:
    return np.asarray(_jax.unwrap_key(x.addressable_data(0) if isinstance(x, jax.Array) else x))


def _fetch_row(x: jax.Array, rank: int) -> np.ndarray:
    """Row `rank` of a buffer whose leading axis is sharded over the ranks."""
    if x.is_fully_addressable:
        row = np.empty(x.shape[1:], x.dtype)
        for shard in x.addressable_shards:
            if (shard.index[0].start or 0) == rank:
                row[shard.index[1:]] = np.asarray(shard.data)[0]
        return row
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    return np.asarray(jax.jit(lambda b: b[rank], out_shardings=everywhere)(x).addressable_data(0))
