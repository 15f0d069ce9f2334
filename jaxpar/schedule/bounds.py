"""Lower bounds on the makespan of every valid timetable of a stage graph, whole or split backwards, exchange 1 or 2.

All but `exchange` hold for ranks that run freely; the executor's waiting for its neighbours only adds. They rest on
two facts.

**The k-th of each kind.** Micro-batches may be taken in any order, but before the k-th F of stage s starts, k of them
have had their F on each stage that feeds s, so at least k such F have ended. Hence, with `d` the seconds of an action,
and I short for "I, or a B that gives its value as early as an I would":

    head F(s, k) >= d + max(head F(s, k-1), head F(p, k) + transfer, head W(s, k-L))       p feeds s
    head I(s, k) >= d + max(head I(s, k-1), head F(s, k), head I(p, k) + transfer)
    head W(s, k) >= d + max(head W(s, k-1), head I(s, k))

are bounds on when the k-th ends. The term with L is the memory: a stage that holds at most L micro-batches starts its
k-th F after its (k-L)-th W. Read backwards in time, the same gives bounds on how long before the end of the step the
k-th last of each kind starts (`tail`). A rank also does one thing at a time: when the k-th I of s ends, the rank has
done k of everything it does for a micro-batch up to that I, and when the k-th last F starts, k of everything after.

**One machine.** What a rank does is a set of jobs with a head, a duration and a tail, one at a time. If jobs may be
interrupted, doing the one with the longest tail first is optimal (Jackson's preemptive rule: Carlier 1982, "The
one-machine sequencing problem", EJOR 11), and its makespan bounds that of any order without interruption.
It is at least the fill before the rank's first action + its work + the drain after its last.

A whole B is one I and one W done at once, so a bound for split backwards holds for whole ones; if backwards may not
be split, I stands for B, and W is left out.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Literal

from jaxpar.schedule.problem import SearchProblem

Half = tuple[Literal["F", "I", "W"], int]  # a kind and its stage
Job = tuple[float, float, float]  # (earliest start, duration, least time from its end to the end of the step)


@dataclass(frozen=True)
class LowerBounds:
    """What no valid timetable can beat, in the unit of the costs; prints with the tightest marked.

    Args:
      critical_path: one micro-batch's longest way through the stages and back.
      busiest_rank: Jackson's bound for the worst rank, without the memory limit.
      memory: the same with it; `busiest_rank` if there is none.
      exchange: neighbours exchange after every tick, and a rank needs a tick for each of its actions: the way to and
        fro between two ranks, over and over.
    """

    critical_path: float
    busiest_rank: float
    memory: float
    exchange: float

    @property
    def best(self) -> float:
        """The largest."""
        return max(self.critical_path, self.busiest_rank, self.memory, self.exchange)

    def __str__(self) -> str:
        rows = {name: getattr(self, name) for name in ("critical_path", "busiest_rank", "memory", "exchange")}
        return "\n".join(
            f"{name.replace('_', ' '):<14} {value:>10.4g}{'  *' if value == self.best else ''}"
            for name, value in rows.items()
        )


def bound_makespan(problem: SearchProblem) -> LowerBounds:
    """Bound the executor's makespan from below.

    >>> from jaxpar.schedule import StageCosts, StageDag
    >>> problem = SearchProblem(StageDag.chain(4), 16, StageCosts.uniform(4))
    >>> print(bound_makespan(problem))  # 3 M + S - 1, what ZB-H1 reaches
    critical path          9
    busiest rank          51  *
    memory                51  *
    exchange               0
    """
    free = Jobs(problem, with_memory=False)
    busiest = _run_one_machine(free)
    return LowerBounds(
        critical_path=max(free.path_tail.values()),
        busiest_rank=busiest,
        memory=_run_one_machine(Jobs(problem, with_memory=True)) if problem.memory else busiest,
        exchange=_bound_exchange(problem),
    )


class Jobs:
    """Heads and tails of the k-th F, I and W of each stage: `head[kind, s][k]` and `tail[kind, s][k]`, k from 1.

    `head` bounds the end of the k-th; `tail` the time from the start of the k-th last to the end of the step. The
    entries at k = 0 are 0. Without a split, W takes no time and I is the whole backward. `path_head` and `path_tail`
    are those of a micro-batch that is alone.
    """

    def __init__(self, problem: SearchProblem, *, with_memory: bool):
        self.problem, self.count = problem, problem.num_microbatches
        self.seconds = _time_halves(problem)
        self.needs = {half: _list_needs(problem, half) for half in self.seconds}
        self.feeds: dict[Half, list[tuple[Half, float]]] = {half: [] for half in self.seconds}
        for half, needs in self.needs.items():
            for need, delay in needs:
                self.feeds[need].append((half, delay))
        waits_for = {half: [need for need, _ in needs] for half, needs in self.needs.items()}
        self.order = list(TopologicalSorter(waits_for).static_order())
        self.path_head = self._find_paths(self.needs, self.order)
        self.path_tail = self._find_paths(self.feeds, self.order[::-1])
        self.until_i, self.until_w = _limit_stages(problem) if with_memory and problem.memory else ({}, {})
        self.head = self._find_kth(self.needs, self.order, self.path_head, backward=False)
        self.tail = self._find_kth(self.feeds, self.order[::-1], self.path_tail, backward=True)

    def of_rank(self, rank: int) -> Iterator[Job]:
        """The jobs of one rank that take time."""
        for half, duration in self.seconds.items():
            if self.problem.dag.rank_of[half[1]] == rank and duration > 0:
                for k in range(1, self.count + 1):
                    tail = self.tail[half][self.count - k + 1]
                    yield self.head[half][k] - duration, duration, tail - duration

    def _find_paths(self, before: dict[Half, list[tuple[Half, float]]], order: list[Half]) -> dict[Half, float]:
        longest: dict[Half, float] = {}
        for half in order:
            longest[half] = self.seconds[half] + max((longest[b] + delay for b, delay in before[half]), default=0.0)
        return longest

    def _find_kth(
        self,
        before: dict[Half, list[tuple[Half, float]]],
        order: list[Half],
        path: dict[Half, float],
        *,
        backward: bool,
    ) -> dict[Half, list[float]]:
        """The recursion of the module's docstring, from the start of the step or, `backward`, from its end."""
        kth = {half: [0.0] * (self.count + 1) for half in order}
        on_rank = self._sum_on_rank(before, order, path)
        for k in range(1, self.count + 1):
            for half in order:
                fill, work = on_rank[half]
                waits = [kth[half][k - 1], *(kth[b][k] + delay for b, delay in before[half])]
                waits += [kth[other][k - most] for other, most in self._frees(half, backward) if k > most]
                kth[half][k] = max(self.seconds[half] + max(waits), fill + k * work)
        return kth

    def _frees(self, half: Half, backward: bool) -> Iterator[tuple[Half, int]]:
        """The halves that `half` waits for because of memory, and after how many of its own."""
        kind, stage = half
        if kind == "F" and not backward:
            yield ("I", stage), self.until_i.get(stage, self.count)
            yield ("W", stage), self.until_w.get(stage, self.count)
        elif backward and kind == "I":
            yield ("F", stage), self.until_i.get(stage, self.count)
        elif backward and kind == "W":
            yield ("F", stage), self.until_w.get(stage, self.count)

    def _sum_on_rank(
        self, before: dict[Half, list[tuple[Half, float]]], order: list[Half], path: dict[Half, float]
    ) -> dict[Half, tuple[float, float]]:
        """For each half: the earliest start and the seconds of all that its rank must do for a micro-batch up to it."""
        rank_of = self.problem.dag.rank_of
        reached: dict[Half, set[Half]] = {}
        sums = {}
        for half in order:
            reached[half] = {half}.union(*(reached[b] for b, _ in before[half]))
            here = [h for h in reached[half] if rank_of[h[1]] == rank_of[half[1]]]
            sums[half] = (min(path[h] - self.seconds[h] for h in here), math.fsum(self.seconds[h] for h in here))
        return sums


