"""Batch types: how the whole batch's value of a variable is made of its micro-batches' values.

    Invariant         the same for every micro-batch
    Batched(dim)      examples lie along `dim`: the whole batch's value is the concatenation
    Partial(op)       the whole batch's value is the reduction `op` of the micro-batches' values

A rule maps the types of an equation's inputs to those of its outputs. Where examples mix in any other way it raises
`Coupling`; where it can only go on with a reduction completed over the whole batch, `Incomplete`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal as OneOf


@dataclass(frozen=True)
class Invariant:
    zero: bool = False  # known to be zero: the neutral element of a partial sum

    def __str__(self) -> str:
        return "invariant"


@dataclass(frozen=True)
class Batched:
    """Examples lie along `dim`, whose size is `outer * n * inner`, the examples' index between the two factors.

    `positions` says which of the values are the examples' own indices in the batch (an iota along it): None: none are;
    "all": all of them; "never": a boolean that is false because no position is negative; `(axis, slots)`: those at
    these indices of another axis (the columns of a gather's index array).

    `uniform`: all along `dim` the values are the same (zeros, say), so that any other outer and inner would do too.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    positions: OneOf["all", "never"] | tuple[int, frozenset[int]] | None = None
    uniform: bool = False

    @property
    def plain(self) -> Batched:
        """The same layout, as ordinary data."""
        return replace(self, positions=None)

    def moved(self, dim: int) -> Batched:
        return replace(self, dim=dim, positions=None)

    def joined(self, other: Batched) -> Batched | None:
        """The layout in which both pair up, each along its own dimension; as `self`'s. None: there is none."""
        if other.uniform or (self.outer, self.inner) == (other.outer, other.inner):
            return replace(self.plain, uniform=self.uniform and other.uniform)
        return Batched(self.dim, other.outer, other.inner) if self.uniform else None

    @property
    def holds_positions(self) -> bool:
        return self.positions not in (None, "never")

    def __str__(self) -> str:
        return f"batched({self.dim})"


@dataclass(frozen=True)
class Partial:
    op: OneOf["sum", "max", "min", "and", "or", "prod"] = "sum"

    def __str__(self) -> str:
        return f"partial({self.op})"


BatchType = Invariant | Batched | Partial
INVARIANT = Invariant()


class Coupling(Exception):
    """Examples mix in a way that micro-batches can't reproduce.

    The message is a clause, 'sorts along the batch'; `advice` says what to do instead, where that is known.
    """

    def __init__(self, clause: str, advice: str = ""):
        super().__init__(clause)
        self.advice = advice


class NeedsComplete(Coupling):
    """A coupling in a loop or branch that there wouldn't be if its partial inputs were complete."""


class Incomplete(Exception):
    """The inputs at `indices` are partial reductions that must be complete before this operation."""

    def __init__(self, indices: tuple[int, ...]):
        super().__init__(f"inputs {indices} must be complete")
        self.indices = indices


class UsesPositions(Exception):
    """The rule needs the examples' positions as data: their indices in the whole batch."""
