"""How long a timetable takes: by the executor's ticks, or with each rank running freely.

The lockstep of the executor is what a scan over ticks costs. It is simulated exactly, so that a plan is judged by what
will run, and beside it the free-running pipeline of the literature, so that the price of lockstep is seen.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.simulation import Lockstep, Simulation
from jaxpar.schedule.timetable import Timetable

Mode = Literal["executor", "free", "blocking"]


def simulate(timetable: Timetable, costs: StageCosts, *, mode: Mode = "executor") -> Simulation:
    """Give each action its start and end.

    A value sent from rank `q` to rank `r` keeps others off their link for `occupancy` seconds, and is there `latency`
    later. With costs that give `transfer`, the occupancy is 0 and the latency that of the edge; with those that give a
    `link`, they are the message's bytes over its bandwidth and its latency. Values of one rank for another go in the
    order in which they are made. With `d = exchange` and `q` the neighbours of rank `r`:

        executor   start[r, t] = max(end[r, t-1], max_q sent[q, r, t-d] + latency[q, r])         idle ticks too
                   end[r, t]   = start[r, t] + cost of the action in (t, r), 0 when idle
                   sent[q, r, t] = max(end[q, t], sent[q, r, t-1]) + occupancy[q, r]             of all edges q to r

        free       start[a] = max(end of the action before it on its rank, sent[e] + latency[e] for each input e)
                   end[a]   = start[a] + cost of a
                   sent[e]  = max(end[a], sent of the message before it on its link) + occupancy[e], for each output e

        blocking   as free, but a rank does nothing else until what it sends has arrived, one message after the other;
                   what it receives meanwhile comes at the same time

    The executor exchanges with all neighbours after each tick, whether or not they have a value to give. So the free
    time is never more than the executor's. "free" is a pipeline whose transfers overlap with work; "blocking" is one
    that waits for its sends before it goes on, as PyTorch programs often do.

    Args:
      timetable: a valid one.
      costs: seconds and bytes per micro-batch.
      mode: "executor", "free" or "blocking".

    Raises:
      ScheduleError: the costs are for another stage graph, or the mode is unknown.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> timetable = one_f_one_b(StageDag.chain(4), 16, extra=0)
    >>> [simulate(timetable, StageCosts.uniform(4), mode=mode).makespan for mode in ("executor", "free")]
    [68.0, 57.0]
    """
    if mode not in _RUNS:
        raise ScheduleError(f"no simulation mode {mode!r}; known: {', '.join(_RUNS)}")
    costs.check_for(timetable.dag)
    start = dict(_RUNS[mode](timetable, costs))
    end = {action: begin + costs.of(action) for action, begin in start.items()}
    return Simulation(timetable, mode, start, end, costs)


def _run_in_lockstep(timetable: Timetable, costs: StageCosts) -> Iterator[tuple[Action, float]]:
    ranks = range(timetable.dag.num_ranks)
    exchanges = _find_exchanges(timetable.dag, costs)
    sent = dict.fromkeys(exchanges, 0.0)
    ends = [0.0 for _ in ranks]
    waves = [ends] * timetable.exchange  # waves[-d][r]: when all of tick t-d is on rank r; none before tick 0
    for cells in timetable.grid:
        ends = [max(ends[r], waves[0][r]) for r in ranks]
        for rank, action in enumerate(cells):
            if action is not None:
                yield action, ends[rank]
                ends[rank] += costs.of(action)
        arrived = [0.0 for _ in ranks]
        for (q, r), (occupancy, latency) in exchanges.items():
            sent[q, r] = max(ends[q], sent[q, r]) + occupancy
            arrived[r] = max(arrived[r], sent[q, r] + latency)
        waves = [*waves[1:], arrived]


def _find_exchanges(dag: StageDag, costs: StageCosts) -> dict[tuple[int, int], tuple[float, float]]:
    """Occupancy and latency of what each rank gives each neighbour in a tick: that of all their edges."""
    found = {(q, r): (0.0, 0.0) for r in range(dag.num_ranks) for q in dag.neighbours(r)}
    for src, dst in dag.forward + dag.backward:
        here, there = dag.rank_of[src], dag.rank_of[dst]
        if here != there:
            occupancy, latency = found[here, there]
            more, another = costs.message(dag, src, dst)
            found[here, there] = occupancy + more, max(latency, another)
    return found


def _run_freely(timetable: Timetable, costs: StageCosts, *, blocking: bool = False) -> Iterator[tuple[Action, float]]:
    """Ticks are an order in which inputs come before those who need them, and no more than that."""
    mail = _Mail(timetable.dag, costs)
    link_free_at: dict[tuple[int, int], float] = {}
    rank_free_at = [0.0] * timetable.dag.num_ranks
    for cells in timetable.grid:
        for rank, action in enumerate(cells):
            if action is not None:
                begin = max([rank_free_at[rank], *mail.arrivals_for(action)])
                yield action, begin
                end = rank_free_at[rank] = begin + costs.of(action)
                for link, occupancy, latency, arrivals in mail.sent_by(action):
                    sent = link_free_at[link] = max(end, link_free_at.get(link, 0.0)) + occupancy
                    arrivals[action.microbatch] = sent + latency
                    if blocking:
                        end = rank_free_at[rank] = sent + latency


def _run_blocking(timetable: Timetable, costs: StageCosts) -> Iterator[tuple[Action, float]]:
    return _run_freely(timetable, costs, blocking=True)


_RUNS: dict[str, Callable[[Timetable, StageCosts], Iterator[tuple[Action, float]]]] = {
    "executor": _run_in_lockstep,
    "free": _run_freely,
    "blocking": _run_blocking,
}

_Output = tuple[tuple[int, int], float, float, dict[int, float]]  # link, occupancy, latency, arrival by micro-batch


class _Mail:
    """Values on their way between ranks. Those of a rank's own stages come before it in its order, and aren't sent."""

    def __init__(self, dag: StageDag, costs: StageCosts):
        self._outputs: dict[tuple[str, int], list[_Output]] = {}
        self._inputs: dict[tuple[str, int], list[dict[int, float]]] = {}
        for kinds, edges in (("F", dag.forward), ("BI", dag.backward)):
            for src, dst in edges:
                link = dag.rank_of[src], dag.rank_of[dst]
                if link[0] == link[1]:
                    continue
                arrivals: dict[int, float] = {}
                for kind in kinds:
                    self._outputs.setdefault((kind, src), []).append((link, *costs.message(dag, src, dst), arrivals))
                    self._inputs.setdefault((kind, dst), []).append(arrivals)

    def sent_by(self, action: Action) -> list[_Output]:
        return self._outputs.get((action.kind, action.stage), [])

    def arrivals_for(self, action: Action) -> list[float]:
        """When each input from another rank is there."""
        return [arrivals[action.microbatch] for arrivals in self._inputs.get((action.kind, action.stage), [])]


def compare_lockstep(timetable: Timetable, costs: StageCosts) -> Lockstep:
    """What lockstep costs: the executor's makespan beside that of ranks that run freely in the same order.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> costs = StageCosts((1.0,) * 4, (2.0,) * 4, residual_bytes=(2**20,) * 4)
    >>> print(compare_lockstep(one_f_one_b(StageDag.chain(4), 16), costs))
               makespan   bubble
    executor         59    18.6%
    free             57    15.8%
    ratio         1.035
    <BLANKLINE>
    rank  busy  idle  idle (free)  in flight  residuals
       0    48    11            9          6    6.0 MiB
       1    48    11            9          5    5.0 MiB
       2    48    11            9          4    4.0 MiB
       3    48    11            9          1    1.0 MiB
    """
    return Lockstep(simulate(timetable, costs, mode="executor"), simulate(timetable, costs, mode="free"))
