"""State created on its ranks: each rank runs the part of the user's initialiser that makes its own leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpar import _jax
from jaxpar.errors import LowerError
from jaxpar.lower.axes import Axes
from jaxpar.lower.evaluate import Rows
from jaxpar.lower.layout import PlacedState, StateLayout
from jaxpar.lower.rounds import Source, build_rounds, make_group
from jaxpar.lower.run_rounds import run_rounds
from jaxpar.trace.capture import pair_jaxprs

P = PartitionSpec


def init_leaves(
    layouts: Sequence[StateLayout], axes: Axes, init_fn: Callable[..., Any], args: Sequence[Any]
) -> list[PlacedState]:
    """`init_fn(*args)` as placed states. Its flat results must be the layouts' leaves, in order."""
    flat, tree = jax.tree.flatten(args)
    jaxpr = jax.make_jaxpr(lambda *xs: jax.tree.leaves(init_fn(*jax.tree.unflatten(tree, xs))))(*flat)
    body = pair_jaxprs(jaxpr, jaxpr, (2, 1))
    leaves = [leaf for layout in layouts for leaf in layout.leaves]
    if len(leaves) != len(body.outputs):
        raise LowerError(f"the initialiser returns {len(body.outputs)} leaves, but the step's state has {len(leaves)}.")
    shared = (*body.inputs, *body.consts)
    groups, everywhere, start = [], [], 0
    for layout in layouts:
        values = list(zip(layout.leaves, body.outputs[start : start + len(layout.leaves)], strict=True))
        start += len(layout.leaves)
        rows = [[(leaf.place, atom) for leaf, atom in values if r in leaf.ranks] for r in range(axes.num_ranks)]
        groups.append(make_group(layout.packing, rows))  # type: ignore[arg-type]
        everywhere += [atom for leaf, atom in values if not leaf.ranks]
    sources = {v: Source("shared", None, i) for i, v in enumerate(shared)}
    replicas = layouts[0].groups
    rounds = build_rounds(body.eqns, dict.fromkeys(shared), [sources] * axes.num_ranks, groups, replicas, everywhere)

    def local(*inputs: Any) -> Any:
        stored = {"shared": [*inputs, *map(jnp.asarray, body.consts.values())]}
        once = Rows(1, 1, jnp.int32(0), axes.manual)
        filled, same = run_rounds(rounds, stored, once, lax.axis_index(axes.stage), axes.stage)
        return [[b[None] for b in row] for row in filled], same

    mesh = layouts[0].mesh
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=P(), out_specs=(P(axes.stage), P()), axis_names=set(axes.manual), check_vma=False
    )
    shardings = (
        [[layout.buffer_sharding(k) for k in range(len(layout.packing.buffers))] for layout in layouts],
        [jax.sharding.NamedSharding(mesh, P())] * len(everywhere),
    )
    buffers, same = jax.jit(mapped, out_shardings=shardings)(*flat)
    kept = iter(same)
    return [
        PlacedState(row, [_jax.wrap_key(next(kept), leaf.dtype) for leaf in layout.shared], layout)
        for layout, row in zip(layouts, buffers, strict=True)
    ]
