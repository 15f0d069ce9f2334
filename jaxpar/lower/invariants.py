"""Invariant values that stage programs read: computed once per step, or again where that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.plan.flow import CHEAP
from jaxpar.trace import Eqn, Program, Var

_LAYOUT = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "stop_gradient", "copy"})


def expand_invariants(program: Program, wanted: Sequence[Var]) -> tuple[tuple[Eqn, ...], tuple[Var, ...]]:
    """`stored -> wanted`: the equations to repeat in place, and the values that must be stored, in canonical order.

    Repeated are changes of layout, and cheap functions of nothing (masks, zeros); the rest is stored.
    """
    eqns: dict[Eqn, None] = {}
    stored: dict[Var, None] = {}
    stack: list[tuple[Var, bool]] = [(v, False) for v in reversed(wanted)]
    while stack:
        v, ready = stack.pop()
        producer = program.producer.get(v)
        if v in stored or producer in eqns:
            continue
        if producer is None or not _is_repeated(program, producer):
            stored[v] = None
        elif ready:
            eqns[producer] = None
        else:
            stack.append((v, True))
            stack.extend((u, False) for u in reversed(producer.reads))
    return tuple(eqns), tuple(stored)


def _is_repeated(program: Program, eqn: Eqn) -> bool:
    return eqn.name in _LAYOUT or (eqn.name in CHEAP and _is_constant(program, eqn))


def _is_constant(program: Program, eqn: Eqn) -> bool:
    """Whether the equation depends on no input at all."""
    return all(
        (producer := program.producer.get(v)) is not None and producer.name in CHEAP and _is_constant(program, producer)
        for v in eqn.reads
    )
