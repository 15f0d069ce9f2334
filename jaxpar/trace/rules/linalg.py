"""Decompositions and solves of matrices, and Fourier transforms: legal where the batch is a leading dimension."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.trace.ir import Eqn
from jaxpar.trace.rules.registry import common_layout, partial_if_linear, partial_indices, require_complete, rules_for
from jaxpar.trace.types import Batched, BatchType, Coupling, Invariant, Partial

# The dimensions that belong to the operation, last in each operand; and the operands in which it is linear.
_CORE_RANKS: dict[str, tuple[int, ...]] = {
    "cholesky": (2,),
    "cholesky_update": (2, 1),
    "eig": (2,),
    "eigh": (2,),
    "geqp3": (2, 1),
    "geqrf": (2,),
    "hessenberg": (2,),
    "householder_product": (2, 1),
    "lu": (2,),
    "lu_pivots_to_permutation": (1,),
    "ormqr": (2, 1, 2),
    "qr": (2,),
    "schur": (2,),
    "svd": (2,),
    "symmetric_product": (2, 2),
    "triangular_solve": (2, 2),
    "tridiagonal": (2,),
    "tridiagonal_solve": (1, 1, 1, 2),
}
_LINEAR = {"ormqr": (2,), "triangular_solve": (1,), "tridiagonal_solve": (3,)}


@rules_for(*_CORE_RANKS)
def _matrices(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types) and eqn.name in _LINEAR:
        return [partial_if_linear(types, _LINEAR[eqn.name])]
    require_complete(types)
    if eqn.name == "triangular_solve" and isinstance(types[0], Invariant) and _is_columns(eqn, types[1]):
        return [types[1]]
    for atom, t, rank in zip(eqn.inputs, types, _CORE_RANKS[eqn.name], strict=True):
        if isinstance(t, Batched) and t.dim >= len(atom.shape) - rank:
            raise Coupling("takes the examples as the rows or columns of one matrix")
    return [common_layout(types)] * len(eqn.outputs)


def _is_columns(eqn: Eqn, t: BatchType) -> bool:
    """Whether the examples are the right-hand sides of one system."""
    rank = len(eqn.inputs[1].shape)
    return isinstance(t, Batched) and t.dim == (rank - 1 if eqn.params["left_side"] else rank - 2)


@rules_for("fft")
def _fourier(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    (t,) = types
    if isinstance(t, Partial):
        return [partial_if_linear(types, (0,))]
    assert isinstance(t, Batched)
    if t.dim >= len(eqn.inputs[0].shape) - len(eqn.params["fft_lengths"]):
        raise Coupling("transforms along the batch")
    return [t]
