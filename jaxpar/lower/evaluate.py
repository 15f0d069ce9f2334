"""An evaluator of programs for the rows of one micro-batch.

Control flow is re-emitted through the public functions, so that nothing of the mesh under which the step was traced is
left in the result. Equations that draw, or make in another way, the whole batch's values yield the micro-batch's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.trace import Atom, Body, Eqn, Literal, Size, Var

Env = dict[Var, Any]


@dataclass(frozen=True)
class Rows:
    """Rows `first ... first + count - 1` of a batch of `total`. `first` is traced."""

    count: int
    total: int
    first: Any
    manual_axes: frozenset[str] = frozenset()


def read(env: Mapping[Var, Any], atom: Atom) -> Any:
    return atom.value if isinstance(atom, Literal) else env[atom]


def evaluate(eqns: Iterable[Eqn], env: Env, rows: Rows) -> Env:
    """Evaluate equations in order, adding their outputs to `env`."""
    for eqn in eqns:
        values = [read(env, atom) for atom in eqn.inputs]
        env.update(zip(eqn.outputs, evaluate_eqn(eqn, values, rows), strict=True))
    return env


def evaluate_eqn(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    if eqn.form == "rows":
        return [_random_rows(eqn, values[0], rows)]
    if eqn.form == "whole":
        whole = _apply(eqn, values, rows, rows.total)
        return [_take_rows(x, v, rows) for x, v in zip(whole, eqn.outputs, strict=True)]
    return _apply(eqn, values, rows, rows.count)


def _apply(eqn: Eqn, values: Sequence[Any], rows: Rows, n: int) -> Sequence[Any]:
    if eqn.name in _SPECIAL:
        return _SPECIAL[eqn.name](eqn, values, rows)
    result = eqn.primitive.bind(*values, **eqn.params_at(n))
    return result if eqn.primitive.multiple_results else [result]


def evaluate_body(body: Body, values: Sequence[Any], rows: Rows) -> list[Any]:
    env: Env = {v: jnp.asarray(c) for v, c in body.consts.items()}
    env.update(zip(body.inputs, values, strict=True))
    evaluate(body.eqns, env, rows)
    return [read(env, atom) for atom in body.outputs]


# -- operations with a meaning of their own ----------------------------------------------------------------------------


def _scan(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    (body,) = eqn.bodies["jaxpr"]
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, xs = values[:num_consts], values[num_consts + num_carry :]
    init = values[num_consts : num_consts + num_carry]

    def step(carry: Any, x: Any) -> Any:
        out = evaluate_body(body, [*consts, *carry, *x], rows)
        return _like(out[:num_carry], carry), tuple(out[num_carry:])

    params = {k: eqn.params[k] for k in ("length", "reverse", "unroll") if k in eqn.params}
    carry, ys = lax.scan(step, tuple(map(jnp.asarray, init)), tuple(xs), **params)
    return [*carry, *ys]


def _like(values: Sequence[Any], models: Sequence[Any]) -> tuple[Any, ...]:
    """The values with exactly the models' dtypes: loop carries differ at most in weak types."""
    pairs = zip(values, models, strict=True)
    return tuple(v if jnp.result_type(v) == m.dtype else lax.convert_element_type(v, m.dtype) for v, m in pairs)


def _while(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    (cond,), (body,) = eqn.bodies["cond_jaxpr"], eqn.bodies["body_jaxpr"]
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:num_cond], values[num_cond : num_cond + num_body]
    return lax.while_loop(
        lambda carry: evaluate_body(cond, [*cond_consts, *carry], rows)[0],
        lambda carry: _like(evaluate_body(body, [*body_consts, *carry], rows), carry),
        tuple(map(jnp.asarray, values[num_cond + num_body :])),
    )


