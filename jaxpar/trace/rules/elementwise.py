"""Operations that act on each element, with the ones among them that are linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpar.trace.ir import Eqn, Literal
from jaxpar.trace.rules.registry import common_layout, partial_if_linear, partial_indices, require_complete, rules_for
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Invariant, Partial, UsesPositions

_NONLINEAR = """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz cos cosh digamma eq eq_to
    erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log
    log1p log2 logistic lt_to max min mulhi ne nextafter not one_minus_square or polygamma polynomial population_count
    pow random_gamma_grad reduce_precision regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square tan tanh threefry2x32 xor zeta
""".split()


def _elementwise(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    return _batched_outputs(eqn, types)


def _batched_outputs(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    layout = common_layout(types)
    for atom, t in zip(eqn.inputs, types, strict=True):
        if isinstance(t, Batched) and len(atom.shape) != len(eqn.outputs[0].shape):
            raise Coupling("broadcasts examples along another dimension")
    return [layout] * len(eqn.outputs)


rules_for(*_NONLINEAR)(_elementwise)


@rules_for("copy", "copy_p", "device_put", "name", "optimization_barrier", "reshard", "sharding_constraint", "stage")
def _identity(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    return list(types)


@rules_for("neg", "real", "imag", "conj", "stop_gradient")
def _linear(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types):
        return [partial_if_linear(types, (0,))]
    return _batched_outputs(eqn, types)


@rules_for("add", "add_any", "sub", "complex")
def _sum(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types):
        return [partial_if_linear(types, tuple(range(len(types))))]
    return _batched_outputs(eqn, types)


@rules_for("mul")
def _product(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    partial = partial_indices(types)
    if partial:
        return [partial_if_linear(types, partial[:1])]
    return _batched_outputs(eqn, types)


@rules_for("div")
def _quotient(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    if partial_indices(types):
        if not jnp.issubdtype(eqn.outputs[0].dtype, np.inexact):  # integer division rounds
            raise Incomplete(partial_indices(types))
        return [partial_if_linear(types, (0,))]
    return _batched_outputs(eqn, types)


@rules_for("bitcast_convert_type")
def _bitcast(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    """Where the sizes of the two types differ a last dimension comes or goes; the others stay."""
    require_complete(types)
    return [common_layout(types)]


@rules_for("convert_element_type", positions=True)
def _convert(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    (t,) = types
    after = eqn.outputs[0].dtype
    if isinstance(t, Partial):
        if t.op == "sum" and _keeps_sums(eqn.inputs[0].dtype, after):
            return [t]
        raise Incomplete((0,))
    assert isinstance(t, Batched)
    if t.holds_positions and not counts_examples(after):
        raise UsesPositions
    return [t]


def _keeps_sums(before: Any, after: Any) -> bool:
    """Whether converting each part and adding is adding and converting, up to rounding."""
    if jnp.issubdtype(before, np.inexact):
        return bool(jnp.issubdtype(after, np.inexact))
    if not jnp.issubdtype(before, np.integer) or jnp.issubdtype(after, np.bool_):
        return False
    narrows = jnp.issubdtype(after, np.integer) and after.itemsize <= before.itemsize  # modulo a power of two
    return bool(narrows or before.itemsize >= 4)  # sums of small integers may wrap around


def counts_examples(dtype: Any) -> bool:
    """Whether every example's index fits in the type exactly."""
    return bool(jnp.issubdtype(dtype, np.integer)) and dtype.itemsize >= 4


@rules_for("select_n", positions=True)
def _select(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    which, *cases = types
    if isinstance(which, Batched) and which.positions == "never":
        return [cases[0]]
    if any(isinstance(t, Batched) and t.holds_positions for t in types):
        raise UsesPositions
    if partial_indices(cases) and isinstance(which, Invariant):
        return [partial_if_linear(types, tuple(range(1, len(types))))]
    require_complete(types)
    return [common_layout(types)]


@rules_for("lt", positions=True)
def _less(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    first, second = types
    if isinstance(first, Batched) and first.positions == "all" and isinstance(second, Invariant):
        bound = eqn.inputs[1]
        if second.zero or (isinstance(bound, Literal) and np.all(np.asarray(bound.value) <= 0)):
            return [Batched(first.dim, first.outer, first.inner, "never")]
    if any(isinstance(t, Batched) and t.holds_positions for t in types):
        raise UsesPositions
    return _batched_outputs(eqn, types)
