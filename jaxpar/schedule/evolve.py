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

    `makespan` and `steps` are of the best timetable found.
    """

    def __init__(self, problem: SearchProblem, exchange: int, rng: np.random.Generator):
        self.problem, self.exchange, self.rng = problem, exchange, rng
        self.makespan = np.inf
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

    def _judge(self, rules: Rules, filled: Filled) -> None:
        """Keep the best rows of the parents before and `filled`; of equal ones the later, so that they drift."""
        k = int(filled.makespan.argmin())
        if filled.makespan[k] < self.makespan * (1 - 1e-9):
            self.makespan, self.steps = float(filled.makespan[k]), filled.row(k)
        makespans = np.concatenate([self.makespans, filled.makespan])
        age = -np.arange(len(makespans))
        best = np.lexsort((age, makespans))[:_PARENTS]
        best = best[np.isfinite(makespans[best])]
        self.parents, self.makespans = rules.take(best), makespans[best]


def list_first_rules(problem: SearchProblem) -> Rules:
    """Every combination of the literature's limits, orders and times of W."""
    dag, most = problem.dag, problem.num_microbatches
    depth = np.array(dag.depth)
    extras = sorted({0, 1, 2, 3, int(depth.max()) // 2, int(depth.max())})
    limits = [*(depth + extra for extra in extras), 2 * depth - 1, 3 * depth, np.full(len(depth), most)]
    rows = [
        Rules.of(1, len(depth), limit=np.clip(limit, 1, most), score=_by_depth(score, depth), **entries)
        for limit in limits
        for entries in _list_ways(problem)
        for score in ((_FORWARD_LAST, _FORWARD_FIRST) if limit is limits[-1] else (_FORWARD_LAST,))
    ]
    return Rules.join(*rows)


def _by_depth(score: tuple[float, ...], depth: np.ndarray) -> np.ndarray:
    """[3, S]; of the stages of one rank the deeper in the graph goes first, forwards and backwards alike."""
    return np.array(score)[:, None] - 1e-3 * depth


def _list_ways(problem: SearchProblem) -> Iterator[dict[str, ArrayLike]]:
    """When W is done, and in which ticks F and B may be: any, or in turn, all ranks alike or neighbours crosswise."""
    dag, most = problem.dag, problem.num_microbatches
    ways: list[dict[str, ArrayLike]] = [{"whole": True}]
    if problem.split_backward and dag.has_backward:
        ways += [{"most_pending": most}, {"most_pending": np.clip(dag.depth, 1, most)}, {"most_pending": 2}]
        ways += [{"most_pending": most, "fill": False}]
    level = max(dag.depth) - np.array(dag.depth)
    alike, crosswise = np.zeros_like(level), level % 2
    for way in ways:
        yield way
        for first in (alike, crosswise) if dag.has_backward else ():
            yield {**way, "period": 2, "slot": np.stack([first, 1 - first, np.full_like(first, -1)])}


def vary_rules(rules: Rules, others: Rules, problem: SearchProblem, rng: np.random.Generator) -> None:
    """Change each row in place, here and there; some take part of the row of `others`."""
    count, stages = rules.limit.shape
    most = problem.num_microbatches
    where = _choose_stages(count, stages, rng)  # [K, S]: one stage, a stretch of stages, or all
    change = rng.integers(0, 8, count)
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
    odd = change == 7
    which = rng.integers(0, 3, count)
    rules.fill[odd & (which == 0)] ^= True
    rules.age[odd & (which == 1)] = rng.choice([0.0, 0.01, 0.1, 1.0])
    slot = rng.integers(-1, np.maximum(rules.period, 2)[:, None, None], rules.slot.shape)
    rules.slot[:] = np.where((odd & (which == 2))[:, None, None] & where[:, None, :], slot, rules.slot)
    rules.period[odd & (which == 2)] = rng.choice([2, 2, 3])


def _choose_stages(count: int, stages: int, rng: np.random.Generator) -> np.ndarray:
    ends = np.sort(rng.integers(0, stages, (count, 2)), axis=1)
    width = rng.integers(0, 3, (count, 1))
    index = np.arange(stages)
    stretch = (index >= ends[:, :1]) & (index <= ends[:, 1:])
    return np.where(width == 0, index == ends[:, :1], np.where(width == 1, stretch, True))
