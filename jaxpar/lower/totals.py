"""Totals: the reductions over micro-batches and replicas, and the buffers that they grow in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.lower.axes import Axes
from jaxpar.lower.packing import Item, Packing, Place, pack_items
from jaxpar.lower.slots import item_of
from jaxpar.plan import StageGraph
from jaxpar.trace import Eqn, Program, Var

_REDUCE = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}
_IDENTITY = {"sum": 0, "prod": 1, "or": 0}


def _total_item(v: Var, op: str) -> Item:
    """Sums of half-precision values are accumulated in single precision."""
    item = item_of(v, 1)
    half = item.dtype in (np.dtype(np.float16), np.dtype(jnp.bfloat16))
    return Item(item.shape, np.dtype(np.float32) if half and op == "sum" else item.dtype, tag=op)


def _totals_of(graph: StageGraph, rank: int) -> list[Var]:
    return [v for n in graph.nodes_on(rank) for v in graph.programs[n].partials]


def _op(program: Program, v: Var) -> str:
    return program.types[v].op  # type: ignore[union-attr]


def pack_totals(graph: StageGraph) -> Packing:
    ranks = range(graph.num_ranks)
    return pack_items([[_total_item(v, _op(graph.program, v)) for v in _totals_of(graph, r)] for r in ranks])


def totals_places(graph: StageGraph, totals: Packing) -> dict[tuple[Var, str], Place]:
    return {
        (v, _op(graph.program, v)): place
        for rank, places in enumerate(totals.places)
        for v, place in zip(_totals_of(graph, rank), places, strict=True)
    }


def early_eqns(program: Program) -> tuple[Eqn, ...]:
    """Totals that depend on the batch alone, and the equations behind them: computed before the pipeline starts."""
    wanted: set[Var] = set()
    eqns = []
    for eqn in reversed(program.eqns):
        total = eqn.name == "complete" and eqn.outputs[0] not in program.late
        if total or not wanted.isdisjoint(eqn.outputs):
            eqns.append(eqn)
            wanted.update(eqn.reads)
    return tuple(reversed(eqns))


def identity_of(item: Item) -> Any:
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


def reduce_over_replicas(x: Any, op: Any, axes: Axes) -> Any:
    """The reduction over replicas."""
    if axes.data is None or axes.replicas == 1:
        return x
    if op in _REDUCE:
        return _REDUCE[op](x, axes.data)
    gathered = lax.all_gather(x, axes.data)
    return {"prod": jnp.prod, "and": jnp.bitwise_and.reduce, "or": jnp.bitwise_or.reduce}[op](gathered, axis=0)
