"""Real runs of a machine, timed action by action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpar import _jax
from jaxpar.errors import LowerError
from jaxpar.lower.clock import Clock
from jaxpar.lower.machine import Machine
from jaxpar.lower.step import jit_step
from jaxpar.schedule import Action, Simulation, StageCosts, Timetable


@dataclass(frozen=True, eq=False)
class Recorder:
    """A compiled step that is timed, and donates nothing."""

    timetable: Timetable  # of groups of ranks
    ranks: tuple[int, ...]  # of each group, the one whose times are kept
    clock: Clock
    compiled: Any

    def run(self, inputs: Sequence[Any], costs: StageCosts | None = None) -> tuple[Simulation, Any]:
        """One step: its times, and what it returns.

        Args:
            inputs: those of `jit_step`'s function.
            costs: of the stages, for the bytes that they keep.
        """
        self.clock.reset()
        results = jax.block_until_ready(self.compiled(*inputs))
        jax.effects_barrier()
        times: dict[Action, tuple[float, float]] = {}
        for tick, cells in enumerate(self.timetable.grid):
            for rank, action in enumerate(cells):
                if action is not None:
                    times[action] = self.clock.seconds_of(self.ranks[rank], tick)
        return Simulation.from_times(self.timetable, times, costs), results


def make_recorder(
    machine: Machine,
    timetable: Timetable,
    mesh: Mesh,
    updated: Sequence[int],
    inputs: Sequence[Any],
    check: Callable[[Any], None],
) -> Recorder:
    """Compile a timed step.

    Args:
        timetable: that the machine was made for, of its groups of ranks.
        updated: positions of the state arguments that have a new value.
        inputs: those of `jit_step`'s function, as values or as shapes.
        check: of the compiled step, before it runs.

    Raises: LowerError if the devices belong to several processes, whose clocks are not one.
    """
    if (count := len({device.process_index for device in mesh.devices.flat})) > 1:
        raise LowerError(
            f"can't record a step on the devices of {count} processes: each has a clock of its own. Record on one "
            "host's devices, or trace with jax.profiler on each."
        )
    axes = machine.axes
    free = [name for name in mesh.axis_names if name not in axes.manual]
    clock = Clock(axes, free, blocking=_jax.permutes_block(mesh.devices.flat[0].platform))
    compiled = jit_step(machine, mesh, updated, donate=False, clock=clock).lower(*inputs).compile()
    check(compiled)
    return Recorder(timetable, tuple(group[0] for group in machine.groups), clock, compiled)