def _time_halves(problem: SearchProblem) -> dict[Half, float]:
    """Seconds of each F, I and W; without a split, I is the whole backward."""
    seconds, stages = problem.seconds, range(problem.dag.num_stages)
    halves: dict[Half, float] = {("F", s): seconds["F"][s] for s in stages}
    halves |= {("I", s): seconds["I" if problem.split_backward else "B"][s] for s in stages}
    return halves | {("W", s): seconds["W"][s] if problem.split_backward else 0.0 for s in stages}


def _list_needs(problem: SearchProblem, half: Half) -> list[tuple[Half, float]]:
    """What a half waits for, and how long each value travels."""
    kind, stage = half
    if kind == "F":
        return [(("F", p), problem.delay(p, stage)) for p in problem.dag.forward_sources[stage]]
    if kind == "W":
        return [(("I", stage), 0.0)]
    sources = problem.dag.backward_sources[stage]
    return [(("F", stage), 0.0), *((("I", p), problem.delay(p, stage)) for p in sources)]


def _limit_stages(problem: SearchProblem) -> tuple[dict[int, int], dict[int, int]]:
    """For each stage, the most micro-batches it can hold before their I, and before their W.

    What stage s holds before its I, those of its rank that come before it forwards and after it backwards hold too.
    """
    memory, dag = problem.memory, problem.dag
    assert memory is not None
    above, below = _reach(dag.num_stages, dag.forward), _reach(dag.num_stages, dag.backward, down=True)
    until_i, until_w = {}, {}
    for stage in range(dag.num_stages):
        rank = dag.rank_of[stage]
        around = [s for s in problem.stages_on[rank] if s == stage or (s in above[stage] and s in below[stage])]
        until_i[stage] = _divide(memory.per_rank[rank], sum(memory.held[s] for s in around), problem)
        until_w[stage] = _divide(memory.per_rank[rank], memory.kept[stage], problem)
    return until_i, until_w


