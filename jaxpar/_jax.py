"""Everything that depends on the JAX version: the one file to read when JAX moves.

Only public names (`jax`, `jax.extend`) and attributes of public objects are used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

Literal = jex_core.Literal
Primitive = jex_core.Primitive

# Calls whose body may be spliced into the caller without a change of meaning.
_CALLS = {"jit", "pjit", "call", "closed_call", "core_call", "eval_jaxpr", "composite"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_REMAT = {"checkpoint", "remat", "remat2"}
_TRANSFORM = re.compile(r"^(transpose|jvp|vmap|linearize|vjp|jit|pjit|checkpoint|remat)\((.*)\)$")
_PACKAGE = str(Path(__file__).parent)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and its constants (from jax 0.11 a closed jaxpr is a `Jaxpr`)."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def is_jaxpr(value: Any) -> bool:
    return (hasattr(value, "eqns") and hasattr(value, "invars")) or isinstance(value, jex_core.ClosedJaxpr)


class InlinedCall(NamedTuple):
    """A call that can be spliced into its caller: `outputs = body(*(operands[i] for i in inputs))`.

    opaque: the body's equations know nothing of the user's code.
    """

    body: Any
    inputs: Sequence[int]
    opaque: bool = False


def inlined_call(eqn: Any) -> InlinedCall | None:
    """The call that an equation is, or None."""
    name, operands = eqn.primitive.name, range(len(eqn.invars))
    if name == "custom_linear_solve":  # operands: constants of matvec, vecmat, solve, transpose_solve, then b
        lengths = eqn.params["const_lengths"]
        start = lengths.matvec + lengths.vecmat
        solve = operands[start : start + lengths.solve]
        return InlinedCall(eqn.params["jaxprs"].solve, (*solve, *operands[sum(lengths) :]))
    if name == "call_hi_primitive":  # jax.experimental.hijax: `jnp.searchsorted` is one
        return InlinedCall(_expand(eqn), operands, opaque=True)
    if name not in _CALLS and name not in _REMAT:
        return None
    bodies = [value for value in eqn.params.values() if is_jaxpr(value)]
    return InlinedCall(bodies[0], operands) if len(bodies) == 1 else None


def _expand(eqn: Any) -> Any:
    """The closed jaxpr of a primitive that says itself what it does in terms of others."""
    primitive = eqn.params["_prim"]

    def flat(*operands: Any) -> list[Any]:
        return jax.tree.leaves(primitive.expand(*jax.tree.unflatten(primitive.in_tree, operands)))

    return jax.make_jaxpr(flat)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))


def scan_counts(params: dict[str, Any], num_inputs: int) -> tuple[int, int]:
    """`(num_consts, num_carry)` of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax >= 0.11: params['ft_in'] is the flat tree of (consts, carry, xs).
    consts, carry, xs = (len(list(part.vals)) for part in params["ft_in"].unpack())
    assert consts + carry + xs == num_inputs
    return consts, carry


def name_stack(eqn: Any) -> str:
    return str(eqn.source_info.name_stack)


class Scope(NamedTuple):
    """What a name stack says of an equation: its module; whether it was made by transposition (the backward pass);
    whether it repeats the forward for the backward (`jax.checkpoint`)."""

    path: tuple[str, ...]
    backward: bool
    recomputed: bool


@functools.cache
def parse_name_stack(stack: str) -> Scope:
    """
    >>> parse_name_stack("transpose(jvp(GPT))/block_3/attn")
    Scope(path=('GPT', 'block_3', 'attn'), backward=True, recomputed=False)
    """
    path: list[str] = []
    for token in _split_stack(stack):
        wrapped = False
        while match := _TRANSFORM.match(token):
            token, wrapped = match.group(2), True
        for name in _split_stack(token):
            if name and name not in ("rematted_computation", "checkpoint") and not (wrapped and path[-1:] == [name]):
                path.append(name)
    return Scope(tuple(path), "transpose(" in stack, "rematted_computation" in stack)


def _split_stack(stack: str) -> list[str]:
    tokens, depth, start = [], 0, 0
    for i, char in enumerate(stack):
        depth += (char == "(") - (char == ")")
        if char == "/" and depth == 0:
            tokens.append(stack[start:i])
            start = i + 1
    return [*tokens, stack[start:]]


def user_frame(eqn: Any) -> str:
    """`file:line` of the innermost frame that belongs to the user, or '' where JAX kept none."""
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else list(traceback.frames)
    ours = (_PACKAGE, str(Path(jax.__file__).parent))
    outside = [f for f in frames if not f.file_name.startswith(ours) and not f.file_name.startswith("<")]
    mine = [f for f in outside if "site-packages" not in f.file_name and "dist-packages" not in f.file_name]
    for frame in mine or outside:
        return f"{frame.file_name}:{frame.line_num}"
    return ""


def dtype_bytes(dtype: Any) -> int:
    """Bytes of one element; PRNG key types count their words."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return int(dtype.itemsize)
    return int(np.dtype(dtype).itemsize)


def is_key(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


def draws_rows(key_dtype: Any) -> bool:
    """Whether rows of a draw can be computed alone: partitionable threefry, JAX's default generator."""
    threefry = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype
    return bool(key_dtype == threefry and getattr(jax.config, "jax_threefry_partitionable"))  # noqa: B009 (not in its stub)


def unwrap_key(x: Any) -> Any:
    """PRNG keys as their words; anything else as it is."""
    return jax.random.key_data(x) if is_key(x.dtype) else x


def wrap_key(x: Any, dtype: Any) -> Any:
    """Undo `unwrap_key` for a value of type `dtype`; keys that are wrapped already stay as they are."""
    return jax.random.wrap_key_data(x, impl=key_impl(dtype)) if is_key(dtype) and not is_key(x.dtype) else x


def raw_shape(shape: tuple[int, ...], dtype: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the words of a PRNG key array; those given for anything else."""
    if not is_key(dtype):
        return shape, np.dtype(dtype)
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl(dtype))))
    return (*shape, *words.shape), np.dtype(words.dtype)


def key_impl(dtype: Any) -> str:
    """The name of the generator that keys of this type are for."""
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype == dtype:
            return impl
    raise ValueError(f"unknown PRNG implementation {dtype}")


def permutes_block(platform: str) -> bool:
    """Whether work of a program waits for a permute that comes before it, though it doesn't need what that brings."""
    return platform == "cpu"


def copies_rings(platform: str) -> bool:
    """Whether the compiler copies a whole buffer that one branch of a conditional reads and another one writes.

    XLA:CPU of jaxlib 0.10 does; later ones don't, nor do XLA:GPU and XLA:TPU.
    """
    return platform == "cpu" and tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
