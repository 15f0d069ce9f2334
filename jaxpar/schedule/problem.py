"""What a search is given: a stage graph, its micro-batches, their costs and a memory limit, in a form quick to read."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action, Kind
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.timetable import Timetable

SEARCHED: tuple[Kind, ...] = ("F", "B", "I", "W")


class LinkFrom(NamedTuple):
    """A link from `rank`: seconds for which a tick's values keep it busy, and until they are there after that."""

    rank: int
    occupancy: float
    latency: float


Step = tuple[Kind, int] | None  # a cell before its micro-batch is known: a kind and a stage, or idle


@dataclass(frozen=True)
class SearchProblem:
    """All that decides which timetables are valid and how long they take.

    Micro-batches are alike, so each stage may take them in order: of any valid timetable, sort each stage's F, its
    B and I together, and its W by micro-batch. The k-th smallest of a list of ticks is late enough whenever each entry
    was, so the sorted timetable is valid, holds as many in flight and takes as long. That is why a search only ever
    chooses kinds and stages (`Step`).

    Args:
      dag: the stage graph.
      num_microbatches: M.
      costs: seconds per micro-batch.
      memory: the most that each rank may hold; None for no limit.
      split_backward: whether a backward may be done as I and W.

    Raises:
      ScheduleError: costs or limit are not for the graph, or M < 1.
    """

    dag: StageDag
    num_microbatches: int
    costs: StageCosts
    memory: MemoryLimit | None = None
    split_backward: bool = True

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise ScheduleError(f"a step needs at least one micro-batch, got {self.num_microbatches}")
        self.costs.check_for(self.dag)
        if self.memory is not None:
            self.memory.check_for(self.dag)

    @cached_property
    def seconds(self) -> dict[Kind, tuple[float, ...]]:
        """For each kind, the seconds of each stage; those of a backward are 0 in a forward-only step."""
        stages = range(self.dag.num_stages)
        return {
            kind: tuple(
                float(self.costs.of(Action(kind, s, 0))) if kind == "F" or self.dag.has_backward else 0.0
                for s in stages
            )
            for kind in SEARCHED
        }

    @cached_property
    def links(self) -> tuple[tuple[LinkFrom, ...], ...]:
        """For each rank, the links from its neighbours; like the executor's, each carries all edges in every tick."""
        dag = self.dag
        found = [dict.fromkeys(dag.neighbours(rank), (0.0, 0.0)) for rank in range(dag.num_ranks)]
        for src, dst in dag.forward + dag.backward:
            here, there = dag.rank_of[dst], dag.rank_of[src]
            if here != there:
                occupancy, latency = found[here][there]
                more, another = self.costs.message(dag, src, dst)
                found[here][there] = occupancy + more, max(latency, another)
        return tuple(tuple(LinkFrom(q, *seconds) for q, seconds in links.items()) for links in found)

    def delay(self, src: int, dst: int) -> float:
        """Seconds from the end of an action of stage `src` until its value is with stage `dst`, at least."""
        here, there = self.dag.rank_of[dst], self.dag.rank_of[src]
        return 0.0 if here == there else self.way(there, here)

    def way(self, here: int, there: int) -> float:
        """Seconds from the end of a tick on one rank until its values are on a neighbour, the link being idle."""
        return next(link.occupancy + link.latency for link in self.links[there] if link.rank == here)

    @cached_property
    def stages_on(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, its stages."""
        return tuple(self.dag.stages_on(rank) for rank in range(self.dag.num_ranks))

    @cached_property
    def work(self) -> tuple[float, ...]:
        """For each rank, the seconds of all its actions."""
        f, b = self.seconds["F"], self.seconds["B"]
        return tuple(self.num_microbatches * sum(f[s] + b[s] for s in stages) for stages in self.stages_on)

    def accepts(self, timetable: Timetable) -> bool:
        """Whether a valid timetable keeps the memory limit and splits backwards only if that is allowed."""
        return not self.objection(timetable)

    def objection(self, timetable: Timetable) -> str:
        """Why a valid timetable is not allowed; empty if it is."""
        if self.memory is not None and not self.memory.fits(timetable):
            return "too much memory"
        split = any(action is not None and action.kind == "I" for cells in timetable.grid for action in cells)
        return "splits backwards" if split and not self.split_backward else ""


def number_microbatches(
    problem: SearchProblem, steps: Iterable[Sequence[Step]], exchange: int, name: str = "auto"
) -> Timetable:
    """Make a timetable of `steps[tick][rank]`: each stage takes its micro-batches in order; idle ticks at the end go.

    >>> problem = SearchProblem(StageDag.chain(1), 1, StageCosts((1.0,), (2.0,)))
    >>> print(number_microbatches(problem, [[("F", 0)], [("I", 0)], [("W", 0)], [None]], exchange=1))
    auto  microbatches=1 exchange=1
    rank 0 | 0F0 0I0 0W0
    """
    stages = range(problem.dag.num_stages)
    forward, backward = [0 for _ in stages], [0 for _ in stages]
    pending: list[deque[int]] = [deque() for _ in stages]
    grid: list[tuple[Action | None, ...]] = []
    for cells in steps:
        row: list[Action | None] = []
        for step in cells:
            if step is None:
                row.append(None)
                continue
            kind, stage = step
            if kind == "W":
                row.append(Action("W", stage, pending[stage].popleft()))
                continue
            count = forward if kind == "F" else backward
            row.append(Action(kind, stage, count[stage]))
            if kind == "I":
                pending[stage].append(count[stage])
            count[stage] += 1
        grid.append(tuple(row))
    while grid and not any(grid[-1]):
        grid.pop()
    return Timetable(name, problem.dag, problem.num_microbatches, tuple(grid), exchange)


def strip_microbatches(timetable: Timetable) -> list[list[Step]]:
    """The kinds and stages of a timetable, `steps[tick][rank]`; updates, which cost nothing, become idle."""
    return [
        [None if action is None or action.kind == "U" else (action.kind, action.stage) for action in cells]
        for cells in timetable.grid
    ]
