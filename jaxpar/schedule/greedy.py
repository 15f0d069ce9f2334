"""List scheduling by ticks, the one engine behind GPipe, the 1F1B family, ZB-H1 and ZB-H2, on any graph of stages.

Known as list scheduling or ASAP scheduling with a priority. It is not optimal in general; what it guarantees is below.

**It never gets stuck when each limit is at least 1** (and backwards need not wait for other micro-batches' forwards).
Take the lowest micro-batch m that is not finished. All before it are finished, so a stage that has not done F(m) holds
nothing in flight and its limits do not stop it; the forward edges are acyclic, so some F(m), or after the last of them
some B(m), has all its inputs. Limits set memory and speed, never whether the step can finish.

**Nor in groups, if each limit has room for a group beyond the limits downstream** (those rounded up to whole groups).
Let b be the fewest backwards that any unfinished stage has done. Up the backward edges from there is a stage d, with b
of them done, that lacks only forwards of its group; up the forward edges from d is a stage q that lacks only room. But
q has done at least b backwards, and has room for a group beyond all that d may hold.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.timetable import Timetable


def fill_greedily(
    dag: StageDag,
    num_microbatches: int,
    *,
    limit: Sequence[int] | None = None,
    hold: Sequence[int] | None = None,
    group: Sequence[int] | None = None,
    exchange: int = 2,
    forwards_first: bool = False,
    name: str = "greedy",
) -> Timetable:
    """Fill a timetable tick by tick: each rank does a backward if one is ready, else a forward, else it idles.

    Stages take micro-batches in order. Among the ready actions of one rank a backward comes first, since it frees
    memory; then the lower micro-batch; then the lower stage. At each tick, for each stage `s`:

        in_flight(s) <= limit[s]

    With `hold` backwards are split. An F then comes first, after a W if it is in the way, an I second, a W last; and

        forwards done without their I <= limit[s]
        in_flight(s)                  <= hold[s]         from F to W

    Args:
      dag: the stage graph.
      num_microbatches: M.
      limit: for each stage, the most micro-batches from F to B (or I), at least 1; None for no limit.
      hold: for each stage, the most from F to W, at least 1; None for whole backwards.
      group: for each stage k: it does k forwards, then their k backwards, and starts such a group when its limit has
        room for all of it; 1 by default.
      exchange: ticks that a value takes to another rank, 1 or 2.
      forwards_first: a rank starts its backwards when all its forwards are done; needs limits of M.
      name: the timetable's name.

    Raises:
      ScheduleError: a limit is too low for the step to finish, and which.

    >>> print(fill_greedily(StageDag.chain(2), 3, limit=(2, 1), exchange=1))
    greedy  microbatches=3 exchange=1
    rank 0 | 0F0 0F1  .  0B0 0F2 0B1  .  0B2
    rank 1 |  .  1F0 1B0 1F1 1B1 1F2 1B2  .
    """
    limits = _Limits(
        forward=_give_each(dag, "limit", limit, sys.maxsize),
        hold=_give_each(dag, "hold", hold, sys.maxsize),
        group=_give_each(dag, "group", group, 1),
        forwards_first=forwards_first,
    )
    _check_limits(dag, num_microbatches, limits)
    progress = _Progress(dag, num_microbatches, exchange, limits, split=hold is not None)
    grid: list[tuple[Action | None, ...]] = []
    idle = 0
    while not progress.finished:
        grid.append(tuple(progress.take_next(rank, len(grid)) for rank in range(dag.num_ranks)))
        idle = 0 if any(grid[-1]) else idle + 1
        if idle > exchange:
            raise ScheduleError(
                f"in-flight limits {limits.forward} are too low to finish in groups of {limits.group}: "
                "each needs room for a group beyond the limits downstream"
            )
    return Timetable(name, dag, num_microbatches, tuple(grid), exchange)


@dataclass(frozen=True)
class _Limits:
    forward: tuple[int, ...]
    hold: tuple[int, ...]
    group: tuple[int, ...]
    forwards_first: bool


class _Progress:
    """What is done so far: `done[kind][s][m]` are ticks, appended in micro-batch order; a B is kept as an I."""

    def __init__(self, dag: StageDag, num_microbatches: int, exchange: int, limits: _Limits, *, split: bool):
        self.dag, self.num_microbatches, self.exchange, self.limits = dag, num_microbatches, exchange, limits
        self.split = split and dag.has_backward
        self.done: dict[str, list[list[int]]] = {kind: [[] for _ in range(dag.num_stages)] for kind in "FIW"}
        self.stages_on = [dag.stages_on(rank) for rank in range(dag.num_ranks)]
        self.left = dag.num_stages * num_microbatches * (1 + self.split + dag.has_backward)

    @property
    def finished(self) -> bool:
        return self.left <= 0

    def take_next(self, rank: int, tick: int) -> Action | None:
        """Choose the action of `rank` in `tick` and note that it is done."""
        stages = self.stages_on[rank]
        split = (self._ready_forwards, self._weights_in_the_way, self._ready_backwards, self._ready_weights)
        whole = (self._ready_backwards, self._ready_forwards)
        for ready in split if self.split else whole:
            action = min(ready(stages, tick), key=_priority, default=None)
            if action is not None:
                self.done["I" if action.kind == "B" else action.kind][action.stage].append(tick)
                self.left -= 1
                return action
        return None

    def _ready_forwards(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        return (action for action in self._arrived_forwards(stages, tick) if self._can_hold_more(action.stage))

    def _weights_in_the_way(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        """The W's that would make room for forwards whose inputs are there."""
        waiting = [a.stage for a in self._arrived_forwards(stages, tick) if not self._can_hold_more(a.stage)]
        return self._ready_weights(waiting, tick)

    def _ready_backwards(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        if not self.dag.has_backward:
            return
        if self.limits.forwards_first and any(self._count("F", s) < self.num_microbatches for s in stages):
            return
        for stage in stages:
            m, group = self._count("I", stage), self.limits.group[stage]
            whole_group = min(m - m % group + group, self.num_microbatches)
            may_start = m < whole_group <= self._count("F", stage)
            if may_start and self._arrived("I", self.dag.backward_sources[stage], stage, m, tick):
                yield Action("I" if self.split else "B", stage, m)

    def _ready_weights(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        for stage in stages:
            m = self._count("W", stage)
            if m < self._count("I", stage):
                yield Action("W", stage, m)

    def _arrived_forwards(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        """Those whose inputs are there and whose group the stage's limit allows."""
        for stage in stages:
            m, group, back = self._count("F", stage), self.limits.group[stage], self._count("I", stage)
            in_flight = (m - m % group + group) - (back - back % group)  # when the whole group is done
            has_room = in_flight <= self.limits.forward[stage] or not self.dag.has_backward
            may_start = m < self.num_microbatches and has_room
            if may_start and self._arrived("F", self.dag.forward_sources[stage], stage, m, tick):
                yield Action("F", stage, m)

    def _can_hold_more(self, stage: int) -> bool:
        return not self.split or self._count("F", stage) - self._count("W", stage) < self.limits.hold[stage]

    def _arrived(self, kind: str, sources: Sequence[int], stage: int, m: int, tick: int) -> bool:
        done = self.done[kind]
        return all(m < len(done[s]) and done[s][m] + self.dag.lag(s, stage, self.exchange) <= tick for s in sources)

    def _count(self, kind: str, stage: int) -> int:
        return len(self.done[kind][stage])


def _priority(action: Action) -> tuple[int, int]:
    return action.microbatch, action.stage


def _give_each(dag: StageDag, name: str, numbers: Sequence[int] | None, default: int) -> tuple[int, ...]:
    if numbers is None:
        return (default,) * dag.num_stages
    if len(numbers) != dag.num_stages:
        raise ScheduleError(f"{name} has {len(numbers)} entries, but there are {dag.num_stages} stages")
    return tuple(numbers)


def _check_limits(dag: StageDag, num_microbatches: int, limits: _Limits) -> None:
    if low := [f"stage {stage}: {group}" for stage, group in enumerate(limits.group) if group < 1]:
        raise ScheduleError(f"a group has at least one micro-batch, got {', '.join(low)}")
    all_first = limits.forwards_first and dag.has_backward
    low, most = [], 1
    for stage, (forward, hold, group) in enumerate(zip(limits.forward, limits.hold, limits.group, strict=True)):
        needed = num_microbatches if all_first else group
        if min(forward, hold) < needed:
            low.append(f"stage {stage}: {min(forward, hold)}")
            most = max(most, needed)
    if low:
        why = "with all forwards first a stage holds every micro-batch" if all_first else "a stage must hold a group"
        raise ScheduleError(
            f"in-flight limits too low to finish {num_microbatches} micro-batches ({', '.join(low)}): "
            f"{why}; give at least {most}"
        )