def _divide(limit: float, each: float, problem: SearchProblem) -> int:
    most = problem.num_microbatches
    return max(1, min(most, math.floor(limit / each + 1e-9))) if each > 0 else most


def _reach(num_stages: int, edges: tuple[tuple[int, int], ...], *, down: bool = False) -> list[set[int]]:
    """For each stage, those from which a path of edges leads to it; with `down`, those to which one leads from it."""
    reached: list[set[int]] = [set() for _ in range(num_stages)]
    pairs = [(a, b) for b, a in edges] if down else list(edges)
    for _ in range(num_stages):
        for a, b in pairs:
            reached[b] |= {a} | reached[a]
    return reached


def _run_one_machine(jobs: Jobs) -> float:
    """The worst rank's bound by Jackson's preemptive rule."""
    return max(_run_preemptive(sorted(jobs.of_rank(rank))) for rank in range(jobs.problem.dag.num_ranks))


def _run_preemptive(jobs: list[Job]) -> float:
    """The makespan of jobs sorted by head, the longest tail always first.

    >>> _run_preemptive([(0.0, 4.0, 1.0), (1.0, 1.0, 7.0)])
    9.0
    """
    now = makespan = 0.0
    ready: list[tuple[float, float]] = []  # (-tail, seconds left)
    coming = iter([*jobs, (math.inf, 0.0, 0.0)])
    head, duration, tail = next(coming)
    while ready or head < math.inf:
        now = max(now, head) if not ready else now
        while head <= now:
            heapq.heappush(ready, (-tail, duration))
            head, duration, tail = next(coming)
        minus_tail, left = heapq.heappop(ready)
        if now + left > head:  # the next job comes in between and may be more urgent
            heapq.heappush(ready, (minus_tail, left - (head - now)))
            now = head
        else:
            now += left
            makespan = max(makespan, now - minus_tail)
    return makespan


def _bound_exchange(problem: SearchProblem) -> float:
    """A rank of n actions is in tick n - 1 or later at its last, which waits for a neighbour's tick at most two before.

    So two neighbours wait for each other in turn, once every two ticks at least; and a link carries a tick's values
    after those of the tick before.
    """
    most = 0.0
    for rank, links in enumerate(problem.links):
        kinds = 2 if problem.dag.has_backward else 1
        last = problem.num_microbatches * kinds * len(problem.stages_on[rank]) - 1
        turns = last // 2
        for link in links:
            there, back = problem.way(link.rank, rank), problem.way(rank, link.rank)
            most = max(most, (turns + 1) // 2 * there + turns // 2 * back)
            if last >= 2:
                most = max(most, (last - 1) * link.occupancy + link.latency)
    return most
