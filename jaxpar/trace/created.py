"""Examples' values that are made of nothing of theirs: constants, iotas, broadcasts, draws for the whole batch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxpar import _jax
from jaxpar.trace.ir import Eqn, Form, Size, Var, rows_p
from jaxpar.trace.rules.elementwise import counts_examples
from jaxpar.trace.types import INVARIANT, Batched, BatchType, Coupling, Invariant

_SMALL = 2**16  # a constant of at most so many elements is looked at


def type_created(eqn: Eqn, var: Var) -> BatchType:
    """The type of an output of an equation whose inputs are all invariant.

    Raises: Coupling where its size isn't a multiple of the number of examples.
    """
    t = _plain_type(var)
    if isinstance(t, Batched) and eqn.name == "iota" and eqn.params["dimension"] == t.dim:
        return Batched(t.dim, positions="all") if _counts_rows(eqn) else t
    if isinstance(t, Batched) and eqn.name in ("broadcast_in_dim", "iota"):
        return Batched(t.dim, t.outer, t.inner, uniform=True)
    return t


def created_form(eqn: Eqn) -> Form:
    """How a micro-batch gets its rows of what such an equation makes for all examples."""
    if eqn.name == "broadcast_in_dim":
        return "local"
    if eqn.name == "iota":
        along_batch = isinstance(eqn.outputs[0].shape[eqn.params["dimension"]], Size)
        return "whole" if along_batch and not _counts_rows(eqn) else "local"
    by_row = eqn.name == "random_bits" and not eqn.inputs[0].shape and _jax.draws_rows(eqn.inputs[0].dtype)
    return "rows" if by_row else "whole"


def _counts_rows(eqn: Eqn) -> bool:
    """Whether an iota along the batch numbers the examples."""
    (out,) = eqn.outputs
    return out.shape[eqn.params["dimension"]] == Size(1) and counts_examples(out.dtype)


def constant_rows(whole: Var, var: Var, value: Any) -> Eqn:
    """The equation that makes the micro-batch's rows, `var`, of a captured constant with rows for the whole batch."""
    if len(var.batch_dims) == 1 and _is_arange(var, value):
        params = {"dtype": var.dtype, "shape": var.shape, "dimension": var.batch_dims[0], "sharding": None}
        return Eqn(jax.lax.iota_p, (), (var,), params)
    return Eqn(rows_p, (whole,), (var,), {}, form="whole")


def constant_type(var: Var, value: Any) -> BatchType:
    """The type of a captured constant, or of the micro-batch's rows of it.

    Raises: Coupling where its size isn't a multiple of the number of examples.
    """
    t = _plain_type(var)
    if _jax.is_key(var.dtype) or np.size(value) > _SMALL:
        return t
    array = np.asarray(value)
    if not isinstance(t, Batched):
        return Invariant(zero=not array.any())
    if _is_arange(var, array):
        return Batched(t.dim, positions="all")
    if array.dtype == np.bool_ and not array.any():
        return Batched(t.dim, t.outer, t.inner, "never")
    same = bool(np.all(array == array.take([0], t.dim)))
    return Batched(t.dim, t.outer, t.inner, uniform=same)


def _is_arange(var: Var, value: Any) -> bool:
    """Whether the constant numbers the examples, as `np.arange(batch_size)` does."""
    (dim,) = var.batch_dims
    if var.shape[dim] != Size(1) or not counts_examples(var.dtype) or np.size(value) > _SMALL:
        return False
    count = np.shape(value)[dim]
    index = np.arange(count).reshape([count if i == dim else 1 for i in range(len(var.shape))])
    return bool(np.all(np.asarray(value) == index))


def _plain_type(var: Var) -> BatchType:
    dims = var.batch_dims
    if not dims:
        return INVARIANT
    size = var.shape[dims[0]]
    assert isinstance(size, Size)
    if len(dims) > 1:
        raise Coupling("makes an array with two batch dimensions (batch × batch)")
    if size.extra or size.per_example < 1:
        raise Coupling(f"makes {size} rows for n examples")
    return Batched(dims[0], 1, size.per_example)
