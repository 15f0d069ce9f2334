"""The search behind `schedule="auto"`: the timetable of least makespan in the executor's semantics, and how good it is.

All named schedules that take the graph are candidates. Then list scheduling under varied rules
(`jaxpar.schedule.evolve`), then simulated annealing on the cells of the best (`jaxpar.schedule.improve`). It stops when
the makespan meets the lower bound (`jaxpar.schedule.bounds`), and is not optimal otherwise: the gap is what it may be
off by. What is tried is bounded by a count of the work, so the result is the same each time, unless the clock ends the
search (`finished` is then false). Could be improved: a bound that knows the executor's waiting, and changes that shift
whole micro-batches, for equal stages with whole backwards and memory for little more than a micro-batch a stage.
"""

import dataclasses
import inspect
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from jaxpar.errors import ScheduleError
from jaxpar.schedule.bounds import bound_makespan
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.evolve import Evolution
from jaxpar.schedule.improve import LocalSearch
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.problem import SearchProblem, number_microbatches
from jaxpar.schedule.registry import SCHEDULES, make_timetable
from jaxpar.schedule.search_cache import find_directory, make_key, read_timetable, write_timetable
from jaxpar.schedule.search_result import Progress, SearchResult, cost_candidate
from jaxpar.schedule.simulate import simulate
from jaxpar.schedule.timetable import Timetable
from jaxpar.schedule.validate import validate_timetable

_VERSION = 1  # of the algorithm, for the cache
_VARIANTS = {"extra": (None, 0), "exchange": (1, 2)}  # options of named schedules to try; None is the default
_EVOLVING, _ANNEALING = 0.2, 0.33  # shares of the time, by a count of the work, so that no clock decides
_OTHERS = 2  # further starts for each exchange
_LONG_RUNS = 3  # of annealing, after a short one for each start
_HEATS = (0.25, 1.0)  # by turns; of the mean time of an action
_remembered: dict[str, "SearchResult"] = {}
_log = logging.getLogger(__name__)


def find_timetable(
    dag: StageDag,
    num_microbatches: int,
    costs: StageCosts,
    *,
    memory_limit: MemoryLimit | float | Sequence[float] | None = None,
    split_backward: bool = True,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[Progress], None] | Literal[False] | None = None,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
) -> SearchResult:
    """Search for the timetable of least executor makespan; never worse than a named schedule that fits.

    Args:
      dag: the stage graph.
      num_microbatches: M.
      costs: seconds per micro-batch.
      memory_limit: the most that each rank may hold: micro-batches in flight summed over its stages, one number or one
        for each rank; or a `MemoryLimit`, which can count bytes. None for no limit.
      split_backward: whether backwards may be done as I and W.
      seconds: the most to spend; the work planned takes about half of it.
      seed: of the random choices.
      progress: called now and then; by default a line on stderr when it takes more than a second and stderr is a
        terminal; False for none.
      cache: a directory to keep timetables in; `JAXPAR_CACHE_DIR` by default, if set. Results are kept in memory too,
        unless it is False.

    Raises:
      ScheduleError: costs or limit are not for the graph, or a rank can't hold one micro-batch of each of its stages.

    >>> result = find_timetable(StageDag.chain(4), 8, StageCosts.uniform(4), memory_limit=4, cache=False)
    >>> result.makespan, result.lower_bound, result.gap  # 3 M + S - 1
    (27.0, 27.0, 0.0)
    """
    if memory_limit is not None and not isinstance(memory_limit, MemoryLimit):
        memory_limit = MemoryLimit.in_microbatches(dag, memory_limit)
    problem = SearchProblem(dag, num_microbatches, costs, memory_limit, split_backward)
    if not seconds > 0:
        raise ScheduleError(f"a search needs some seconds, got seconds={seconds}")
    key = make_key(problem, seconds=seconds, seed=seed, version=_VERSION, schedules=sorted(SCHEDULES))
    directory = None if cache is False else find_directory(cache)
    result = None if cache is False else _remembered.get(key)
    kept = read_timetable(directory, key, problem) if directory else None
    if result is None:
        run = _Run(problem, seconds, seed, _report_to_terminal if progress is None else progress or None)
        result = run.search() if kept is None else run.describe(kept)
    if directory and kept is None:
        write_timetable(directory, key, result.timetable)
    if cache is not False:
        _remembered[key] = result
    _log.info("%s: makespan %.6g, lower bound %.6g", result.timetable.name, result.makespan, result.lower_bound)
    return result


