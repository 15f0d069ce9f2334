"""Residuals by way of a staging area, for compilers that would copy whole rings otherwise.

XLA:CPU of jaxlib 0.10 copies a ring in every branch of a conditional if one branch reads it and another writes it.
There the stage programs only read rings, and leave what they would write in the areas of `Staging`; a conditional of
its own for each distinct way to store them then copies it to the rings.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpar.lower.branches import STORE, Branch, write_ring
from jaxpar.lower.packing import Item
from jaxpar.lower.slots import RingPlace

Store = tuple[tuple[int, int, RingPlace], ...]  # (area, first column of the bundle, place)


@dataclass(frozen=True, eq=False)
class Staging:
    """The k-th value of one shape that an action keeps has the same area for all actions."""

    areas: tuple[Item, ...]
    stores: tuple[Store, ...]  # distinct ones
    number_of: Mapping[Branch, int]  # of the store of a branch that keeps something, counted from 1

    def store_of(self, branch: Branch) -> Store:
        number = self.number_of.get(branch, 0)
        return self.stores[number - 1] if number else ()

    # -- run time ------------------------------------------------------------------------------------------------------

    def fresh(self) -> list[Any]:
        """Made inside the branches: what they don't fill, they needn't pass on."""
        return [jnp.zeros(item.shape, item.dtype) for item in self.areas]

    def store(self, registers: Any, rings: list[Any], staged: Sequence[Any]) -> list[Any]:
        """One action's residuals, put in the rings. A conditional each: with two writers in one, rings are copied."""
        for number, store in enumerate(self.stores, 1):
            write = partial(_write, store, registers)
            rings = lax.cond(registers[STORE] == number, write, lambda rings, _: rings, rings, staged)
        return rings


def plan_staging(branches: Sequence[Branch], rings: Sequence[Item]) -> Staging:
    """The areas and the distinct stores of all branches' residuals."""
    areas: dict[tuple[Item, int], int] = {}
    stores: dict[Store, int] = {}
    number_of: dict[Branch, int] = {}
    for branch in branches:
        seen: Counter[Item] = Counter()
        store = []
        for _, column, place in branch.ring_writes:
            item = Item(place.shape, rings[place.ring].dtype)
            store.append((areas.setdefault((item, seen[item]), len(areas)), column, place))
            seen[item] += 1
        if store:
            number_of[branch] = stores.setdefault(tuple(store), len(stores) + 1)
    return Staging(tuple(item for item, _ in areas), tuple(stores), number_of)


def _write(store: Store, registers: Any, rings: Sequence[Any], staged: Sequence[Any]) -> list[Any]:
    rings = list(rings)
    column = functools.cache(lambda k: registers[k])
    for area, first, place in store:
        rings[place.ring] = write_ring(rings[place.ring], column(first + place.column), place, staged[area])
    return rings
