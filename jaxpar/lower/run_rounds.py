"""The rounds at run time, on one rank: see `jaxpar.lower.rounds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpar import _jax
from jaxpar.lower.evaluate import Env, Rows, evaluate, read
from jaxpar.lower.packing import Place, fill_buffers, read_place
from jaxpar.lower.rounds import CommonWork, Group, RankProgram, Round, Rounds, Source
from jaxpar.trace import Atom, Var


def run_rounds(
    rounds: Rounds, buffers: Mapping[str, Sequence[Any]], rows: Rows, rank: Any, axis: str
) -> tuple[list[list[Any]], list[Any]]:
    """Run on each rank of the mesh axis `axis`.

    Args:
        buffers: stored values by group, those of this rank.
        rank: this rank's index, traced.

    Returns: for each group its buffers, and the results that every rank has.
    """
    stored = {name: list(values) for name, values in buffers.items()}
    results: tuple = ((), (), (), ())
    for level, r in enumerate(rounds.rounds):
        stored[f"common{level}"] = _run_common(r.common, stored, rows)
        branches = [lambda p=p, r=r: _run_program(p, r, rounds.groups, stored, rows) for p in r.programs]
        which = jnp.asarray(r.program_of, jnp.int32)[rank]
        results = lax.switch(which, branches) if len(branches) > 1 else branches[0]()
        small, sends, _, _ = results
        stored[f"small{level}"] = [lax.all_gather(x, axis) for x in small]
        stored[f"sent{level}"] = [lax.ppermute(x, axis, pairs) for x, (_, pairs) in zip(sends, r.sends, strict=True)]
    return list(map(list, results[2])), list(results[3])


def _run_common(common: CommonWork, stored: Mapping[str, Sequence[Any]], rows: Rows) -> list[Any]:
    fetched = [_fetch(stored, s) for _, s in common.inputs]
    # The barrier keeps XLA from moving the reads' reshapes through a sum over hundreds of scalars, one a pass.
    fetched = lax.optimization_barrier(fetched)
    env: Env = {v: _typed(x, v) for (v, _), x in zip(common.inputs, fetched, strict=True)}
    evaluate(common.eqns, env, rows)
    return [_jax.unwrap_key(env[v]) for v in common.values]


def _run_program(
    p: RankProgram, r: Round, groups: Sequence[Group], stored: Mapping[str, Sequence[Any]], rows: Rows
) -> Any:
    env: Env = {v: _typed(_fetch(stored, s), v) for v, s in p.inputs}
    evaluate(p.eqns, env, rows)

    def store(atom: Atom) -> Any:
        return _jax.unwrap_key(jnp.asarray(read(env, atom)))

    small = fill_buffers(r.small, [place for place, _ in p.small], [store(v) for _, v in p.small])
    sends = [
        jnp.zeros(item.shape, item.dtype) if v is None else store(v)
        for v, (item, _) in zip(p.sends, r.sends, strict=True)
    ]
    filled = [
        fill_buffers(g.packing, [place for place, _ in values], [store(v) for _, v in values])
        for g, values in zip(groups, p.groups, strict=False)
    ]
    return small, sends, filled, [store(v) for v in p.everywhere]


def _fetch(stored: Mapping[str, Sequence[Any]], source: Source) -> Any:
    values = stored[source.group]
    place = source.place
    if source.group.startswith("small"):  # gathered from all ranks
        assert place is not None
        gathered = values[place.buffer]
        if place.offset is None:
            values, place = [gathered[source.index]], Place(0, place.shape)
        else:
            start = source.index * gathered.shape[1] + place.offset
            values, place = [gathered.reshape(-1)], Place(0, place.shape, start)
    x = read_place(values, place) if place is not None else values[source.index]
    return _jax.unwrap_key(jnp.asarray(x))


def _typed(raw: Any, v: Var) -> Any:
    return _jax.wrap_key(raw, v.dtype) if _jax.is_key(v.dtype) else raw.astype(v.dtype)
