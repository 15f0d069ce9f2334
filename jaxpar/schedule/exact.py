"""The least makespan of a small case, by branch and bound over ticks, in the executor's semantics.

A partial timetable is extended tick by tick; in each, every rank does one of the actions that are ready, or idles. Of
what is past, the future sees only how many of each kind are done now and were done a tick ago (what has arrived), and
when the last two ticks ended on each rank. So two partial timetables with the same counts are compared by that alone,
and one that is nowhere better is dropped (dominance); so is one whose bound reaches the best known (the tails of
`jaxpar.schedule.bounds.Jobs`). The one of least bound is extended next, so the first to be finished is optimal. Updates
U take no time and are left out.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxpar.errors import ScheduleError
from jaxpar.schedule.bounds import Jobs, bound_makespan
from jaxpar.schedule.problem import SearchProblem, Step, number_microbatches
from jaxpar.schedule.simulate import simulate
from jaxpar.schedule.timetable import Timetable

_EPSILON = 1e-9
Counts = tuple[tuple[int, ...], ...]  # of each stage: its F, its B or I, its B or W


def find_optimum(
    problem: SearchProblem, *, exchange: int | None = None, incumbent: Timetable | None = None, most: int = 100_000
) -> Timetable:
    """Find a timetable of the least makespan.

    Args:
      problem: small: 2 to 4 ranks and a few micro-batches.
      exchange: 1 or 2; by default the better of both.
      incumbent: a valid timetable that is known; a good one saves work, and it comes back if it is optimal.
      most: partial timetables to extend at most.

    Raises:
      ScheduleError: the case is too large; says what is known of its optimum.

    >>> from jaxpar.schedule import StageCosts, StageDag
    >>> problem = SearchProblem(StageDag.chain(2), 3, StageCosts.uniform(2))
    >>> simulate(find_optimum(problem), problem.costs).makespan  # 3 M + S - 1
    10.0
    """
    best = incumbent
    for d in (1, 2) if exchange is None else (exchange,):
        best = _Search(problem, d, best, most).run()
    assert best is not None  # every problem has a valid timetable
    return best


@dataclass(frozen=True)
class _Partial:
    """The first ticks of a timetable."""

    done: Counts
    arrived: Counts  # what other ranks can use in the next tick
    ends: tuple[float, ...]  # when each rank ended its last tick
    sent: tuple[float, ...]  # when each link had sent that tick's values
    due: tuple[float, ...]  # when all that each rank waits for in the next tick is there
    makespan: float  # the last end of an action
    steps: tuple[tuple[Step, ...], ...]

    def dominates(self, other: "_Partial") -> bool:
        """Whether whatever can follow `other`, of equal counts, can follow this one and is no later."""
        return (
            self.makespan <= other.makespan + _EPSILON
            and all(a <= b + _EPSILON for a, b in zip(self.ends, other.ends, strict=True))
            and all(a <= b + _EPSILON for a, b in zip(self.sent, other.sent, strict=True))
            and all(a <= b + _EPSILON for a, b in zip(self.due, other.due, strict=True))
            and all(a >= b for x, y in zip(self.arrived, other.arrived, strict=True) for a, b in zip(x, y, strict=True))
        )


class _Search:
    """Best first: the partial timetable with the least bound is extended next."""

    def __init__(self, problem: SearchProblem, exchange: int, incumbent: Timetable | None, most: int):
        self.problem, self.exchange, self.most = problem, exchange, most
        self.incumbent = incumbent
        self.least = math.inf if incumbent is None else simulate(incumbent, problem.costs).makespan
        self.lower = bound_makespan(problem).best
        self.jobs = Jobs(problem, with_memory=True)
        self.seen: dict[Counts, list[_Partial]] = {}
        self.serial = itertools.count()
        self.heap: list[tuple[float, int, int, _Partial]] = []

    def run(self) -> Timetable | None:
        dag = self.problem.dag
        nothing: Counts = ((0,) * dag.num_stages,) * 3
        start = (0.0,) * dag.num_ranks
        everything = ((self.problem.num_microbatches,) * dag.num_stages,) * (3 if dag.has_backward else 1)
        self._keep(_Partial(nothing, nothing, start, (0.0,) * sum(map(len, self.problem.links)), start, 0.0, ()))
        extended = 0
        while self.heap and self.least > self.lower * (1 + _EPSILON) + _EPSILON:
            bound, _, _, partial = heapq.heappop(self.heap)
            if bound >= self.least - _EPSILON:
                break
            if not any(partial is kept for kept in self.seen[partial.done]):
                continue  # dominated since
            if partial.done[: len(everything)] == everything:
                self.incumbent = number_microbatches(self.problem, partial.steps, self.exchange, "optimal")
                self.least = partial.makespan
                break
            if extended == self.most:
                self._give_up(bound)
            extended += 1
            for following in self._extend(partial):
                self._keep(following)
        return self.incumbent

    def _keep(self, partial: _Partial) -> None:
        """Put it on the heap unless it is too late or dominated; drop what it dominates."""
        bound = max(self.lower, self._bound(partial))
        kept = self.seen.setdefault(partial.done, [])
        if bound >= self.least - _EPSILON or any(other.dominates(partial) for other in kept):
            return
        kept[:] = [other for other in kept if not partial.dominates(other)]
        kept.append(partial)
        heapq.heappush(self.heap, (bound, -sum(map(sum, partial.done)), next(self.serial), partial))

    def _bound(self, partial: _Partial) -> float:
        """The least makespan of what can follow."""
        count, jobs, bound = self.problem.num_microbatches, self.jobs, partial.makespan
        for rank, stages in enumerate(self.problem.stages_on):
            work = 0.0
            for kind, done in zip("FIW", partial.done, strict=True):
                for stage in stages:
                    half = (kind, stage)
                    left = count - done[stage]
                    work += left * jobs.seconds[half]  # type: ignore[index]
                    if left and jobs.seconds[half]:  # type: ignore[index]
                        bound = max(bound, partial.ends[rank] + jobs.tail[half][left])  # type: ignore[index]
            bound = max(bound, partial.ends[rank] + work)
        return bound

    def _extend(self, partial: _Partial) -> Iterator[_Partial]:
        """One more tick, in each way that can be worth it."""
        options = [[None, *self._ready(partial, rank)] for rank in range(self.problem.dag.num_ranks)]
        begins = list(map(max, partial.ends, partial.due))
        for cells in itertools.product(*options):
            if not any(cells) and partial.arrived == partial.done:
                continue  # nothing happens, and nothing is on its way
            done = [list(counts) for counts in partial.done]
            ends, makespan = list(begins), partial.makespan
            for rank, step in enumerate(cells):
                if step is not None:
                    kind, stage = step
                    ends[rank] += self.problem.seconds[kind][stage]
                    makespan = max(makespan, ends[rank])
                    for row in {"F": (0,), "B": (1, 2), "I": (1,), "W": (2,)}[kind]:
                        done[row][stage] += 1
            now: Counts = tuple(map(tuple, done))
            sent = self._send(partial.sent, ends)
            if self.exchange == 1:
                arrived, due = now, self._arrive(sent)
            else:  # what arrives in the next tick was sent a tick ago, if there was one
                arrived, due = partial.done, self._arrive(partial.sent) if partial.steps else partial.due
            yield _Partial(now, arrived, tuple(ends), sent, due, makespan, (*partial.steps, cells))

    def _send(self, sent: tuple[float, ...], ends: list[float]) -> tuple[float, ...]:
        """When each link, in the order of `problem.links`, has sent this tick's values."""
        links = itertools.chain(*self.problem.links)
        return tuple(max(before, ends[q]) + busy for before, (q, busy, _) in zip(sent, links, strict=True))

    def _arrive(self, sent: tuple[float, ...]) -> tuple[float, ...]:
        """When what the links have sent is there, for each rank."""
        times = iter(sent)
        return tuple(max((next(times) + link.latency for link in links), default=0.0) for links in self.problem.links)

    def _ready(self, partial: _Partial, rank: int) -> Iterator[Step]:
        """What `rank` may do in the next tick."""
        problem, dag, (forward, backward, weight) = self.problem, self.problem.dag, partial.done
        memory, stages = problem.memory, problem.stages_on[rank]
        free = math.inf
        if memory is not None:
            free = memory.per_rank[rank] * (1 + _EPSILON) - sum(
                (forward[s] - backward[s]) * memory.held[s] + (backward[s] - weight[s]) * memory.kept[s]
                for s in stages
                if dag.has_backward
            )
        for stage in stages:
            f, b = forward[stage], backward[stage]
            room = memory is None or memory.held[stage] <= free
            if (
                f < problem.num_microbatches
                and room
                and self._has_come(partial, 0, dag.forward_sources[stage], rank, f)
            ):
                yield "F", stage
            if not dag.has_backward:
                continue
            if b < f and self._has_come(partial, 1, dag.backward_sources[stage], rank, b):
                yield "B", stage
                if problem.split_backward:
                    yield "I", stage
            if weight[stage] < b:
                yield "W", stage

    def _has_come(self, partial: _Partial, row: int, sources: tuple[int, ...], rank: int, m: int) -> bool:
        rank_of = self.problem.dag.rank_of
        return all((partial.done if rank_of[p] == rank else partial.arrived)[row][p] > m for p in sources)

    def _give_up(self, bound: float) -> None:
        p = self.problem
        known = "" if self.incumbent is None else f" and at most {self.least:.6g}"
        raise ScheduleError(
            f"too large for an exact search: {p.dag.num_stages} stages on {p.dag.num_ranks} ranks and "
            f"{p.num_microbatches} micro-batches need more than {self.most} partial timetables (exchange="
            f"{self.exchange}); the optimum is at least {bound:.6g}{known}. Use find_timetable, or raise `most`"
        )
