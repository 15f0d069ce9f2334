"""Totals: the reductions over micro-batches and replicas, and the buffers that they grow in.

Replicas are ranks of the data axis, and ranks of one group on the stage axis. Where groups differ in size, for which
`psum` has no form that compiles for TPUs, they are reduced by recursive doubling (Thakur, Rabenseifner, Gropp, IJHPCA
2005), one permutation a round for all groups. Every rank of a group ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.lower.axes import Axes
from jaxpar.lower.packing import Item, Packing, Place, pack_items
from jaxpar.lower.slots import item_of
from jaxpar.plan import StageGraph
from jaxpar.trace import Eqn, Program, Var

COMBINE = {
    "sum": jnp.add,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "prod": jnp.multiply,
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
}
_REDUCE = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}
_IDENTITY = {"sum": 0, "prod": 1, "or": 0}


def _total_item(v: Var, op: str) -> Item:
    """Sums of half-precision values are accumulated in single precision."""
    item = item_of(v, 1)
    half = item.dtype in (np.dtype(np.float16), np.dtype(jnp.bfloat16))
    return Item(item.shape, np.dtype(np.float32) if half and op == "sum" else item.dtype, tag=op)


def totals_on(graph: StageGraph, rank: int) -> list[tuple[Var, str]]:
    """What a rank accumulates, and by which reduction."""
    op = lambda v: graph.program.types[v].op  # type: ignore[union-attr]
    return [(v, op(v)) for n in graph.nodes_on(rank) for v in graph.programs[n].partials]


def pack_totals(graph: StageGraph) -> Packing:
    return pack_items([[_total_item(v, op) for v, op in totals_on(graph, r)] for r in range(graph.num_ranks)])


def totals_places(graph: StageGraph, totals: Packing) -> dict[tuple[Var, str], Place]:
    return {
        key: place
        for rank, places in enumerate(totals.places)
        for key, place in zip(totals_on(graph, rank), places, strict=True)
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


# -- over groups of ranks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubling:
    """One round: who sends to whom, which ranks combine what they receive with their own, which replace their own."""

    pairs: tuple[tuple[int, int], ...]
    combines: tuple[bool, ...]
    replaces: tuple[bool, ...]


def plan_doubling(groups: Sequence[Sequence[int]]) -> tuple[Doubling, ...]:
    """The rounds after which each rank has the total of its group.

    A group of d ranks takes log2(d) rounds; where that isn't whole, those beyond the power of two below first give
    theirs to another one, and get the total from it in the end.

    >>> [len(plan_doubling(groups)) for groups in ([[0], [1]], [[0, 1], [2]], [[0, 1, 2, 3], [4, 5, 6]])]
    [0, 1, 4]
    """
    power = {tuple(group): 1 << (len(group).bit_length() - 1) for group in groups}
    rounds = [[(g[j], g[j - p]) for g, p in power.items() for j in range(p, len(g))]]
    distance = 1
    while distance < max(power.values()):
        rounds.append([(g[j], g[j ^ distance]) for g, p in power.items() for j in range(p) if distance < p])
        distance *= 2
    ranks = range(sum(map(len, groups)))
    made = []
    for pairs in rounds:
        receivers = {dst for _, dst in pairs}
        made.append(Doubling(tuple(sorted(pairs)), tuple(r in receivers for r in ranks), (False,) * len(ranks)))
    last = {src for src, _ in rounds[0]}
    back = tuple(sorted((dst, src) for src, dst in rounds[0]))
    made.append(Doubling(back, (False,) * len(ranks), tuple(r in last for r in ranks)))
    return tuple(r for r in made if r.pairs)


def reduce_over_group(x: Any, op: Any, groups: Sequence[Sequence[int]], rounds: Sequence[Doubling], axis: str) -> Any:
    """The reduction of `x` over this rank's group on the mesh axis `axis`."""
    if rounds and op in _REDUCE and len(set(map(len, groups))) == 1:
        return _REDUCE[op](x, axis, axis_index_groups=[list(group) for group in groups])
    rank = lax.axis_index(axis)
    for r in rounds:
        other = lax.ppermute(x, axis, r.pairs)
        total = jnp.where(jnp.asarray(r.combines)[rank], COMBINE[op](x, other), x)
        x = jnp.where(jnp.asarray(r.replaces)[rank], other, total)
    return x


def reduce_over_replicas(x: Any, op: Any, axes: Axes) -> Any:
    """The reduction over the data axis."""
    if axes.data is None or axes.replicas == 1:
        return x
    if op in _REDUCE:
        return _REDUCE[op](x, axes.data)
    gathered = lax.all_gather(x, axes.data)
    return {"prod": jnp.prod, "and": jnp.bitwise_and.reduce, "or": jnp.bitwise_or.reduce}[op](gathered, axis=0)
