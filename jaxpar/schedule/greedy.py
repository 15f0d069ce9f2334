"""List scheduling by ticks, the one engine behind GPipe, 1F1B and forward-only timetables.

Known as list scheduling or ASAP scheduling with a priority. It is not optimal in general; what it guarantees is below.

**It never gets stuck when each limit is at least 1** (and backwards need not wait for all forwards). Take the lowest
micro-batch m that is not finished. All before it are finished, so a stage that has not done F(m) holds nothing in
flight and its limit does not stop it; the forward edges are acyclic, so some F(m), or after the last of them some B(m),
has all its inputs. Limits set memory and speed, never whether the step can finish.
"""

import sys
from collections.abc import Iterator, Sequence

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.timetable import Timetable


def fill_greedily(
    dag: StageDag,
    num_microbatches: int,
    *,
    limit: Sequence[int] | None = None,
    exchange: int = 2,
    forwards_first: bool = False,
    name: str = "greedy",
) -> Timetable:
    """Fill a timetable tick by tick: each rank does a backward if one is ready, else a forward, else it idles.

    Stages take micro-batches in order. Among the ready actions of one rank a backward comes first, since it frees
    memory; then the lower micro-batch; then the lower stage. At each tick, for each stage `s`:

        in_flight(s) <= limit[s]

    Args:
      dag: the stage graph.
      num_microbatches: M.
      limit: for each stage, the most micro-batches in flight, at least 1; None for no limit.
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
    limits = [sys.maxsize] * dag.num_stages if limit is None else list(limit)
    _check_limits(dag, num_microbatches, limits, forwards_first)
    progress = _Progress(dag, num_microbatches, limits, exchange, forwards_first)
    grid: list[tuple[Action | None, ...]] = []
    while not progress.finished:
        tick = len(grid)
        grid.append(tuple(progress.take_next(rank, tick) for rank in range(dag.num_ranks)))
    return Timetable(name, dag, num_microbatches, tuple(grid), exchange)


class _Progress:
    """What is done so far: `forward[s][m]` and `backward[s][m]` are ticks, appended in micro-batch order."""

    def __init__(self, dag: StageDag, num_microbatches: int, limits: list[int], exchange: int, forwards_first: bool):
        self.dag, self.num_microbatches, self.limits = dag, num_microbatches, limits
        self.exchange, self.forwards_first = exchange, forwards_first
        self.forward: list[list[int]] = [[] for _ in range(dag.num_stages)]
        self.backward: list[list[int]] = [[] for _ in range(dag.num_stages)]
        self.stages_on = [dag.stages_on(rank) for rank in range(dag.num_ranks)]
        self.left = dag.num_stages * num_microbatches * (2 if dag.has_backward else 1)

    @property
    def finished(self) -> bool:
        return self.left <= 0

    def take_next(self, rank: int, tick: int) -> Action | None:
        """Choose the action of `rank` in `tick` and note that it is done."""
        stages = self.stages_on[rank]
        action = min(self._ready_backwards(stages, tick), key=_priority, default=None)
        action = action or min(self._ready_forwards(stages, tick), key=_priority, default=None)
        if action is not None:
            done = self.forward if action.kind == "F" else self.backward
            done[action.stage].append(tick)
            self.left -= 1
        return action

    def _ready_forwards(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        for stage in stages:
            m = len(self.forward[stage])
            in_flight = m - len(self.backward[stage]) if self.dag.has_backward else 0
            may_start = m < self.num_microbatches and in_flight < self.limits[stage]
            if may_start and self._arrived(self.forward, self.dag.forward_sources[stage], stage, m, tick):
                yield Action("F", stage, m)

    def _ready_backwards(self, stages: Sequence[int], tick: int) -> Iterator[Action]:
        if not self.dag.has_backward:
            return
        if self.forwards_first and any(len(self.forward[s]) < self.num_microbatches for s in stages):
            return
        for stage in stages:
            m = len(self.backward[stage])
            may_start = m < len(self.forward[stage])
            if may_start and self._arrived(self.backward, self.dag.backward_sources[stage], stage, m, tick):
                yield Action("B", stage, m)

    def _arrived(self, done: list[list[int]], sources: Sequence[int], stage: int, m: int, tick: int) -> bool:
        return all(m < len(done[s]) and done[s][m] + self.dag.lag(s, stage, self.exchange) <= tick for s in sources)


def _priority(action: Action) -> tuple[int, int]:
    return action.microbatch, action.stage


def _check_limits(dag: StageDag, num_microbatches: int, limits: Sequence[int], forwards_first: bool) -> None:
    if len(limits) != dag.num_stages:
        raise ScheduleError(f"limit has {len(limits)} entries, but there are {dag.num_stages} stages")
    needed = num_microbatches if forwards_first and dag.has_backward else 1
    low = [f"stage {stage}: {limit}" for stage, limit in enumerate(limits) if limit < needed]
    if low:
        why = "with all forwards first a stage holds every micro-batch" if needed > 1 else "a stage must hold one"
        raise ScheduleError(
            f"in-flight limits too low to finish {num_microbatches} micro-batches ({', '.join(low)}): "
            f"{why}; give at least {needed}"
        )
