"""The law of batch types: what a typed program computes for the micro-batches makes up what it computes for the batch.

    check_law(f, (x, y), params)

traces f(batched, invariant) at two sizes, infers the types, evaluates the typed program for the rows of each
micro-batch, and checks for every output

    Invariant              equal in each micro-batch, and to the whole batch's value
    Batched(dim, o, i)     the micro-batches' values, joined in the layout (o, n, i), are the whole batch's value
    Partial(op)            the reduction of the micro-batches' values is the whole batch's value
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.errors import TraceError
from jaxpar.lower.evaluate import Env, Rows, evaluate_eqn, read
from jaxpar.trace import INVARIANT, Batched, BatchType, Invariant, Partial, Var
from jaxpar.trace.capture import pair_jaxprs
from jaxpar.trace.infer import Typed, infer_types

_REDUCE = {
    "sum": "add",
    "max": "maximum",
    "min": "minimum",
    "prod": "multiply",
    "and": "bitwise_and",
    "or": "bitwise_or",
}


@dataclass(frozen=True)
class Traced:
    """A function of flat (batched, invariant) arguments, typed, with its arguments."""

    typed: Typed
    function: Callable[..., list[Any]]
    args: list[Any]
    total: int

    def out_types(self) -> list[BatchType]:
        """The types of the outputs, partial ones as they are before they are completed."""
        made = {v: eqn for eqn in self.typed.body.eqns for v in eqn.outputs}
        types = []
        for atom in self.typed.body.outputs:
            eqn = made.get(atom)
            if eqn is not None and eqn.name == "complete":
                atom = eqn.inputs[0]
            types.append(self.typed.types[atom] if isinstance(atom, Var) else INVARIANT)
        return types


def trace(f: Callable[..., Any], batched: Any, invariant: Any = (), total: int | None = None, micro: int = 2) -> Traced:
    """Types of `f(*batched, *invariant)`; its batched arguments hold their examples along dimension 0."""
    batched, invariant = tuple(batched), tuple(invariant)
    leaves = jax.tree.leaves(batched)
    total = len(leaves[0]) if total is None else total
    args, tree = jax.tree.flatten((batched, invariant))

    def flat(*xs: Any) -> list[Any]:
        batched, invariant = jax.tree.unflatten(tree, xs)
        return jax.tree.leaves(f(*batched, *invariant))

    def at(n: int) -> Any:
        shapes = [(n, *x.shape[1:]) if i < len(leaves) else x.shape for i, x in enumerate(map(jnp.asarray, args))]
        avals = [jax.ShapeDtypeStruct(s, jnp.asarray(x).dtype) for s, x in zip(shapes, args, strict=True)]
        return jax.make_jaxpr(flat)(*avals)

    body = pair_jaxprs(at(total), at(micro), (total, micro))
    types = [Batched(0) if i < len(leaves) else INVARIANT for i in range(len(args))]
    typed = infer_types(body, types, [i >= len(leaves) for i in range(len(args))])
    return Traced(typed, flat, list(map(jnp.asarray, args)), total)


def check_law(
    f: Callable[..., Any],
    batched: Any,
    invariant: Any = (),
    *,
    total: int | None = None,
    sizes: Sequence[int] = (3,),
    expect: Sequence[type] | None = None,
    rtol: float = 1e-9,
) -> Traced:
    """The law for f, at micro-batches of each of `sizes` examples.

    Args:
        expect: the outputs' types, where they are part of what is claimed.
    """
    traced = trace(f, batched, invariant, total)
    if expect is not None:
        assert [type(t) for t in traced.out_types()] == list(expect), list(map(str, traced.out_types()))
    for count in sizes:
        assert traced.total % count == 0
        expected, outputs, uniform = _run_compiled(traced, count)
        for atom, whole, parts in zip(traced.typed.body.outputs, expected, zip(*outputs, strict=True), strict=True):
            _assert_obeys(traced.typed.types[atom] if isinstance(atom, Var) else INVARIANT, parts, whole, rtol)
        for t, x in uniform:
            assert_equal(x, np.broadcast_to(x.take([0], t.dim), x.shape), 0.0)
    return traced


def _run_compiled(traced: Traced, count: int) -> tuple[list[Any], list[list[Any]], list[tuple[Batched, Any]]]:
    """What the function gives on the whole batch, its program on each micro-batch, and the values typed uniform."""
    typed = traced.typed
    uniform = {v: t for v, t in typed.types.items() if isinstance(t, Batched) and t.uniform}

    @jax.jit
    def run(args: list[Any]) -> Any:
        envs = run_microbatches(traced, args, count)
        outputs = [[read(env, atom) for atom in typed.body.outputs] for env in envs]
        return jax.tree.map(_raw, (traced.function(*args), outputs, [envs[0][v] for v in uniform]))

    expected, outputs, values = jax.tree.map(np.asarray, run(traced.args))
    return expected, outputs, list(zip(uniform.values(), values, strict=True))


def run_microbatches(traced: Traced, args: list[Any], count: int) -> list[Env]:
    """The values of each micro-batch of `count` examples. Equation by equation, so that totals can be completed."""
    body, total = traced.typed.body, traced.total
    envs: list[Env] = []
    for first in range(0, total, count):
        env: Env = {v: jnp.asarray(c) for v, c in body.consts.items()}
        for var, arg in zip(body.inputs, args, strict=True):
            env[var] = arg[first : first + count] if isinstance(traced.typed.types[var], Batched) else arg
        envs.append(env)
    for eqn in body.eqns:
        if eqn.name == "complete":
            reduce = getattr(jnp, _REDUCE[eqn.params["op"]])
            done = functools.reduce(reduce, [read(env, eqn.inputs[0]) for env in envs])
            for env in envs:
                env[eqn.outputs[0]] = done
            continue
        for m, env in enumerate(envs):
            values = [read(env, atom) for atom in eqn.inputs]
            out = evaluate_eqn(eqn, values, Rows(count, total, jnp.int32(m * count)))
            env.update(zip(eqn.outputs, out, strict=True))
    return envs


def _assert_obeys(t: BatchType, parts: Sequence[Any], expected: Any, rtol: float) -> None:
    if isinstance(t, Invariant):
        for part in parts:
            assert_equal(part, expected, rtol)
    elif isinstance(t, Partial):
        assert_equal(functools.reduce(getattr(np, _REDUCE[t.op]), parts), expected, rtol)
    else:
        assert_equal(join(t, parts), expected, rtol)


def join(t: Batched, parts: Sequence[Any]) -> Any:
    """The whole batch's value from the micro-batches', in the layout (outer, n, inner) along `t.dim`."""
    split = []
    for part in parts:
        shape = part.shape
        count = shape[t.dim] // (t.outer * t.inner)
        split.append(part.reshape(*shape[: t.dim], t.outer, count, t.inner, *shape[t.dim + 1 :]))
    whole = np.concatenate(split, t.dim + 1)
    shape = whole.shape
    return whole.reshape(*shape[: t.dim], shape[t.dim] * shape[t.dim + 1] * shape[t.dim + 2], *shape[t.dim + 3 :])


def assert_equal(actual: Any, expected: Any, rtol: float) -> None:
    """Equal, exactly if not floating point."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        np.testing.assert_array_equal(actual, expected)
        return
    wide = np.complex128 if jnp.issubdtype(expected.dtype, jnp.complexfloating) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    scale = float(np.max(np.abs(expected), initial=1e-30, where=np.isfinite(expected)))
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * scale)


def _raw(x: Any) -> Any:
    """Keys as their words."""
    x = jnp.asarray(x)
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def check_refused(f: Callable[..., Any], batched: Any, invariant: Any, clause: str) -> str:
    """That f is refused, with a message that holds `clause` and names a line of f; the message."""
    with pytest.raises(TraceError) as caught:
        trace(f, batched, invariant)
    message = str(caught.value)
    assert clause in message, message
    lines, first = inspect.getsourcelines(f)
    places = [f"{inspect.getsourcefile(f)}:{line}" for line in range(first, first + len(lines))]
    assert any(place in message for place in places), f"{message}\n\nnames none of {places[0]} to {places[-1]}"
    return message
