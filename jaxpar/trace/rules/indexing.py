"""Gather, scatter, and slices at run-time positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from jaxpar.trace.ir import Eqn
from jaxpar.trace.rules.registry import (
    ADVICE_PAIRS,
    PAIRS,
    common_layout,
    partial_if_linear,
    partial_indices,
    require_complete,
    rules_for,
)
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Invariant, Partial, UsesPositions

_WRITES = "writes to examples of the batch by their index"
_PICKS = "picks examples of the batch by their index"


def _places_own_row(operand: Batched, indices: BatchType, columns: Sequence[int], index_axis: int) -> bool:
    """Whether the index of each example along the operand's batch is the example's own position."""
    if not isinstance(indices, Batched) or operand.dim not in columns or operand.outer * operand.inner != 1:
        return False
    column = list(columns).index(operand.dim)
    if indices.positions == "all":
        return len(columns) == 1
    return indices.positions == (index_axis, frozenset({column}))  # alone: in other columns they would be data


def _refuse_positions(*types: BatchType) -> None:
    if any(isinstance(t, Batched) and t.holds_positions for t in types):
        raise UsesPositions


def _pair(operand: Batched, indices: BatchType, dim: int) -> Batched:
    """The layout of a batched operand whose examples are indexed each with the index at `dim` of its own."""
    _refuse_positions(indices)
    layout = operand.joined(indices) if isinstance(indices, Batched) and indices.dim == dim else None
    if layout is None:
        raise Coupling(_PICKS)
    return layout


def _fills_alike(eqn: Eqn, operand: Partial) -> bool:
    """Whether what is taken from out of bounds is the reduction of what the micro-batches take from there."""
    if eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP or operand.op in ("max", "min", "and", "or"):
        return True
    fill = eqn.params["fill_value"]
    if fill is None and jnp.issubdtype(eqn.outputs[0].dtype, np.inexact):
        fill = np.nan
    return fill is not None and bool(fill == 0 or fill != fill)  # NaN, added to NaN, is NaN


@rules_for("gather", positions=True)
def _gather(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    operand, indices = types
    if isinstance(indices, Partial) or (isinstance(operand, Partial) and not isinstance(indices, Invariant)):
        raise Incomplete(partial_indices(types))
    if isinstance(operand, Partial):
        if not _fills_alike(eqn, operand):
            raise Incomplete((0,))
        return [operand]
    d, out_rank = eqn.params["dimension_numbers"], len(eqn.outputs[0].shape)
    index_axis = len(eqn.inputs[1].shape) - 1
    scatter_dims = [i for i in range(out_rank) if i not in d.offset_dims]
    _refuse_positions(operand)
    if isinstance(indices, Batched) and indices.dim == index_axis:
        raise Coupling(_PICKS)
    if not isinstance(operand, Batched):
        assert isinstance(indices, Batched)
        _refuse_positions(indices)
        return [indices.moved(scatter_dims[indices.dim])]
    if operand.dim in d.operand_batching_dims:
        paired = d.start_indices_batching_dims[list(d.operand_batching_dims).index(operand.dim)]
        return [_pair(operand, indices, paired).moved(scatter_dims[paired])]
    if _places_own_row(operand, indices, d.start_index_map, index_axis) and operand.dim in d.collapsed_slice_dims:
        assert isinstance(indices, Batched)
        return [operand.moved(scatter_dims[indices.dim])]
    whole = eqn.params["slice_sizes"][operand.dim] == eqn.inputs[0].shape[operand.dim]
    if isinstance(indices, Batched) or operand.dim in d.start_index_map or not whole:
        raise Coupling(_PICKS)
    gone = {*d.collapsed_slice_dims, *d.operand_batching_dims}
    window = [i for i in range(len(eqn.inputs[0].shape)) if i not in gone]
    return [operand.moved(d.offset_dims[window.index(operand.dim)])]


_ADDS = ("scatter-add", "scatter_add", "scatter-sub")


@rules_for("scatter", "scatter-mul", "scatter-min", "scatter-max", *_ADDS, positions=True)
def _scatter(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    operand, indices, updates = types
    if isinstance(indices, Partial):
        raise Incomplete((1,))
    _refuse_positions(operand, updates)
    if isinstance(operand, Batched):
        return [_scatter_into_batch(eqn, operand, indices, updates)]
    neutral = operand == Partial("sum") or (isinstance(operand, Invariant) and operand.zero)
    if isinstance(updates, Batched):
        return [_scatter_from_batch(eqn, types, neutral)]
    linear = neutral and (updates == Partial("sum") or getattr(updates, "zero", False))
    if partial_indices(types) and isinstance(indices, Invariant) and linear and eqn.name in _ADDS:
        return [Partial("sum")]
    if partial_indices(types):
        raise Incomplete(partial_indices(types))
    raise Coupling("writes one value at places that differ between examples")


def _scatter_from_batch(eqn: Eqn, types: Sequence[BatchType], neutral: bool) -> BatchType:
    """Examples' updates to a value that all share: legal where they add to a partial sum, as for an embedding."""
    operand, indices, updates = types
    assert isinstance(updates, Batched)
    window = eqn.params["dimension_numbers"].update_window_dims
    if updates.dim in window or eqn.name not in _ADDS or not isinstance(indices, Batched):
        raise Coupling("writes examples into a value that all of them share")
    rows = [i for i in range(len(eqn.inputs[2].shape)) if i not in window]
    if rows[indices.dim] != updates.dim or indices.joined(updates) is None:
        raise Coupling(PAIRS, ADVICE_PAIRS)
    if not neutral and isinstance(operand, Partial):
        raise Incomplete((0,))
    if not neutral:
        advice = "Add the examples' values to jnp.zeros, then add the result to the value."
        raise Coupling("adds examples' values to one that isn't zero at first", advice)
    _refuse_positions(indices)
    return Partial("sum")


