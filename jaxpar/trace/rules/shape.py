"""Operations that move elements about: reshape, transpose, slice, concatenate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from jaxpar.trace.ir import Dim, Eqn, Size
from jaxpar.trace.rules.registry import common_layout, partial_if_linear, partial_indices, require_complete, rules_for
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Invariant, Partial, UsesPositions

_JOINED = "joins the examples' positions with other data"


def moved_positions(t: Batched, dim: int, axis: Any) -> Batched:
    """`t` with its batch at `dim`, its positions' axis mapped by `axis(old) -> new`."""
    positions = t.positions
    if isinstance(positions, tuple):
        positions = (axis(positions[0]), positions[1])
    return Batched(dim, t.outer, t.inner, positions, t.uniform)


@rules_for("reshape", positions=True)
def _reshape(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t = types[0]
    if isinstance(t, Partial):
        return [t]
    assert isinstance(t, Batched)
    before, after = eqn.inputs[0].shape, eqn.outputs[0].shape
    if (order := eqn.params.get("dimensions")) is not None:  # transposed first
        before, t = tuple(before[d] for d in order), moved_positions(t, order.index(t.dim), order.index)
    dims = [i for i, d in enumerate(after) if isinstance(d, Size)]
    if len(dims) != 1:
        raise Coupling("reshapes the batch into several dimensions")
    dim = dims[0]
    head, tail = _count(after[:dim]), _count(after[dim + 1 :])
    pre, post = _count(before[: t.dim]), _count(before[t.dim + 1 :])
    size = after[dim]
    assert isinstance(size, Size)
    if 0 in (head, tail) or (t.uniform and head % pre == 0 and tail % post == 0):
        return [Batched(dim, 1, size.per_example, uniform=True)]
    outer, inner = Fraction(pre * t.outer, head), Fraction(post * t.inner, tail)
    if outer.denominator != 1 or inner.denominator != 1:
        raise Coupling("reshapes the batch so that one row holds several examples")
    if isinstance(t.positions, tuple):
        axis, slots = t.positions
        if [d for d in before if d != 1] != [d for d in after if d != 1] or before[axis] == 1:
            raise Coupling(_JOINED)
        kept = [i for i, d in enumerate(before) if d != 1].index(axis)
        return [Batched(dim, 1, 1, ([i for i, d in enumerate(after) if d != 1][kept], slots))]
    if t.holds_positions and not outer == inner == 1:
        raise UsesPositions
    return [Batched(dim, int(outer), int(inner), t.positions)]


def _count(dims: Sequence[Dim]) -> int:
    """The number of elements of dimensions that don't grow with the batch."""
    return math.prod(d for d in dims if isinstance(d, int))


@rules_for("transpose", positions=True)
def _transpose(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, permutation = types[0], eqn.params["permutation"]
    if isinstance(t, Batched):
        return [moved_positions(t, permutation.index(t.dim), permutation.index)]
    return [t]


@rules_for("squeeze", positions=True)
def _squeeze(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, gone = types[0], eqn.params["dimensions"]
    if not isinstance(t, Batched):
        return [t]
    if isinstance(t.positions, tuple) and t.positions[0] in gone:
        t = Batched(t.dim, t.outer, t.inner, "all")
    return [moved_positions(t, t.dim - sum(g < t.dim for g in gone), lambda a: a - sum(g < a for g in gone))]


@rules_for("expand_dims", positions=True)
def _expand_dims(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, new = types[0], eqn.params["dimensions"]
    if not isinstance(t, Batched):
        return [t]
    places = [i for i in range(len(eqn.outputs[0].shape)) if i not in new]
    return [moved_positions(t, places[t.dim], places.__getitem__)]


@rules_for("broadcast_in_dim", positions=True)
def _broadcast(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, places = types[0], eqn.params["broadcast_dimensions"]
    if isinstance(t, Partial):
        if eqn.outputs[0].batch_dims:
            raise Incomplete((0,))
        return [t]
    assert isinstance(t, Batched)
    if len(eqn.outputs[0].batch_dims) != 1:
        raise Coupling("spreads examples along a second batch dimension")
    return [moved_positions(t, places[t.dim], lambda a: places[a])]


@rules_for("rev")
def _reverse(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if isinstance(types[0], Batched) and types[0].dim in eqn.params["dimensions"]:
        raise Coupling("reverses the order of the examples")
    return [types[0]]


def _per_example(value: Any) -> int:
    """The factor of n in a size that must be a multiple of it."""
    if value == 0:
        return 0
    if not isinstance(value, Size) or value.extra:
        raise Coupling("takes particular examples of the batch")
    return value.per_example


@rules_for("slice")
def _slice(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t = types[0]
    if not isinstance(t, Batched):
        return [t]
    start, limit = eqn.params["start_indices"][t.dim], eqn.params["limit_indices"][t.dim]
    if eqn.params["strides"] is not None and eqn.params["strides"][t.dim] != 1:
        raise Coupling("takes every k-th example of the batch")
    first, last = _per_example(start), _per_example(limit)
    if first % t.inner or last % t.inner or (t.outer == 1 and (last - first) != t.inner):
        raise Coupling("takes particular examples of the batch")
    return [_blocks(t, last - first)]


def _blocks(t: Batched, per_example: int) -> Batched:
    """`t` with `per_example` rows for each example, in whole blocks of the batch."""
    if per_example <= 0:
        raise Coupling("takes particular examples of the batch")
    return Batched(t.dim, per_example // t.inner, t.inner)


@rules_for("split")
def _split(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t = types[0]
    if not isinstance(t, Batched) or eqn.params["axis"] != t.dim:
        return [t] * len(eqn.outputs)
    parts = [_per_example(size) for size in eqn.params["sizes"]]
    if t.outer == 1 or any(part % t.inner for part in parts):
        raise Coupling("splits the batch into groups of examples")
    return [_blocks(t, part) for part in parts]


@rules_for("unstack")
def _unstack(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, axis = types[0], eqn.params["axis"]
    if not isinstance(t, Batched):
        return [t] * len(eqn.outputs)
    if axis == t.dim:
        raise Coupling("takes the examples of the batch one by one")
    return [t.moved(t.dim - (axis < t.dim))] * len(eqn.outputs)


@rules_for("pad")
def _pad(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, fill = types
    if isinstance(t, Partial):
        if isinstance(fill, Invariant) and fill.zero and t.op == "sum":
            return [t]
        raise Incomplete(partial_indices(types))
    require_complete(types)
    assert isinstance(t, Batched)
    low, high, interior = eqn.params["padding_config"][t.dim]
    before, after = _per_example(low), _per_example(high)
    if interior or before % t.inner or after % t.inner:
        raise Coupling("pads the batch")
    return [_blocks(t, t.outer * t.inner + before + after)]


@rules_for("tile")
def _tile(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t = types[0]
    if not isinstance(t, Batched):
        return [t]
    reps = eqn.params["reps"]
    return [Batched(t.dim, t.outer * reps[t.dim], t.inner)]


@rules_for("concatenate", positions=True)
def _concatenate(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types):
        return [partial_if_linear(types, range(len(types)))]
    axis = eqn.params["dimension"]
    batched = [t for t in types if isinstance(t, Batched)]
    if axis == batched[0].dim:
        return [_join_towers(eqn, types)]
    layout = common_layout(types)
    slots: set[int] = set()
    start = 0
    for atom, t in zip(eqn.inputs, types, strict=True):
        width = atom.shape[axis]
        if isinstance(t, Batched) and t.positions == "all":
            slots.update(range(start, start + width))
        elif isinstance(t, Batched) and isinstance(t.positions, tuple):
            if t.positions[0] != axis:
                raise Coupling(_JOINED)
            slots.update(start + s for s in t.positions[1])
        start += width
    return [replace(layout, positions=(axis, frozenset(slots)) if slots else None)]


def _join_towers(eqn: Eqn, types: Sequence[BatchType]) -> Batched:
    """Along the batch: each input is some blocks of all the examples."""
    if any(isinstance(t, Batched) and t.holds_positions for t in types):
        raise UsesPositions
    fixed = {t.inner for t in types if isinstance(t, Batched) and not t.uniform}
    inner = fixed.pop() if fixed else 1
    axis = eqn.params["dimension"]
    sizes = [t.outer * t.inner if isinstance(t, Batched) and t.dim == axis else 0 for t in types]
    if fixed or not all(size and size % inner == 0 for size in sizes):
        raise Coupling("joins examples with other rows along the batch")
    return Batched(axis, sum(sizes) // inner, inner)


@rules_for("stack")
def _stack(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types):
        return [partial_if_linear(types, range(len(types)))]
    layout = common_layout(types)
    return [layout.moved(layout.dim + (eqn.params["axis"] <= layout.dim))]