def _cond(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    index, *operands = values
    branches = [lambda *xs, b=b: tuple(map(jnp.asarray, evaluate_body(b, xs, rows))) for b in eqn.bodies["branches"]]
    return lax.switch(lax.convert_element_type(index, np.int32), branches, *operands)


def _global_positions(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    (local,) = values
    return [local + lax.convert_element_type(rows.first, local.dtype)]


def _sharding_constraint(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    """The user's constraint, less the axes that the pipeline handles itself."""
    sharding = eqn.params.get("sharding", eqn.params.get("dst_sharding"))
    if not isinstance(sharding, NamedSharding):
        return values
    elsewhere = frozenset(sharding.mesh.axis_names) - frozenset(jax.sharding.get_abstract_mesh().axis_names)
    spec = PartitionSpec(*(keep_axes(entry, rows.manual_axes | elsewhere) for entry in sharding.spec))
    if all(entry is None for entry in spec):
        return values
    return [lax.with_sharding_constraint(values[0], spec)]


def keep_axes(entry: Any, dropped: frozenset[str]) -> Any:
    """One entry of a PartitionSpec without the axes in `dropped`."""
    axes = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(a for a in axes if a is not None and a not in dropped)
    return kept[0] if len(kept) == 1 else (kept or None)


def _take_examples(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    axis, first, count = eqn.params["dim"] + 1, eqn.params["first"], eqn.params["count"]
    return [_unpart_examples(lax.slice_in_dim(_part_examples(values[0], eqn), first, first + count, axis=axis), eqn)]


def _join_examples(eqn: Eqn, values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    parts = [_part_examples(x, eqn) for x in values]
    return [_unpart_examples(jnp.concatenate(parts, axis=eqn.params["dim"] + 1), eqn)]


def _part_examples(x: Any, eqn: Eqn) -> Any:
    """`[..., outer * n * inner, ...] -> [..., outer, n, inner, ...]`."""
    dim, outer, inner = eqn.params["dim"], eqn.params["outer"], eqn.params["inner"]
    return x.reshape(*x.shape[:dim], outer, x.shape[dim] // (outer * inner), inner, *x.shape[dim + 1 :])


def _unpart_examples(x: Any, eqn: Eqn) -> Any:
    """`[..., outer, n, inner, ...] -> [..., outer * n * inner, ...]`."""
    dim = eqn.params["dim"]
    return x.reshape(*x.shape[:dim], math.prod(x.shape[dim : dim + 3]), *x.shape[dim + 3 :])


_SPECIAL = {
    "alias": lambda eqn, values, rows: values,
    "take_examples": _take_examples,
    "join_examples": _join_examples,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "complete": lambda eqn, values, rows: values,  # the executor has reduced what it reads
    "global_positions": _global_positions,
    "rows": lambda eqn, values, rows: [jnp.asarray(values[0])],
    "sharding_constraint": _sharding_constraint,
    "reshard": _sharding_constraint,
    "device_put": lambda eqn, values, rows: values,
}


# -- rows of whole-batch values ----------------------------------------------------------------------------------------


def _take_rows(x: Any, var: Var, rows: Rows) -> Any:
    for dim in var.batch_dims:
        size = var.shape[dim]
        assert isinstance(size, Size)
        k = size.per_example
        x = lax.dynamic_slice_in_dim(x, rows.first * k, rows.count * k, axis=dim)
    return x


def _random_rows(eqn: Eqn, key: Any, rows: Rows) -> Any:
    """Rows of `random_bits(key, whole shape)` for partitionable threefry.

    Element i, in row-major order, of the whole draw is threefry2x32(key, i), so the rows need no other part of it
    (Salmon et al., SC 2011: counter-based generators).
    """
    (out,), width = eqn.outputs, eqn.params["bit_width"]
    shape = out.shape_at(rows.count)
    (dim,) = out.batch_dims
    size = out.shape[dim]
    assert isinstance(size, Size)
    inner = size.per_example * math.prod(shape[dim + 1 :])
    outer = math.prod(shape[:dim])
    grid = (outer, rows.count, inner)
    row = lax.broadcasted_iota(np.uint32, grid, 0) * np.uint32(rows.total)
    row = row + lax.broadcasted_iota(np.uint32, grid, 1) + lax.convert_element_type(rows.first, np.uint32)
    high, low = _multiply_add(row, inner, lax.broadcasted_iota(np.uint32, grid, 2))
    k0, k1 = jax.random.key_data(key)
    x0, x1 = threefry2x32_p.bind(*(jnp.broadcast_to(k, grid) for k in (k0, k1)), high, low)
    if width == 64:
        bits = (lax.convert_element_type(x0, np.uint64) << np.uint64(32)) | lax.convert_element_type(x1, np.uint64)
    else:
        bits = lax.convert_element_type(x0 ^ x1, out.dtype)
    return bits.reshape(shape)


def _multiply_add(a: Any, b: int, c: Any) -> tuple[Any, Any]:
    """The high and low words of a * b + c, in 32-bit arithmetic; a, c < 2^32, b < 2^32."""
    assert b < 2**32
    mask = np.uint32(0xFFFF)
    b_low, b_high = np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    a_low, a_high = a & mask, a >> 16
    low_low, low_high, high_low = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (low_low >> 16) + (low_high & mask) + (high_low & mask)
    low = (middle << 16) | (low_low & mask)
    high = a_high * b_high + (low_high >> 16) + (high_low >> 16) + (middle >> 16)
    total = low + c
    return high + (total < low).astype(np.uint32), total
