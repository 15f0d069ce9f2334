"""The canonical text of equations: equal texts compute the same, whatever the values are called.

Names of modules and lines of code are left out, so that equal layers have equal texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpar import _jax
from jaxpar.trace.ir import Atom, Body, Eqn, Literal, Var


def fingerprint_eqns(inputs: Sequence[Var], eqns: Iterable[Eqn], outputs: Sequence[Atom]) -> str:
    """A digest of the function `inputs -> outputs` that the equations compute."""
    return hashlib.sha256("\n".join(_lines(inputs, eqns, outputs, {})).encode()).hexdigest()


def _lines(inputs: Sequence[Var], eqns: Iterable[Eqn], outputs: Sequence[Atom], consts: Mapping[Var, Any]) -> list[str]:
    number: dict[Var, int] = {}
    lines = []
    for v in inputs:
        number[v] = len(number)
        lines.append(f"in {v.shape} {v.dtype}")
    for v, value in consts.items():
        number[v] = len(number)
        lines.append(f"const {_value(value)}")
    for eqn in eqns:
        lines.append(f"{','.join(_atom(a, number) for a in eqn.inputs)} {describe_operation(eqn)}")
        for v in eqn.outputs:
            number[v] = len(number)
    lines.append("out " + ",".join(_atom(a, number) for a in outputs))
    return lines


def describe_operation(eqn: Eqn) -> str:
    """All of an equation but the values that it reads: equal for those that do the same to them."""
    params = ";".join(f"{k}={_value(v)}" for k, v in sorted(eqn.params.items()))
    bodies = ";".join(f"{k}={[_body(b) for b in group]}" for k, group in sorted(eqn.bodies.items()))
    return f"{eqn.name} {eqn.form} {params} {bodies} {[(v.shape, str(v.dtype)) for v in eqn.outputs]}"


def _body(body: Body) -> str:
    return "{" + "|".join(_lines(body.inputs, body.eqns, body.outputs, body.consts)) + "}"


def _atom(atom: Atom, number: Mapping[Var, int]) -> str:
    if isinstance(atom, Literal):
        return f"{_value(atom.value)}:{atom.dtype}"
    return f"%{number[atom]}"


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ",".join(map(_value, value)) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_value(v)}" for k, v in value.items()) + "}"
    if _jax.is_jaxpr(value):
        return str(value)
    if callable(value) and not isinstance(value, type):
        return f"{value!r}@{id(value)}"
    if hasattr(value, "dtype") and hasattr(value, "shape") and not _jax.is_key(value.dtype):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return repr(value)
