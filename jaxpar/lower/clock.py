"""When each action of a real step starts and ends, as the ranks themselves say.

Around the switch of each tick two callbacks ask the host for the time. Data hold them in their places:

    received, where transfers block -> start -> registers, which the action is chosen and fed by
    what the action made            -> end   -> what is sent to other ranks
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec

from jaxpar.lower.axes import Axes
from jaxpar.lower.branches import Carry

Edge = Literal["start", "end"]

# Of the carry, what stands for all that an action makes: the conditional gives all of it at once. A look at rings and
# mailboxes would make XLA:CPU copy them. (So where residuals are staged, storing them is not counted.)
_MADE = ("sent", "totals", "outputs")
_REPLICA = 3  # place of the replica in a note


class Clock:
    """Notes when each rank starts and ends each tick. Of several replicas, the first one's times are kept.

    Args:
        axes: those of the machine.
        free: the mesh's other axes, which are left to the compiler.
        blocking: whether an action waits for what is received in its tick, though it doesn't need it.
    """

    def __init__(self, axes: Axes, free: Sequence[str], *, blocking: bool):
        self._axes, self._free, self._blocking = axes, tuple(free), blocking
        self._notes: dict[tuple[str, int, int], float] = {}

    def reset(self) -> None:
        """Forget what was noted."""
        self._notes.clear()

    def seconds_of(self, rank: int, tick: int) -> tuple[float, float]:
        """Start and end of a tick, counted from some moment that is the same for all ranks."""
        return self._notes["start", rank, tick], self._notes["end", rank, tick]

    # -- run time ------------------------------------------------------------------------------------------------------

    def time(self, work: Callable[[Any, Carry], Carry], tick: Any, row: Any, carry: Carry, early: Any) -> Carry:
        """`work(row, carry)`, with its start and end noted.

        Args:
            early: what has been received in this tick, None if nothing has been.
        """
        row = row + self._stamp("start", tick, early if self._blocking else None)
        carry = work(row, carry)
        # A select and no barrier, which XLA:CPU drops before it puts operations in order.
        noted = self._stamp("end", tick, [carry[name] for name in _MADE]) == 0
        carry["sent"] = [[jnp.where(noted, x, jnp.zeros_like(x)) for x in payload] for payload in carry["sent"]]
        return carry

    def _stamp(self, edge: Edge, tick: Any, after: Any) -> Any:
        """Note the time once all arrays of `after` are there; gives a zero once it is noted."""
        axes, free = self._axes, self._free
        replica = lax.axis_index(axes.data) if axes.data else 0
        numbers = (edge == "start", tick, lax.axis_index(axes.stage), replica, _touch(after))
        # one operand: each takes the callback a while
        note = jnp.stack([lax.convert_element_type(x, jnp.int32) for x in numbers])
        ask = lambda note: io_callback(self._note, jax.ShapeDtypeStruct((), np.uint32), note)
        if not free:
            return ask(note)
        # Callbacks want a region in which all axes are manual. Of the other axes, too, the first shard's time is kept.
        shard = lambda: sum(lax.axis_index(axis) for axis in free)
        inside = lambda note: ask(note.at[_REPLICA].add(lax.convert_element_type(shard(), jnp.int32)))
        same = PartitionSpec()
        return jax.shard_map(inside, in_specs=same, out_specs=same, axis_names=set(free), check_vma=False)(note)

    def _note(self, note: Any) -> np.ndarray:
        now = time.perf_counter()
        is_start, tick, rank, replica, _ = np.asarray(note).tolist()
        if replica == 0:
            self._notes["start" if is_start else "end", rank, tick] = now
        return np.zeros((), np.uint32)


def _touch(tree: Any) -> Any:
    """An integer that takes all arrays of a tree to know."""
    total = jnp.int32(0)
    for x in jax.tree.leaves(tree):
        if x.size:
            element = lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(())
            total += lax.convert_element_type(element != 0, jnp.int32)
    return total
