"""The stage graph as a schedule sees it: who waits for whom, and on which rank.

Costs, shapes and parameters are left out on purpose: a timetable depends on none of them.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from jaxpar.errors import ScheduleError

Edge = tuple[int, int]
Placement = Literal["round_robin", "v"]


@dataclass(frozen=True)
class StageDag:
    """Stages, the edges between their forwards and between their backwards, and the rank that holds each stage.

    Stage `s` lives on rank `rank_of[s]`; a rank may hold several stages, or none. For each micro-batch `m`:

        forward  (a, b):   F(a, m) before F(b, m)
        backward (a, b):   B(a, m) before B(b, m)      often the mirror of forward, but not always
        implied  (s):      F(s, m) before B(s, m)

    Args:
      num_stages: S; stages are `0 ... S-1`.
      forward: edges `(src, dst)`: the forward of `src` feeds the forward of `dst`.
      backward: edges `(src, dst)`: the backward of `src` feeds the backward of `dst`. Empty when
        `has_backward` is false.
      rank_of: the rank of each stage, length S.
      num_ranks: R; ranks are `0 ... R-1`.
      has_backward: false for a forward-only step, whose timetable has only F actions.

    Raises:
      ScheduleError: names each edge or rank that is out of range or repeated, each self-loop, and a cycle if any.

    >>> diamond = StageDag(4, ((0, 1), (0, 2), (1, 3), (2, 3)), ((3, 1), (3, 2), (1, 0), (2, 0)), (0, 1, 2, 3), 4)
    >>> diamond.depth
    (3, 2, 2, 1)
    >>> diamond.neighbours(1)
    (0, 3)
    """

    num_stages: int
    forward: tuple[Edge, ...]
    backward: tuple[Edge, ...]
    rank_of: tuple[int, ...]
    num_ranks: int
    has_backward: bool = True

    def __post_init__(self) -> None:
        problems = list(_find_problems(self))
        if not problems:
            for direction, edges in (("forward", self.forward), ("backward", self.backward)):
                if cycle := _find_cycle(self.num_stages, edges):
                    problems.append(f"the {direction} edges form a cycle: {' -> '.join(map(str, cycle))}")
        if problems:
            raise ScheduleError(
                f"not a graph of {self.num_stages} stages on {self.num_ranks} ranks:\n  " + "\n  ".join(problems)
            )

    @classmethod
    def chain(
        cls,
        num_stages: int,
        *,
        num_ranks: int | None = None,
        placement: Placement = "round_robin",
        has_backward: bool = True,
    ) -> "StageDag":
        """The plain pipeline `0 -> 1 -> ... -> n-1`, one stage a rank or several.

        Args:
          num_stages: S.
          num_ranks: R; S by default.
          placement: how stages go to ranks, see `place_stages`.
          has_backward: false for a forward-only step.

        >>> StageDag.chain(3).depth
        (3, 2, 1)
        >>> StageDag.chain(4, num_ranks=2, placement="v").rank_of
        (0, 1, 1, 0)
        """
        num_ranks = num_stages if num_ranks is None else num_ranks
        forward = tuple((s, s + 1) for s in range(num_stages - 1))
        backward = tuple((s + 1, s) for s in reversed(range(num_stages - 1))) if has_backward else ()
        rank_of = place_stages(num_stages, num_ranks, placement)
        return cls(num_stages, forward, backward, rank_of, num_ranks, has_backward)

    @cached_property
    def forward_sources(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the stages whose forwards feed its forward."""
        return _sources(self.num_stages, self.forward)

    @cached_property
    def backward_sources(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the stages whose backwards feed its backward."""
        return _sources(self.num_stages, self.backward)

    @cached_property
    def forward_order(self) -> tuple[int, ...]:
        """The stages, each after those that feed its forward; the lowest first where there is a choice."""
        return tuple(_topological_order(self.num_stages, self.forward))

    @cached_property
    def backward_order(self) -> tuple[int, ...]:
        """The stages, each after those that feed its backward; the lowest first where there is a choice."""
        return tuple(_topological_order(self.num_stages, self.backward))

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """For each stage, the stages on the longest forward path from it to a sink, itself included; a sink has 1."""
        depth = [1] * self.num_stages
        for stage in reversed(self.forward_order):
            for source in self.forward_sources[stage]:
                depth[source] = max(depth[source], depth[stage] + 1)
        return tuple(depth)

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds, in order.

        >>> StageDag(3, ((0, 1), (1, 2)), ((2, 1), (1, 0)), (0, 1, 0), 2).stages_on(0)
        (0, 2)
        """
        return tuple(s for s, r in enumerate(self.rank_of) if r == rank)

    def lag(self, src: int, dst: int, exchange: int) -> int:
        """Ticks until a value of stage `src` can be used by stage `dst`: 1 on the same rank, `exchange` on another."""
        return 1 if self.rank_of[src] == self.rank_of[dst] else exchange

    def neighbours(self, rank: int) -> tuple[int, ...]:
        """The other ranks joined to `rank` by an edge of either kind, in either direction, in order."""
        return self._neighbours[rank]

    @cached_property
    def _neighbours(self) -> tuple[tuple[int, ...], ...]:
        joined: list[set[int]] = [set() for _ in range(self.num_ranks)]
        for src, dst in self.forward + self.backward:
            a, b = self.rank_of[src], self.rank_of[dst]
            joined[a].add(b)
            joined[b].add(a)
        return tuple(tuple(sorted(others - {rank})) for rank, others in enumerate(joined))


def place_stages(num_stages: int, num_ranks: int, placement: Placement) -> tuple[int, ...]:
    """The rank of each stage: in rounds, or down the ranks and up again.

    With s the stage and R the number of ranks:

        round_robin    rank = s % R
        v              rank = x if x < R else 2 R - 1 - x, where x = s % (2 R)

    Raises:
      ScheduleError: there is no rank, or no such placement.

    >>> place_stages(6, 3, "round_robin"), place_stages(6, 3, "v")
    ((0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0))
    """
    if num_ranks < 1:
        raise ScheduleError(f"stages need at least one rank, got {num_ranks}")
    if placement not in get_args(Placement):
        raise ScheduleError(f"no placement {placement!r}; known: {', '.join(get_args(Placement))}")
    if placement == "round_robin":
        return tuple(s % num_ranks for s in range(num_stages))
    rounds = (s % (2 * num_ranks) for s in range(num_stages))
    return tuple(min(x, 2 * num_ranks - 1 - x) for x in rounds)


def _find_problems(dag: StageDag) -> Iterator[str]:
    """Everything wrong but cycles, which can be looked for only in edges that are in range."""
    if dag.num_stages < 1 or dag.num_ranks < 1:
        yield f"there must be at least one stage and one rank, got {dag.num_stages} and {dag.num_ranks}"
    if len(dag.rank_of) != dag.num_stages:
        yield f"rank_of gives the rank of {len(dag.rank_of)} stages, but there are {dag.num_stages}"
    for stage, rank in enumerate(dag.rank_of):
        if not 0 <= rank < dag.num_ranks:
            yield f"stage {stage} is on rank {rank}, but ranks are 0 ... {dag.num_ranks - 1}"
    if dag.backward and not dag.has_backward:
        yield f"backward edge {dag.backward[0]} in a forward-only graph: drop the edges, or set has_backward=True"
    for direction, edges in (("forward", dag.forward), ("backward", dag.backward)):
        for edge, count in Counter(edges).items():
            if not all(0 <= stage < dag.num_stages for stage in edge):
                yield f"{direction} edge {edge} leaves the graph: stages are 0 ... {dag.num_stages - 1}"
            if edge[0] == edge[1]:
                yield f"{direction} edge {edge} joins stage {edge[0]} to itself"
            if count > 1:
                yield f"{direction} edge {edge} is given {count} times: give each edge once"


def _sources(num_stages: int, edges: Sequence[Edge]) -> tuple[tuple[int, ...], ...]:
    sources: list[list[int]] = [[] for _ in range(num_stages)]
    for src, dst in edges:
        sources[dst].append(src)
    return tuple(tuple(sorted(stages)) for stages in sources)


def _topological_order(num_stages: int, edges: Sequence[Edge]) -> Iterator[int]:
    """Stages after all their sources (Kahn), the lowest first; those on or behind a cycle never come."""
    waits_for = [len(sources) for sources in _sources(num_stages, edges)]
    feeds = _sources(num_stages, [(dst, src) for src, dst in edges])
    ready = [s for s in range(num_stages) if not waits_for[s]]
    while ready:
        yield (stage := heapq.heappop(ready))
        for target in feeds[stage]:
            waits_for[target] -= 1
            if not waits_for[target]:
                heapq.heappush(ready, target)


def _find_cycle(num_stages: int, edges: Sequence[Edge]) -> list[int]:
    """The stages of one cycle, its first stage repeated at the end; empty when there is none."""
    stuck = set(range(num_stages)) - set(_topological_order(num_stages, edges))
    if not stuck:
        return []
    sources = _sources(num_stages, edges)
    path = [min(stuck)]
    while path[-1] not in path[:-1]:  # each stuck stage has a stuck source, so walking up must come round
        path.append(next(s for s in sources[path[-1]] if s in stuck))
    return path[path.index(path[-1]) :][::-1]
