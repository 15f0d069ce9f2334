"""The IR of a traced step: equations whose sizes are functions of the number of examples.

One step is traced at two batch sizes (see `capture`); where an integer differs it becomes a `Size`,
so that the same equation can be evaluated for any number of examples `n`.

    Var, Literal          an equation reads and writes these
    Eqn                   one primitive, parameters at any n, nested bodies for control flow
    Body                  a sequence of equations with inputs and outputs
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from typing import Literal as OneOf

from jaxpar import _jax


@dataclass(frozen=True)
class Size:
    """The integer `per_example * n + extra`, for n examples."""

    per_example: int
    extra: int = 0

    def at(self, n: int) -> int:
        return self.per_example * n + self.extra

    def __str__(self) -> str:
        head = "n" if self.per_example == 1 else f"{self.per_example}n"
        return head if not self.extra else f"{head}{self.extra:+d}"


Dim = int | Size

_REPLICATED_ELEMENTS = 64


def at_size(value: Any, n: int) -> Any:
    """`value` with each `Size` in it, through containers, replaced by its integer at n."""
    if isinstance(value, Size):
        return value.at(n)
    if isinstance(value, tuple):
        items = [at_size(v, n) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [at_size(v, n) for v in value]
    if isinstance(value, dict):
        return {k: at_size(v, n) for k, v in value.items()}
    return value


def has_size(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(has_size(v) for v in value)
    if isinstance(value, dict):
        return any(has_size(v) for v in value.values())
    return isinstance(value, Size)


@dataclass(frozen=True, eq=False)
class Var:
    """A value. `shape` may hold `Size`s; `name` is the user's, for arguments."""

    shape: tuple[Dim, ...]
    dtype: Any
    name: str = ""

    def shape_at(self, n: int) -> tuple[int, ...]:
        return at_size(self.shape, n) if self.batch_dims else self.shape  # type: ignore[return-value]

    def bytes_at(self, n: int) -> int:
        return math.prod(self.shape_at(n)) * _jax.dtype_bytes(self.dtype)

    @property
    def is_replicated(self) -> bool:
        """Whether, as state, it is so small that every rank keeps it: scalars, counters, PRNG keys."""
        if _jax.is_key(self.dtype) or self.dtype.kind in "iub":
            return not self.batch_dims and math.prod(self.shape_at(1)) <= _REPLICATED_ELEMENTS
        return not self.shape

    @cached_property
    def batch_dims(self) -> tuple[int, ...]:
        return tuple(i for i, d in enumerate(self.shape) if isinstance(d, Size))

    def __str__(self) -> str:
        dtype = getattr(self.dtype, "name", str(self.dtype))
        return f"{self.name or 'value'} : {dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class Literal:
    """A constant written in the equation. `normaliser` marks one that differs between the two sizes: its value is
    that of the whole batch, which is what makes a mean over the batch a sum over micro-batches."""

    value: Any
    dtype: Any
    normaliser: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.value, "shape", ()))


Atom = Var | Literal


Form = OneOf["local", "rows", "whole"]
"""How an equation is evaluated for a micro-batch of n examples: "local": with its parameters at n; "rows": it draws
random bits, of which the micro-batch's rows are computed; "whole": at the whole batch's size, then the rows taken."""

complete_p = _jax.Primitive("complete")
"""`complete(partial)`: the reduction over the whole batch. Ends accumulation; evaluated by the executor."""

global_positions_p = _jax.Primitive("global_positions")
"""`global_positions(i)`: the examples' indices in the whole batch, from their indices in the micro-batch."""


@dataclass(frozen=True, eq=False)
class Eqn:
    """One equation. `params` may hold `Size`s; `bodies` maps a parameter's name to its nested programs."""

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    params: Mapping[str, Any]
    bodies: Mapping[str, tuple[Body, ...]] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    backward: bool = False  # made by transposition
    recomputed: bool = False  # repeats the forward for the backward
    sources: tuple[Any, ...] = ()  # the jaxpr equation it came from and the calls around it, for messages
    form: Form = "local"

    @cached_property
    def name(self) -> str:
        return str(self.primitive.name)

    @cached_property
    def reads(self) -> tuple[Var, ...]:
        return tuple(v for v in self.inputs if isinstance(v, Var))

    def params_at(self, n: int) -> dict[str, Any]:
        return {k: at_size(v, n) for k, v in self.params.items()}

    @property
    def where(self) -> str:
        """`file:line` in the user's code, or '' where JAX kept none."""
        return next((place for eqn in self.sources if (place := _jax.user_frame(eqn))), "")


@dataclass(frozen=True, eq=False)
class Body:
    """`inputs, consts -> outputs`."""

    inputs: tuple[Var, ...]
    eqns: tuple[Eqn, ...]
    outputs: tuple[Atom, ...]
    consts: Mapping[Var, Any] = field(default_factory=dict)


def drop_dead_eqns(eqns: list[Eqn], outputs: tuple[Atom, ...]) -> tuple[Eqn, ...]:
    """The equations that some output depends on, in order."""
    needed = {v for v in outputs if isinstance(v, Var)}
    kept: list[Eqn] = []
    for eqn in reversed(eqns):
        if any(v in needed for v in eqn.outputs):
            needed.update(eqn.reads)
            kept.append(eqn)
    return tuple(reversed(kept))


rows_p = _jax.Primitive("rows")
"""`rows(x)`: the micro-batch's rows of a constant that holds the whole batch's. Form "whole"."""

alias_p = _jax.Primitive("alias")
"""`alias(x)`: x itself, under another name."""

take_examples_p = _jax.Primitive("take_examples")
"""`take_examples(x)`: examples `first ... first + count - 1` of a batched value, along `dim` as `Batched` says."""

join_examples_p = _jax.Primitive("join_examples")
"""`join_examples(x, y, ...)`: the examples of all operands, in order; they lie along `dim` as `Batched` says."""
