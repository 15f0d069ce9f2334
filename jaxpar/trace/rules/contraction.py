"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpar.trace.ir import Eqn, Size
from jaxpar.trace.rules.registry import ADVICE_PAIRS, partial_if_linear, partial_indices, rules_for
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Partial

_PRODUCT = "multiplies examples with other examples of the batch"


def _bilinear(types: Sequence[BatchType]) -> list[BatchType] | None:
    """The result where no operand is batched, or a partial sum meets a batched one; None otherwise."""
    partial = partial_indices(types)
    if not partial:
        return None
    if len(partial) == 2:
        raise Incomplete(partial)
    return [partial_if_linear(types, partial)]


@rules_for("dot_general")
def _dot_general(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if (result := _bilinear(types)) is not None:
        return result
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    lhs, rhs = types
    if isinstance(lhs, Batched) and isinstance(rhs, Batched):
        layout = lhs.joined(rhs)
        if layout is not None and (lhs.dim, rhs.dim) in zip(lhs_c, rhs_c, strict=True):
            return [Partial("sum")]
        if layout is not None and (lhs.dim, rhs.dim) in zip(lhs_b, rhs_b, strict=True):
            return [layout.moved(tuple(lhs_b).index(lhs.dim))]
        raise Coupling(_PRODUCT, ADVICE_PAIRS)
    side = 0 if isinstance(lhs, Batched) else 1
    t = types[side]
    assert isinstance(t, Batched)
    taken = ((*lhs_c, *lhs_b), (*rhs_c, *rhs_b))
    if t.dim in taken[side]:
        raise Coupling("contracts the batch with a dimension that isn't one")
    free = [[d for d in range(len(x.shape)) if d not in gone] for x, gone in zip(eqn.inputs, taken, strict=True)]
    offset = len(lhs_b) + (len(free[0]) if side else 0)
    return [t.moved(offset + free[side].index(t.dim))]


@rules_for("conv_general_dilated")
def _convolution(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if (result := _bilinear(types)) is not None:
        return result
    numbers = eqn.params["dimension_numbers"]
    groups, batch_groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    lhs, rhs = types
    if isinstance(lhs, Batched) and isinstance(rhs, Batched):
        if (lhs.dim, rhs.dim) == (numbers.lhs_spec[1], numbers.rhs_spec[0]):
            return [_own_kernels(lhs, rhs, groups, numbers.out_spec[1])]
        contracted = lhs.dim == numbers.lhs_spec[1] and rhs.dim == numbers.rhs_spec[1]
        if contracted and groups == 1 and lhs.joined(rhs) is not None:
            return [Partial("sum")]
        raise Coupling(_PRODUCT, ADVICE_PAIRS)
    if isinstance(lhs, Batched) and lhs.dim == numbers.lhs_spec[0] and batch_groups == 1:
        return [lhs.moved(numbers.out_spec[0])]
    if isinstance(rhs, Batched) and rhs.dim == numbers.rhs_spec[0] and groups == batch_groups == 1:
        return [rhs.moved(numbers.out_spec[1])]
    raise Coupling("convolves along the batch")


def _own_kernels(lhs: Batched, rhs: Batched, groups: Any, dim: int) -> Batched:
    """A convolution vmapped over its kernels too: the examples are groups of features."""
    own = isinstance(groups, Size) and not groups.extra and lhs.outer == rhs.outer == 1
    if not own or lhs.inner % groups.per_example or rhs.inner % groups.per_example:
        raise Coupling(_PRODUCT, ADVICE_PAIRS)
    return Batched(dim, 1, rhs.inner)