def _scatter_into_batch(eqn: Eqn, operand: Batched, indices: BatchType, updates: BatchType) -> Batched:
    d = eqn.params["dimension_numbers"]
    require_complete((operand, indices, updates))
    if not isinstance(updates, Batched):
        raise Coupling(_WRITES)
    layout = operand.joined(updates)
    rows = [i for i in range(len(eqn.inputs[2].shape)) if i not in d.update_window_dims]
    if layout is None:
        raise Coupling(_WRITES)
    index_axis = len(eqn.inputs[1].shape) - 1
    if operand.dim in d.operand_batching_dims:
        paired = d.scatter_indices_batching_dims[list(d.operand_batching_dims).index(operand.dim)]
        if updates.dim != rows[paired]:
            raise Coupling(_WRITES)
        return _pair(layout, indices, paired)
    if _places_own_row(operand, indices, d.scatter_dims_to_operand_dims, index_axis):
        assert isinstance(indices, Batched)
        if operand.dim not in d.inserted_window_dims or updates.dim != rows[indices.dim]:
            raise Coupling(_WRITES)
        return replace(layout, uniform=False)
    gone = {*d.inserted_window_dims, *d.operand_batching_dims}
    window = [i for i in range(len(eqn.inputs[0].shape)) if i not in gone]
    if isinstance(indices, Batched) or operand.dim in d.scatter_dims_to_operand_dims or operand.dim not in window:
        raise Coupling(_WRITES)
    if updates.dim != d.update_window_dims[window.index(operand.dim)]:
        raise Coupling(_WRITES)
    return layout


@rules_for("dynamic_slice")
def _dynamic_slice(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    operand, *starts = types
    if partial_indices(starts):
        raise Incomplete(partial_indices(types))
    if isinstance(operand, Batched) and eqn.params["slice_sizes"][operand.dim] != eqn.inputs[0].shape[operand.dim]:
        raise Coupling("takes particular examples of the batch")
    return [operand]


@rules_for("dynamic_update_slice")
def _dynamic_update_slice(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    operand, update, *starts = types
    if partial_indices(starts):
        raise Incomplete(partial_indices(types))
    if partial_indices((operand, update)):
        return [partial_if_linear(types, (0, 1))]
    layout = common_layout((operand, update))
    if not (isinstance(operand, Batched) and isinstance(update, Batched)) or (
        eqn.inputs[0].shape[layout.dim] != eqn.inputs[1].shape[layout.dim]
    ):
        raise Coupling("writes to particular examples of the batch")
    return [layout]