class _Run:
    """One search: its clock, and the best so far."""

    def __init__(self, problem: SearchProblem, seconds: float, seed: int, report: Callable[[Progress], None] | None):
        self.begin = self.reported = time.perf_counter()
        self.problem, self.seconds, self.seed, self.report = problem, seconds, seed, report
        self.bounds = bound_makespan(problem)
        self.enough = self.bounds.best * (1 + 1e-9)
        self.finished = True
        self.named = _make_named(problem)
        self.best: Timetable | None = None
        self.makespan = float("inf")

    def search(self) -> SearchResult:
        """All phases, until the bound is met, the work is done, or the time is over."""
        allowed = [(name, timetable) for name, timetable in self.named.items() if self.problem.accepts(timetable)]
        for name, timetable in sorted(allowed, key=lambda entry: max(entry[1].peak_in_flight_on_rank)):
            self._offer(dataclasses.replace(timetable, name=f"auto ({name})"))  # of equal ones, the least in flight
        starts = self._evolve()
        if self.best is not None and self.makespan > self.enough:
            starts.append(self.best)
        self._anneal(starts)
        assert self.best is not None  # list scheduling finishes whenever each stage may hold a micro-batch
        return self.describe(validate_timetable(self.best))

    def describe(self, timetable: Timetable) -> SearchResult:
        """The result, beside all that was there before the search."""
        rows = [cost_candidate(name, named, self.problem) for name, named in self.named.items()]
        found = cost_candidate(timetable.name, timetable, self.problem)
        spent = time.perf_counter() - self.begin
        return SearchResult(timetable, found.makespan, self.bounds, (*rows, found), spent, self.finished)

    def _evolve(self) -> list[Timetable]:
        """The best of list scheduling for exchange 1 and for 2, to start from."""
        if self.makespan <= self.enough:
            return []
        runs = []
        for exchange in (1, 2):
            if self.makespan > self.enough and self._going():
                runs.append(Evolution(self.problem, exchange, np.random.default_rng([self.seed, exchange])))
                self._offer_steps(runs[-1])
        for turn in itertools.count():
            done = self.makespan <= self.enough or sum(run.work for run in runs) > _EVOLVING * self.seconds
            if done or not self._going():
                break
            runs.sort(key=lambda run: run.makespan)
            run = runs[turn % 4 == 3 and len(runs) > 1]  # the one that lags behind has a turn in four
            run.advance()
            self._offer_steps(run)
        if self.makespan <= self.enough:
            return []
        found = [(run, steps) for run in runs for steps in (run.steps, *run.list_others(_OTHERS))]
        return [number_microbatches(self.problem, steps, run.exchange) for run, steps in found]

    def _anneal(self, starts: list[Timetable]) -> None:
        """Anneal each start for a while, then the best of them for longer."""
        work = _ANNEALING * self.seconds
        for seed, start in enumerate([*starts, *[None] * _LONG_RUNS]):
            if self.makespan <= self.enough or not self._going():
                break
            begin = start or self.best
            assert begin is not None
            local = LocalSearch(self.problem, begin, seed=1000 * self.seed + seed)
            local.run(
                self.enough,
                self._going,
                work / 2 / (len(starts) if start else _LONG_RUNS),
                heat=_HEATS[seed % len(_HEATS)],
            )
            self._offer_steps(local)

    def _offer_steps(self, found: Evolution | LocalSearch) -> None:
        makespan = found.makespan if isinstance(found, Evolution) else found.best
        if makespan < self.makespan * (1 - 1e-9):
            steps = found.steps if isinstance(found, Evolution) else found.best_steps
            self.best, self.makespan = number_microbatches(self.problem, steps, found.exchange), makespan

    def _offer(self, timetable: Timetable) -> None:
        makespan = simulate(timetable, self.problem.costs).makespan
        if makespan < self.makespan * (1 - 1e-9):
            self.best, self.makespan = timetable, makespan

    def _going(self) -> bool:
        """Report, and whether there is time left."""
        now = time.perf_counter()
        if self.report is not None and now - self.reported > 0.2:
            self.reported = now
            self.report(Progress(now - self.begin, self.seconds, self.makespan, self.bounds.best))
        self.finished = now - self.begin < self.seconds
        return self.finished


def _make_named(problem: SearchProblem) -> dict[str, Timetable]:
    """The named schedules that take the graph, in several variants where they leave a choice; equal ones once."""
    made: dict[str, Timetable] = {}
    for name, schedule in SCHEDULES.items():
        takes = inspect.signature(schedule).parameters
        choices = {option: values for option, values in _VARIANTS.items() if option in takes}
        for chosen in itertools.product(*choices.values()):
            options = {option: value for option, value in zip(choices, chosen, strict=True) if value is not None}
            try:
                timetable = make_timetable(name, problem.dag, problem.num_microbatches, **options)
            except ScheduleError as error:
                _log.debug("%s is no candidate: %s", name, error)
                continue
            if not any(
                timetable.grid == other.grid and timetable.exchange == other.exchange for other in made.values()
            ):
                label = ", ".join([timetable.name, *(f"{option} {value}" for option, value in options.items())])
                made[label] = timetable
    return made


def _report_to_terminal(progress: Progress) -> None:
    """One line that is written over."""
    if progress.seconds > 1 and sys.stderr.isatty():
        sys.stderr.write(f"\r{progress}\x1b[K")
        sys.stderr.flush()
