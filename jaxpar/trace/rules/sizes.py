"""What holds of every equation: where sizes that grow with the batch may stand."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.trace.ir import Eqn, Size, Var, has_size
from jaxpar.trace.types import Batched, BatchType, Coupling

# Parameters that hold one entry for each dimension of the first operand; the batch's may grow.
_BY_DIM = {
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes",),
    "pad": ("padding_config",),
    "slice": ("start_indices", "limit_indices"),
}
# Parameters that hold the shape of the output, or what its rule has looked at.
_FREE = {
    "broadcast_in_dim": ("shape",),
    "conv_general_dilated": ("feature_group_count",),
    "iota": ("shape",),
    "reshape": ("new_sizes",),
    "split": ("sizes",),
}


def check_outputs(eqn: Eqn, out_types: Sequence[BatchType]) -> None:
    """Each output grows with the batch exactly as its type says.

    Raises: Coupling.
    """
    for var, t in zip(eqn.outputs, out_types, strict=True):
        if len(var.batch_dims) > 1:
            raise Coupling("makes an array with two batch dimensions (batch × batch)")
        grows = {dim: var.shape[dim] for dim in var.batch_dims}
        if grows != ({t.dim: Size(t.outer * t.inner)} if isinstance(t, Batched) else {}):
            raise Coupling(f"makes {_rows(var)} out of the batch")


def _rows(var: Var) -> str:
    return "an array of " + " × ".join(map(str, var.shape)) + " values, with n examples," if var.shape else "a scalar"


def check_params(eqn: Eqn, types: Sequence[BatchType]) -> None:
    """No parameter of an equation on examples depends on how many there are, but for those that are its shape.

    Raises: Coupling.
    """
    for key, value in eqn.params.items():
        if not has_size(value) or key in _FREE.get(eqn.name, ()):
            continue
        first = types[0] if types else None
        if key in _BY_DIM.get(eqn.name, ()) and isinstance(first, Batched):
            value = (*value[: first.dim], *value[first.dim + 1 :])
        if has_size(value):
            raise Coupling(f"depends on the number of examples ({key})")
