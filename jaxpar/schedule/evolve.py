"""A search over the rules of list scheduling: many at once, the best kept and varied.

An evolution strategy: it starts from rules that span what the literature does (1F1B's and eager's limits, GPipe's
order, W at once or when there is nothing else to do, forwards and backwards in turn), and varies the best.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from jaxpar.schedule.list_many import Filled, Rules, fill_many
from jaxpar.schedule.problem import SearchProblem, Step

_PARENTS = 24
_CHILDREN = 96
_FORWARD_LAST = (1.0, 2.0, 0.0)  # scores of F, B or I, W: one forward, one backward
_FORWARD_FIRST = (2.0, 1.0, 0.0)


class Evolution:
    """The rules of one exchange that did best so far, and generations to better them.

    `makespan` and `steps` are of the best timetable found; `work` is about the seconds that it took, counted and not
    measured, so that a search that is bounded by it is the same on every machine.
    """

    def __init__(self, problem: SearchProblem, exchange: int, rng: np.random.Generator):
        self.problem, self.exchange, self.rng = problem, exchange, rng
        self.makespan = np.inf
        self.work = 0.0
        self.steps: list[list[Step]] = []
        self.parents = first = list_first_rules(problem)
        self.makespans = np.empty(0)
        self._judge(first, fill_many(problem, first, exchange))

    def advance(self) -> None:
        """One generation."""
        children = self.parents.take(self.rng.integers(0, len(self.parents), _CHILDREN))
        others = self.parents.take(self.rng.integers(0, len(self.parents), _CHILDREN))
        vary_rules(children, others, self.problem, self.rng)
        filled = fill_many(self.problem, children, self.exchange, cutoff=float(self.makespans[-1]) * (1 + 1e-9))
        self._judge(Rules.join(self.parents, children), filled)

    def list_others(self, most: int) -> list[list[list[Step]]]:
        """Timetables of parents that take other times than the best and each other, the best of them first."""
        order = np.unique(self.makespans.round(9), return_index=True)[1][1 : most + 1]
        filled = fill_many(self.problem, self.parents.take(order), self.exchange)
        return [filled.row(k) for k in range(len(order))]

    def _judge(self, rules: Rules, filled: Filled) -> None:
        """Keep the best rows of the parents before and `filled`; of equal ones the later, so that they drift."""
        rows = len(filled.makespan)
        self.work += len(filled.steps) * (1e-4 + rows * 1.2e-7 * self.problem.dag.num_stages)
        k = int(filled.makespan.argmin())
        if filled.makespan[k] < self.makespan * (1 - 1e-9):
            self.makespan, self.steps = float(filled.makespan[k]), filled.row(k)
        makespans = np.concatenate([self.makespans, filled.makespan])
        age = -np.arange(len(makespans))
        best = np.lexsort((age, makespans))[:_PARENTS]
        best = best[np.isfinite(makespans[best])]
        self.parents, self.makespans = rules.take(best), makespans[best]


def list_first_rules(problem: SearchProblem) -> Rules:
    """The literature's limits, orders and times of W, each with several ways to lay actions on ticks."""
    dag, most = problem.dag, problem.num_microbatches
    depth = np.array(dag.depth)
    few = [depth, depth + int(depth.max()) // 2, 2 * depth - 1, np.full(len(depth), most)]
    more = [depth + extra for extra in sorted({1, 2, 3, int(depth.max())})] + [3 * depth]
    rows = []
    for limit in few + more:
        for way in _list_ways_of_weights(problem):
            for ticks in _list_ways_of_ticks(problem) if any(limit is x for x in few) else ({},):
                rows.append(
                    {"limit": np.clip(limit, 1, most), "score": _by_depth(_FORWARD_LAST, depth), **way, **ticks}
                )
    rows += [
        {"limit": most, "score": _by_depth(_FORWARD_FIRST, depth), **way} for way in _list_ways_of_weights(problem)
    ]
    return Rules.join(*(Rules.of(1, len(depth), **row) for row in rows))


def _by_depth(score: tuple[float, ...], depth: np.ndarray) -> np.ndarray:
    """[3, S]; of the stages of one rank the deeper in the graph goes first, forwards and backwards alike."""
    return np.array(score)[:, None] - 1e-3 * depth


def _list_ways_of_weights(problem: SearchProblem) -> list[dict[str, ArrayLike]]:
    """When W is done: with I, when there is nothing else, when a stage's depth of them wait, ..."""
    most = problem.num_microbatches
    if not (problem.split_backward and problem.dag.has_backward):
        return [{"whole": True}]
    by_depth = np.clip(problem.dag.depth, 1, most)
    pending: list[dict[str, ArrayLike]] = [{"most_pending": m} for m in (most, by_depth, 2)]
    return [{"whole": True}, *pending, {"most_pending": most, "fill": False}]


def _list_ways_of_ticks(problem: SearchProblem) -> Iterator[dict[str, ArrayLike]]:
    """Any tick; F and B in turn; a slot each for F and B that moves on by two from stage to stage; pauses after B."""
    dag = problem.dag
    yield {}
    if not dag.has_backward:
        return
    level = max(dag.depth) - np.array(dag.depth)
    for first in (0 * level, level % 2):
        yield {"period": 2, "slots": _space(2, 1, np.stack([first, 1 - first]))}
    for period, in_period in ((3, 1), (10, 3), (7, 2), (11, 3), (4, 1)):
        for turn in (1, 2, 3):  # ticks from the last stage's F to its B
            start = np.stack([2 * level, 4 * level.max() + turn - 2 * level])
            yield {"period": period, "slots": _space(period, in_period, start)}
    for pause in (1, 2):
        yield {"pause": np.array([0, pause, 0])[:, None]}
    seconds = np.array([problem.seconds["F"], problem.seconds["B"], problem.seconds["W"]])
    for unit in (seconds.mean() / 2, seconds.mean() / 3):
        if unit > 0:
            yield {"pause": np.clip(np.round(seconds / unit) - 1, 0, 8).astype(int)}


def _space(period: int, in_period: int, start: np.ndarray) -> np.ndarray:
    """Slots for F and B, [2, S], spread evenly over the period from a start each; and any for W."""
    ticks = -(-np.arange(in_period) * period // in_period)
    slots = (1 << (start[..., None] + ticks) % period).sum(-1)
    return np.concatenate([slots, np.full_like(slots[:1], -1)])


def vary_rules(rules: Rules, others: Rules, problem: SearchProblem, rng: np.random.Generator) -> None:
    """Change each row in place, here and there; some take part of the row of `others`."""
    count, stages = rules.limit.shape
    most = problem.num_microbatches
    where = _choose_stages(count, stages, rng)  # [K, S]: one stage, a stretch of stages, or all
    change = rng.integers(0, 9, count)
    step = rng.integers(1, 3, (count, 1)) * rng.choice([-1, 1], (count, 1))

    def rows(*which: int) -> np.ndarray:
        return np.isin(change, which)[:, None] & where

    rules.limit[:] = np.clip(rules.limit + np.where(rows(0, 1, 2), step, 0), 1, most)
    scale = np.where(rng.random((count, 1)) < 0.5, step, step * np.maximum(1, rules.most_pending // 2))
    rules.most_pending[:] = np.clip(rules.most_pending + np.where(rows(3), scale, 0), 1, most)
    rules.score += np.where(rows(4)[:, None, :], rng.normal(0, 1, (count, 3, 1)), 0)
    rules.whole[:] = np.where(rows(5), ~rules.whole, rules.whole)
    for name in ("limit", "most_pending"):
        entry, other = getattr(rules, name), getattr(others, name)
        entry[:] = np.where(rows(6), other, entry)
    kind = rng.integers(0, 3, (count, 1, 1)) == np.arange(3)[:, None]
    longer = np.where(kind & rows(8)[:, None, :], np.sign(step)[:, None], 0)
    rules.pause[:] = np.clip(rules.pause + longer, 0, 8)
    odd = change == 7
    which = rng.integers(0, 3, count)
    rules.fill[odd & (which == 0)] ^= True
    rules.age[odd & (which == 1)] = rng.choice([0.0, 0.01, 0.1, 1.0])
    bit = np.left_shift(np.ones_like(rules.period), rng.integers(0, rules.period))
    flipped = rules.slots ^ bit[:, None, None]
    rules.slots[:] = np.where((odd & (which == 2))[:, None, None] & kind & where[:, None, :], flipped, rules.slots)


def _choose_stages(count: int, stages: int, rng: np.random.Generator) -> np.ndarray:
    ends = np.sort(rng.integers(0, stages, (count, 2)), axis=1)
    width = rng.integers(0, 3, (count, 1))
    index = np.arange(stages)
    stretch = (index >= ends[:, :1]) & (index <= ends[:, 1:])
    return np.where(width == 0, index == ends[:, :1], np.where(width == 1, stretch, True))
