"""List scheduling of many timetables at once, each by its own rules: where a search starts.

The engine of `jaxpar.schedule.greedy`, with rows of NumPy arrays for timetables: in each tick each rank does the ready
action of the highest score, and the executor's time is kept along with it. As there, it never gets stuck: a rank keeps
room for one micro-batch in each of its stages, so the lowest whose backward is not done can go on, if need be after
some W.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from jaxpar.schedule.problem import SEARCHED, SearchProblem, Step

_KINDS = 3  # rows of `Rules`: F, B or I, W


@dataclass
class Rules:
    """How K timetables are filled; each entry has a leading axis of K.

    Args:
      limit: [K, S], the most micro-batches that a stage holds, at least 1.
      score: [K, 3, S], of F, of B or I, and of W; the highest goes first.
      age: [K], taken off the score for each micro-batch that the stage has already done.
      whole: [K, S], whether the backward is done as B.
      most_pending: [K, S], as many I without their W make W go first.
      fill: [K], whether W is done whenever nothing else is ready, or only if it is urgent or blocks the stage.
      period: [K], ticks after which `slots` come round, at most 60.
      slots: [K, 3, S], the ticks of the period in which that kind may be done: bit t for tick t; -1 for all.
      pause: [K, 3, S], idle ticks after an action. They take no time, but neighbours of a long action go on meanwhile.
    """

    limit: np.ndarray
    score: np.ndarray
    age: np.ndarray
    whole: np.ndarray
    most_pending: np.ndarray
    fill: np.ndarray
    period: np.ndarray
    slots: np.ndarray
    pause: np.ndarray

    def __len__(self) -> int:
        return len(self.limit)

    @staticmethod
    def of(count: int, num_stages: int, **entries: ArrayLike) -> "Rules":
        """Rules of `count` rows; what is not given is plain: W at once after its I, no slots."""
        shapes = {
            "limit": (num_stages,),
            "score": (_KINDS, num_stages),
            "age": (),
            "whole": (num_stages,),
            "most_pending": (num_stages,),
            "fill": (),
            "period": (),
            "slots": (_KINDS, num_stages),
            "pause": (_KINDS, num_stages),
        }
        plain = {"age": 0.0, "whole": False, "most_pending": 1, "fill": True, "period": 1, "slots": -1, "pause": 0}
        given = {**plain, **entries}
        return Rules(
            **{name: np.array(np.broadcast_to(given[name], (count, *shape))) for name, shape in shapes.items()}
        )

    def take(self, rows: np.ndarray) -> "Rules":
        """A copy of some rows."""
        return Rules(*(getattr(self, field.name)[rows].copy() for field in fields(self)))

    @staticmethod
    def join(*several: "Rules") -> "Rules":
        """All rows of several."""
        return Rules(*(np.concatenate([getattr(r, field.name) for r in several]) for field in fields(Rules)))


@dataclass(frozen=True)
class Filled:
    """K timetables: `steps[t, K, R]` are `4 s + kind` with kinds FBIW, or -1; `makespan[K]`, infinite if given up."""

    steps: np.ndarray
    makespan: np.ndarray

    def row(self, k: int) -> list[list[Step]]:
        """`steps[tick][rank]` of one timetable."""
        return [
            [None if code < 0 else (SEARCHED[code % 4], code // 4) for code in cells]
            for cells in self.steps[:, k].tolist()
        ]


def fill_many(problem: SearchProblem, rules: Rules, exchange: int, *, cutoff: float = np.inf) -> Filled:
    """Fill one timetable for each row of `rules`; give up those whose makespan would reach `cutoff`.

    >>> from jaxpar.schedule import StageCosts, StageDag
    >>> problem = SearchProblem(StageDag.chain(2), 3, StageCosts.uniform(2))
    >>> one = Rules.of(1, 2, limit=(2, 1), score=((1, 1), (2, 2), (0, 0)), whole=True)
    >>> filled = fill_many(problem, one, exchange=1)
    >>> filled.makespan, filled.row(0)[:3]
    (array([14.]), [[('F', 0), None], [('F', 0), ('F', 1)], [None, ('B', 1)]])
    """
    state = _Filling(problem, rules, exchange, cutoff)
    ticks: list[np.ndarray] = []
    while state.alive.any():
        ticks.append(state.fill_tick(len(ticks)))
    return Filled(np.array(ticks), state.makespan)


class _Filling:
    """`forward`, `backward` (B or I) and `weight` (B or W) are how many each stage has done, [K, S]."""

    def __init__(self, problem: SearchProblem, rules: Rules, exchange: int, cutoff: float):
        self.problem, self.rules, self.exchange, self.cutoff = problem, rules, exchange, cutoff
        dag, count = problem.dag, len(rules)
        stages, ranks = dag.num_stages, dag.num_ranks
        self.forward, self.backward, self.weight = (np.zeros((count, stages), int) for _ in range(3))
        self.arrived = (self.forward, self.backward)  # what other ranks can use
        self.end = np.zeros((count, ranks))
        self.neighbours, self.occupancy, self.latency = _list_links(problem)  # [R, D]
        self.sent = np.zeros(
            (count, *self.neighbours.shape)
        )  # when each link to a rank has sent the last tick's values
        self.due = [self.end] * exchange  # when all of a tick is there; before tick 0 nothing was sent
        self.makespan = np.zeros(count)
        self.alive = np.ones(count, bool)
        self.idle = np.zeros(count, int)  # ticks in which a row has done nothing
        self.wakes = np.zeros((count, ranks), int)  # the tick from which each rank may act again
        self.left = np.tile(np.array(problem.work), (count, 1))
        self.rank_of = np.array(dag.rank_of)
        self.longest_pause = rules.pause.max(initial=0)
        self.rows = np.arange(count)[:, None]
        widest = max(map(len, problem.stages_on))
        self.places = _pad(problem.stages_on, widest, stages)  # [R, C], the stages of each rank
        self.needs = [_list_columns(problem, sources) for sources in (dag.forward_sources, dag.backward_sources)]
        seconds = np.array([problem.seconds[kind] for kind in SEARCHED])
        whole = rules.whole.astype(bool) | (not problem.split_backward)
        self.whole = whole
        back = np.where(whole, seconds[1], seconds[2])
        self.seconds = np.stack(
            [np.broadcast_to(seconds[0], back.shape), back, np.broadcast_to(seconds[3], back.shape)], 1
        )
        self.score = np.full((count, _KINDS, stages + 1), -np.inf)
        self.home = np.arange(ranks)[:, None] == self.rank_of  # [R, S]

    def fill_tick(self, tick: int) -> np.ndarray:
        """Choose and do one action for each rank of each row; returns their codes, [K, R]."""
        start = np.maximum(self.end, self.due[0])
        self._score_ready(tick)
        offered = self.score[:, :, self.places]  # [K, 3, R, C]
        offered = offered.transpose(0, 2, 1, 3).reshape(len(offered), len(self.places), -1)
        chosen = offered.argmax(-1)
        acts = (
            (np.take_along_axis(offered, chosen[..., None], -1)[..., 0] > -np.inf)
            & self.alive[:, None]
            & (self.wakes <= tick)
        )
        kind, place = np.divmod(chosen, self.places.shape[1])
        stage = np.where(acts, self.places[np.arange(len(self.places)), place], 0)
        self.wakes = np.where(acts, tick + 1 + self.rules.pause[self.rows, kind, stage], self.wakes)
        seconds = np.where(acts, self.seconds[self.rows, kind, stage], 0.0)
        before, end = (self.forward, self.backward), start + seconds
        self._count(kind, stage, acts)
        self.arrived = before if self.exchange == 2 else (self.forward, self.backward)
        self.end = end
        self._send()
        self.left -= seconds
        self.makespan = np.maximum(self.makespan, np.where(acts, end, 0.0).max(1))
        self.idle = np.where(acts.any(1), 0, self.idle + 1)
        stuck = (
            self.idle > self.rules.period + self.longest_pause + 2
        )  # slots can ask for ticks that never come together
        late = self.alive & (stuck | ((end + self.left).max(1) >= self.cutoff))
        self.makespan[late] = np.inf
        last = self.weight if self.problem.dag.has_backward else self.forward
        self.alive &= ~late & (last < self.problem.num_microbatches).any(1)
        whole = self.whole[self.rows, stage]
        return np.where(acts, 4 * stage + np.choose(kind, [0, np.where(whole, 1, 2), 3]), -1).astype(np.int16)

    def _send(self) -> None:
        """All links carry the values of this tick, one tick after the other."""
        padded = np.concatenate([self.end, np.full((len(self.end), 1), -np.inf)], 1)
        self.sent = np.maximum(padded[:, self.neighbours], self.sent) + self.occupancy
        self.due = [*self.due[1:], (self.sent + self.latency).max(-1)]

    def _score_ready(self, tick: int) -> None:
        """Write the scores of what can be done now, and minus infinity elsewhere."""
        rules, forward, backward, weight = self.rules, self.forward, self.backward, self.weight
        open_slot = (rules.slots >> (tick % rules.period)[:, None, None] & 1).astype(bool)
        has_room = self._has_room()
        may_forward = has_room & (forward < self._come(0)) & open_slot[:, 0]
        may_backward = (backward < np.minimum(self._come(1), forward)) & open_slot[:, 1]
        pending = backward - weight
        urgent = (pending >= rules.most_pending) | ~has_room
        may_weight = (pending > 0) & (
            rules.fill[:, None].astype(bool) | urgent | (backward == self.problem.num_microbatches)
        )
        age = rules.age[:, None]
        if not self.problem.dag.has_backward:
            may_backward[:], may_weight[:] = False, False
        scores = self.score[:, :, :-1]
        scores[:, 0] = np.where(may_forward, rules.score[:, 0] - age * forward, -np.inf)
        scores[:, 1] = np.where(may_backward, rules.score[:, 1] - age * backward, -np.inf)
        most = self.problem.num_microbatches
        first = 1e3 * (1 + most) * (pending >= rules.most_pending)
        scores[:, 2] = np.where(may_weight & open_slot[:, 2], rules.score[:, 2] - age * weight + first, -np.inf)

    def _come(self, row: int) -> np.ndarray:
        """How many micro-batches of each stage have all their inputs, [K, S]."""
        here = (self.forward, self.backward)[row]
        every = np.full((len(here), 1), self.problem.num_microbatches)
        return np.concatenate([here, self.arrived[row], every], 1)[:, self.needs[row]].min(-1)

    def _has_room(self) -> np.ndarray:
        """Whether each stage may hold one more micro-batch, [K, S]."""
        if not self.problem.dag.has_backward:
            return np.ones(self.forward.shape, bool)
        in_flight = self.forward - self.weight
        room = in_flight < self.rules.limit
        memory = self.problem.memory
        if memory is not None:
            held, kept = np.array(memory.held), np.array(memory.kept)
            most = np.array(memory.per_rank) * (1 + 1e-9)
            before_backward, before_weight = self.forward - self.backward, self.backward - self.weight
            taken = before_backward * held + before_weight * kept
            room &= (taken @ self.home.T)[:, self.rank_of] + held <= most[self.rank_of]
            reserved = np.maximum(before_backward, 1) * held  # were all W done, one of each stage could still come
            more = (before_backward > 0) * held
            room &= (reserved @ self.home.T)[:, self.rank_of] + more <= most[self.rank_of]
        return room

    def _count(self, kind: np.ndarray, stage: np.ndarray, acts: np.ndarray) -> None:
        done = np.zeros((len(acts), _KINDS, self.problem.dag.num_stages), int)
        k, rank = np.nonzero(acts)
        done[k, kind[k, rank], stage[k, rank]] = 1
        self.forward = self.forward + done[:, 0]
        self.backward = self.backward + done[:, 1]
        self.weight = self.weight + done[:, 2] + done[:, 1] * self.whole


def _pad(lists: tuple[tuple[int, ...], ...], width: int, filler: int) -> np.ndarray:
    return np.array([[*entries, *[filler] * (width - len(entries))] for entries in lists]).reshape(len(lists), width)


def _list_columns(problem: SearchProblem, sources: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """For each stage, the columns of `[here, arrived, every]` that say what has come from its sources."""
    stages, rank_of = problem.dag.num_stages, problem.dag.rank_of
    columns = tuple(tuple(p if rank_of[p] == rank_of[s] else stages + p for p in sources[s]) for s in range(stages))
    return _pad(columns, max(1, max(map(len, columns))), 2 * stages)


def _list_links(problem: SearchProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neighbours of each rank, and the occupancy and latency of the links from them; padded with free ones."""
    width = max(1, max(map(len, problem.links)))
    ranks = _pad(tuple(tuple(link.rank for link in links) for links in problem.links), width, problem.dag.num_ranks)
    occupancy, latency = np.zeros(ranks.shape), np.zeros(ranks.shape)
    for rank, links in enumerate(problem.links):
        occupancy[rank, : len(links)] = [link.occupancy for link in links]
        latency[rank, : len(links)] = [link.latency for link in links]
    return ranks, occupancy, latency
