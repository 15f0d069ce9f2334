"""How long a timetable takes: by the executor's ticks, or with each rank running freely.

The lockstep of the executor is what a scan over ticks costs. It is simulated exactly, so that a plan is judged by what
will run, and beside it the free-running pipeline of the literature, so that the price of lockstep is seen.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.timetable import Timetable

Mode = Literal["executor", "free"]


@dataclass(frozen=True)
class Simulation:
    """When each action of a timetable starts and ends.

    `makespan`, `start`, `end`, `busy` and `idle` are in the unit of the costs.

    Args:
      timetable: what was simulated.
      mode: "executor" or "free".
      start: when each action starts.
      end: when it ends.
      makespan: the last end.
      busy: for each rank, the time spent in actions.
    """

    timetable: Timetable = field(repr=False)
    mode: Mode
    start: Mapping[Action, float] = field(repr=False)
    end: Mapping[Action, float] = field(repr=False)
    makespan: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank, the time not spent in actions."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time: `1 - sum(busy) / (R * makespan)`; 0 if nothing takes time."""
        total = len(self.busy) * self.makespan
        return 1 - sum(self.busy) / total if total else 0.0

    @property
    def peak_in_flight_on_rank(self) -> tuple[int, ...]:
        """For each rank, the most micro-batches in flight; its order of actions decides it, not their times."""
        return self.timetable.peak_in_flight_on_rank


def simulate(timetable: Timetable, costs: StageCosts, *, mode: Mode = "executor") -> Simulation:
    """Give each action its start and end.

    With `d = exchange`, `q` the neighbours of rank `r`, and the transfer that of the slowest edge from `q` to `r`:

        executor   start[r, t] = max(end[r, t-1], max_q end[q, t-d] + transfer[q, r])      idle ticks too
                   end[r, t]   = start[r, t] + cost of the action in (t, r), 0 when idle
        free       start[a]    = max(end of the action before it on its rank, end[p] + transfer[p, a] for each input p)
                   end[a]      = start[a] + cost of a

    The executor exchanges with all neighbours after each tick, whether or not they have a value to give. So the free
    time is never more than the executor's.

    Args:
      timetable: a valid one.
      costs: seconds per micro-batch.
      mode: "executor" or "free".

    Raises:
      ScheduleError: the costs are for another stage graph, or the mode is unknown.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> timetable = one_f_one_b(StageDag.chain(4), 16, extra=0)
    >>> [simulate(timetable, StageCosts.uniform(4), mode=mode).makespan for mode in ("executor", "free")]
    [68.0, 57.0]
    """
    if mode not in get_args(Mode):
        raise ScheduleError(f"no simulation mode {mode!r}; known: {', '.join(get_args(Mode))}")
    costs.check_for(timetable.dag)
    start = dict(_run_in_lockstep(timetable, costs) if mode == "executor" else _run_freely(timetable, costs))
    end = {action: begin + costs.of(action) for action, begin in start.items()}
    busy = tuple(
        float(sum(costs.of(action) for action in timetable.order(rank))) for rank in range(timetable.dag.num_ranks)
    )
    return Simulation(timetable, mode, start, end, max(end.values(), default=0.0), busy)


def _run_in_lockstep(timetable: Timetable, costs: StageCosts) -> Iterator[tuple[Action, float]]:
    ranks = range(timetable.dag.num_ranks)
    arrivals = _rank_transfers(timetable, costs)
    waves = [[-math.inf] * len(ranks)] * timetable.exchange  # waves[-d][r] = end[r, t-d]; before tick 0 nothing is sent
    for cells in timetable.grid:
        last, sent = waves[-1], waves[-timetable.exchange]
        wave = [max([0.0, last[r], *(sent[q] + delay for q, delay in arrivals[r])]) for r in ranks]
        for rank, action in enumerate(cells):
            if action is not None:
                yield action, wave[rank]
                wave[rank] += costs.of(action)
        waves = [*waves[1:], wave]


def _rank_transfers(timetable: Timetable, costs: StageCosts) -> list[list[tuple[int, float]]]:
    """For each rank, its neighbours and the seconds until a value from there is here."""
    dag = timetable.dag
    slowest = [dict.fromkeys(dag.neighbours(rank), 0.0) for rank in range(dag.num_ranks)]
    for src, dst in dag.forward + dag.backward:
        here, there = dag.rank_of[dst], dag.rank_of[src]
        if here != there:
            slowest[here][there] = max(slowest[here][there], costs.transfer_of(dag, src, dst))
    return [list(delays.items()) for delays in slowest]


def _run_freely(timetable: Timetable, costs: StageCosts) -> Iterator[tuple[Action, float]]:
    """Ticks are an order in which inputs come before those who need them, and no more than that."""
    end: dict[Action, float] = {}
    free_at = [0.0] * timetable.dag.num_ranks
    for cells in timetable.grid:
        for rank, action in enumerate(cells):
            if action is not None:
                begin = max([free_at[rank], *_arrivals(timetable, costs, action, end)])
                yield action, begin
                end[action] = free_at[rank] = begin + costs.of(action)


def _arrivals(timetable: Timetable, costs: StageCosts, action: Action, end: Mapping[Action, float]) -> Iterator[float]:
    """When the values from other stages that `action` needs are there; its own stage's come before it on its rank."""
    dag, stage, m = timetable.dag, action.stage, action.microbatch
    if action.kind == "F":
        for source in dag.forward_sources[stage]:
            yield end[Action("F", source, m)] + costs.transfer_of(dag, source, stage)
    elif action.kind in "BI":
        for source in dag.backward_sources[stage]:
            whole = Action("B", source, m)
            made = whole if whole in end else Action("I", source, m)
            yield end[made] + costs.transfer_of(dag, source, stage)


@dataclass(frozen=True)
class Lockstep:
    """The two simulations of one timetable; prints side by side."""

    executor: Simulation
    free: Simulation

    @property
    def ratio(self) -> float:
        """The executor's makespan over the free-running one, at least 1."""
        return self.executor.makespan / self.free.makespan if self.free.makespan else 1.0

    def __str__(self) -> str:
        rows = [("", "makespan", "bubble")]
        rows += [(s.mode, f"{s.makespan:.4g}", f"{s.bubble_fraction:.1%}") for s in (self.executor, self.free)]
        rows += [("ratio", f"{self.ratio:.3f}", "")]
        return "\n".join(f"{a:<8} {b:>10} {c:>8}".rstrip() for a, b, c in rows)


def compare_lockstep(timetable: Timetable, costs: StageCosts) -> Lockstep:
    """What lockstep costs: the executor's makespan beside that of ranks that run freely in the same order.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> print(compare_lockstep(one_f_one_b(StageDag.chain(4), 16), StageCosts.uniform(4)))
               makespan   bubble
    executor         59    18.6%
    free             57    15.8%
    ratio         1.035
    """
    return Lockstep(simulate(timetable, costs, mode="executor"), simulate(timetable, costs, mode="free"))
