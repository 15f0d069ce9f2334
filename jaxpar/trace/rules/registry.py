"""The open registry of batch-type rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxpar.trace.ir import Eqn
from jaxpar.trace.types import Batched, BatchType, Coupling, Incomplete, Partial

Rule = Callable[[Eqn, Sequence[BatchType]], Sequence[BatchType]]

_RULES: dict[str, Rule] = {}
_KEEPS_POSITIONS: set[str] = set()
_BUILTIN: set[str] = set()

PAIRS = "pairs examples with other examples of the batch"
ADVICE_PAIRS = (
    "Compare an example with what belongs to it: extra columns of the batch, or a bank kept in the state. If both "
    "sides hold the same examples in another order (time-major, batch-major), transpose before you merge dimensions."
)


def register_batch_rule(primitive: Any, rule: Rule | None = None) -> Any:
    """Say how a primitive treats the batch, so that steps which use it can be pipelined.

    `rule(eqn, types)` gets the equation (`eqn.inputs[i].shape`, `eqn.params`; sizes that grow with the batch are
    `Size`s) and the batch type of each input, at least one of which is not `Invariant`; it returns the type of each
    output, or raises `Coupling("a clause that says how examples mix")`, or `Incomplete(indices)` where partial
    reductions must be complete first.

    Args:
        primitive: a `jax.extend.core.Primitive`, or its name.
        rule: the rule; omitted where this is used as a decorator.

    Returns: the rule.

    Example:
        >>> from jaxpar.trace.types import Batched, Invariant
        >>> @register_batch_rule("my_rowwise_kernel")
        ... def my_rule(eqn, types):
        ...     return [types[0]]
    """
    if rule is None:
        return lambda f: register_batch_rule(primitive, f)
    name = getattr(primitive, "name", primitive)
    _RULES[name] = rule
    _BUILTIN.discard(name)
    _KEEPS_POSITIONS.discard(name)
    return rule


def rules_for(*names: str, positions: bool = False) -> Callable[[Rule], Rule]:
    """Register one rule for several primitives. `positions`: it knows about examples' positions."""

    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = rule
            _BUILTIN.add(name)
            if positions:
                _KEEPS_POSITIONS.add(name)
        return rule

    return register


def find_rule(name: str) -> Rule | None:
    return _RULES.get(name)


def keeps_positions(name: str) -> bool:
    return name in _KEEPS_POSITIONS


def is_builtin(name: str) -> bool:
    return name in _BUILTIN


# -- what the rules share ----------------------------------------------------------------------------------------------


def partial_indices(types: Sequence[BatchType]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(types) if isinstance(t, Partial))


def require_complete(types: Sequence[BatchType]) -> None:
    """Partial reductions can't go through: they must be complete."""
    if indices := partial_indices(types):
        raise Incomplete(indices)


def common_layout(types: Sequence[BatchType]) -> Batched:
    """The one layout that all batched inputs share."""
    first, *others = (t.plain for t in types if isinstance(t, Batched))
    for other in others:
        joined = first.joined(other) if first.dim == other.dim else None
        if joined is None:
            raise Coupling(PAIRS, ADVICE_PAIRS)
        first = joined
    return first


def partial_if_linear(types: Sequence[BatchType], linear_in: Sequence[int]) -> Partial:
    """The result is linear in the inputs `linear_in`, taken together: all of them partial sums, or zero."""
    partial = partial_indices(types)
    rest = [t for i, t in enumerate(types) if i not in linear_in]
    ok = all(isinstance(types[i], Partial) or getattr(types[i], "zero", False) for i in linear_in)
    ops = {types[i].op for i in partial}  # type: ignore[union-attr]
    if not ok or partial_indices(rest) or any(isinstance(t, Batched) for t in rest) or ops != {"sum"}:
        raise Incomplete(partial)
    return Partial("sum")
