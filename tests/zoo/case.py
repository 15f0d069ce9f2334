"""What a case of the zoo is: a training step as its author wrote it, and what to call it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A step for one device, its first state, and its data.

    `step(state, batch, *extra)` returns `(new_state, outputs)` if `updates_state`, else `outputs` alone.
    Calling a case's builder again gives equal arrays: nothing in a case depends on anything but its parameters.
    """

    name: str
    step: Callable[..., PyTree]
    state: PyTree
    make_batch: Callable[[int, int], PyTree]  # (size, seed) -> batch with `size` examples
    batch_size: int = 32
    extra: tuple[PyTree, ...] = ()  # arguments after the batch: the same for every example
    updates_state: bool = True
    rtol: float = 1e-9  # what the order of sums may change, relative to a leaf's largest element

    @property
    def batch(self) -> PyTree:
        """The first batch."""
        return self.make_batch(self.batch_size, 0)

    def batches(self, steps: int) -> list[PyTree]:
        """The batches of the first `steps` steps, all different."""
        return [self.make_batch(self.batch_size, seed) for seed in range(steps)]

    def split(self, returned: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """What a call with `state` returned, as `(next state, outputs)`."""
        return returned if self.updates_state else (state, returned)
