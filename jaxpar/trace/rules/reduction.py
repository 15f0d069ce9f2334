"""Reductions, scans along an axis, sorting: legal along any axis but the batch, or a partial reduction along it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.trace.ir import Eqn
from jaxpar.trace.rules.registry import common_layout, partial_indices, require_complete, rules_for
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Partial

_OPS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
    "reduce_prod": "prod",
}


def _shifted(t: Batched, axes: Sequence[int]) -> Batched:
    return t.moved(t.dim - sum(a < t.dim for a in axes))


@rules_for(*_OPS)
def _reduce(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t, op = types[0], _OPS[eqn.name]
    if isinstance(t, Partial):
        if t.op == op:
            return [t]
        raise Incomplete((0,))
    assert isinstance(t, Batched)
    axes = eqn.params["axes"]
    return [Partial(op) if t.dim in axes else _shifted(t, axes)]  # type: ignore[arg-type]


_MIXES = {
    "argmax": "picks one example by comparing it with the others",
    "argmin": "picks one example by comparing it with the others",
    "reduce": "reduces the batch by a function of the user's",
    "reduce_xor": "reduces the batch by exclusive or",
}


@rules_for("argmax", "argmin", "reduce_xor", "reduce")
def _other_reduce(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    axes = eqn.params.get("axes", eqn.params.get("dimensions"))
    layout = common_layout(types)
    if layout.dim in axes:
        raise Coupling(_MIXES[eqn.name])
    return [_shifted(layout, axes)] * len(eqn.outputs)


@rules_for("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    t = types[0]
    if isinstance(t, Partial):
        if eqn.name == "cumsum" and t.op == "sum":
            return [t]
        raise Incomplete((0,))
    assert isinstance(t, Batched)
    if eqn.params["axis"] == t.dim:
        raise Coupling("accumulates along the batch")
    return [t]


@rules_for("sort")
def _sort(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    layout = common_layout(types)
    if eqn.params["dimension"] == layout.dim:
        raise Coupling("sorts along the batch")
    return [layout] * len(eqn.outputs)


@rules_for("top_k", "approx_top_k")
def _top_k(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    t = types[0]
    assert isinstance(t, Batched)
    axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1)) % len(eqn.inputs[0].shape)
    if axis == t.dim:
        raise Coupling("takes the largest along the batch")
    return [t] * len(eqn.outputs)


_WINDOWED = ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")


@rules_for(*_WINDOWED)
def _reduce_window(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if eqn.name == "reduce_window_sum" and partial_indices(types) == (0,) and types[0] == Partial("sum"):
        return [types[0]]
    require_complete(types)
    layout = common_layout(types)
    _check_window(eqn, layout.dim)
    return [layout] * len(eqn.outputs)


@rules_for("select_and_scatter", "select_and_scatter_add", "select_and_gather_add")
def _select_and_scatter(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    layout = common_layout(types)
    _check_window(eqn, layout.dim)
    return [layout]


def _check_window(eqn: Eqn, dim: int) -> None:
    p = eqn.params
    padding = p["padding"][dim] if p.get("padding") is not None else (0, 0)
    dilation = [p[k][dim] for k in ("base_dilation", "window_dilation") if p.get(k) is not None]
    single = p["window_dimensions"][dim] == p["window_strides"][dim] == 1
    if not single or tuple(padding) != (0, 0) or set(dilation) - {1}:
        raise Coupling("slides a window along the batch")
