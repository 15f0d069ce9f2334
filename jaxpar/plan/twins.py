"""Which values of the backward pass are forward values computed again, as rematerialisation (`jax.checkpoint`) does.

Equations of the same operation on the same values make the same values: numbering values (Cocke and Schwartz 1970)
finds, for each recomputed value, the forward's. It says exactly where in the forward pass the recomputation belongs,
and a stage may begin it from the forward's value that it received, rather than from another stage's recomputation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from jaxpar.trace import Atom, Eqn, Literal, Program, Var
from jaxpar.trace.fingerprint import describe_operation

_IDENTITIES = {"optimization_barrier", "copy", "name"}


def find_twins(program: Program, forward: Iterable[Eqn]) -> Mapping[Var, Var]:
    """For each value made by a backward equation that one of `forward` makes too: the forward's."""
    same: dict[Var, Var] = {}  # value -> the first one that is equal
    made: dict[tuple, list[Eqn]] = defaultdict(list)
    for eqn in program.eqns:
        if program.phase[eqn] not in ("before", "microbatch"):
            continue
        if eqn.name in _IDENTITIES:
            same.update((v, same.get(u, u)) for u, v in zip(eqn.inputs, eqn.outputs, strict=True) if isinstance(u, Var))
            continue
        others = made[eqn.name, tuple(_key(a, same) for a in eqn.inputs)]
        equal = next((e for e in others if describe_operation(e) == describe_operation(eqn)), None)
        if equal is None:
            others.append(eqn)
        else:
            same.update(zip(eqn.outputs, equal.outputs, strict=True))
    originals: dict[Var, dict[tuple[str, ...], Var]] = defaultdict(dict)  # by the module that makes them
    for eqn in forward:
        for v in eqn.outputs:
            originals[same.get(v, v)].setdefault(eqn.path, v)
    found = {}
    for eqn in program.eqns:
        if eqn in program.backward:
            for v in eqn.outputs:
                if modules := originals.get(same.get(v, v)):
                    found[v] = modules.get(eqn.path) or next(iter(modules.values()))
    return found


def _key(atom: Atom, same: Mapping[Var, Var]) -> object:
    if isinstance(atom, Literal):
        return (np.asarray(atom.value).tobytes(), str(atom.dtype), atom.normaliser)
    return same.get(atom, atom)
