import dataclasses
import itertools
from itertools import pairwise
from types import SimpleNamespace

import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import SCHEDULES, StageCosts, StageDag, make_timetable, simulate, validate_timetable
from jaxpar.schedule import search as search_module
from jaxpar.schedule.exact import find_optimum
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.search import find_timetable

from .random_timetables import draw_problem

CHAIN, COSTS = StageDag.chain(4), StageCosts((1.0, 1.1, 0.9, 1.0), (2.0, 2.3, 1.9, 2.2), 0.1)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The clock stands still: it is a cap on the work, which is counted, and on a busy machine it would decide."""
    monkeypatch.setattr(search_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def search(problem, seconds=0.5, **options):
    return find_timetable(
        problem.dag,
        problem.num_microbatches,
        problem.costs,
        memory_limit=problem.memory,
        split_backward=problem.split_backward,
        seconds=seconds,
        cache=False,
        **options,
    )


def check_result(problem, result):
    """Valid, within the limits, timed as `simulate` times it, and no worse than any named schedule that fits."""
    validate_timetable(result.timetable)
    assert problem.accepts(result.timetable)
    if problem.memory is not None:
        peaks = problem.memory.peaks(result.timetable)
        assert all(peak <= most + 1e-6 for peak, most in zip(peaks, problem.memory.per_rank, strict=True))
    assert result.makespan == pytest.approx(simulate(result.timetable, problem.costs).makespan)
    assert result.makespan >= result.lower_bound * (1 - 1e-9)
    for name in SCHEDULES:
        for exchange in (1, 2):
            try:
                named = make_timetable(name, problem.dag, problem.num_microbatches, exchange=exchange)
            except ScheduleError:
                continue
            if problem.accepts(named):
                assert result.makespan <= simulate(named, problem.costs).makespan * (1 + 1e-9), name


def check_many(seeds, seconds, **sizes):
    for seed in seeds:
        problem = draw_problem(seed, **sizes)
        check_result(problem, search(problem, seconds))


def test_any_graph_costs_and_memory():
    check_many(range(40), 0.1, max_stages=6, max_ranks=5, max_microbatches=6)


@pytest.mark.slow
def test_any_graph_costs_and_memory_many():
    check_many(range(100, 400), 0.5, max_stages=10, max_ranks=8, max_microbatches=12)


def measure_excess(seeds, seconds) -> list[float]:
    """How much longer than the optimum the search's timetables take, as shares of it."""
    excess = []
    for seed in seeds:
        problem = draw_problem(seed, max_stages=3, max_ranks=3, max_microbatches=4)
        result = search(problem, seconds)
        optimum = simulate(find_optimum(problem, incumbent=result.timetable), problem.costs).makespan
        assert result.lower_bound <= optimum * (1 + 1e-9)
        excess.append(result.makespan / optimum - 1)
    return excess


def test_within_two_percent_of_the_optimum():
    assert max(measure_excess(range(25), 1.0)) <= 0.02


@pytest.mark.slow
def test_within_two_percent_of_the_optimum_on_many():
    assert max(measure_excess(range(1000, 1300), 5.0)) <= 0.02


def test_textbook_memory_in_lockstep():
    """The optimum (see `test_exact`) is 25, where 1F1B by greedy ticks takes 27."""
    memory = MemoryLimit((4, 3, 2, 1), (1.0,) * 4)
    result = find_timetable(CHAIN, 5, StageCosts.uniform(4), memory_limit=memory, split_backward=False, cache=False)
    assert result.makespan == 25


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16)])
def test_zero_bubble_at_unit_costs(p, m):
    """ZB-H1's 3 m + p - 1, which is optimal, is found without knowing it."""
    result = find_timetable(StageDag.chain(p), m, StageCosts.uniform(p), cache=False)
    assert (result.makespan, result.gap) == (3 * m + p - 1, 0)


def test_forward_only():
    result = find_timetable(StageDag.chain(3, has_backward=False), 5, StageCosts((1, 2, 1)), cache=False)
    assert (result.makespan, result.gap) == (1 + 2 * 5 + 1, 0)


def test_sixteen_ranks_take_seconds():
    result = find_timetable(
        StageDag.chain(16),
        64,
        StageCosts((1.0,) * 15 + (1.5,), (2.0,) * 15 + (2.9,), 0.05),
        memory_limit=16,
        seconds=3,
        cache=False,
    )
    assert result.seconds < 6  # a phase ends after the clock does
    assert result.gap < 0.1
    assert max(result.timetable.peak_in_flight_on_rank) <= 16


def test_the_same_each_time_and_other_seeds_differ():
    options = {"memory_limit": 3, "seconds": 2.0, "cache": False}
    first, again = (find_timetable(CHAIN, 8, COSTS, **options) for _ in range(2))
    assert first.finished
    assert first.timetable == again.timetable
    others = [find_timetable(CHAIN, 8, COSTS, seed=seed, **options).timetable for seed in (1, 2)]
    assert any(other != first.timetable for other in others)


def test_kept_in_memory(monkeypatch):
    monkeypatch.delenv("JAXPAR_CACHE_DIR", raising=False)
    first = find_timetable(CHAIN, 6, COSTS, seconds=0.3)
    assert find_timetable(CHAIN, 6, COSTS, seconds=0.3) is first
    slower = dataclasses.replace(COSTS, forward=(1.0, 1.1, 0.9, 1.2))
    assert find_timetable(CHAIN, 6, slower, seconds=0.3) is not first


@pytest.fixture
def no_search(monkeypatch):
    """Forget what is kept in memory, and refuse to search."""

    def refuse(self):
        raise AssertionError("searched again")

    def arm():
        search_module._remembered.clear()
        monkeypatch.setattr(search_module._Run, "search", refuse)

    return arm


@pytest.mark.parametrize("by_environment", [False, True])
def test_kept_on_disk(tmp_path, monkeypatch, no_search, by_environment):
    monkeypatch.delenv("JAXPAR_CACHE_DIR", raising=False)
    if by_environment:
        monkeypatch.setenv("JAXPAR_CACHE_DIR", str(tmp_path))
    options = {} if by_environment else {"cache": tmp_path}
    first = find_timetable(CHAIN, 6, COSTS, seconds=0.3, seed=7, **options)
    (path,) = tmp_path.iterdir()
    assert path.read_text() == f"{first.timetable}\n"
    no_search()
    again = find_timetable(CHAIN, 6, COSTS, seconds=0.3, seed=7, **options)
    assert (again.timetable, again.makespan, again.candidates) == (first.timetable, first.makespan, first.candidates)
    with pytest.raises(AssertionError, match="searched again"):
        find_timetable(CHAIN, 6, COSTS, seconds=0.3, seed=8, **options)


def test_a_broken_cache_file_is_named(tmp_path, no_search):
    find_timetable(CHAIN, 6, COSTS, seconds=0.3, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("3F0", "3F1"))
    no_search()
    with pytest.raises(ScheduleError, match=rf"cached timetable .*{path.name} can't be used, delete it"):
        find_timetable(CHAIN, 6, COSTS, seconds=0.3, cache=tmp_path)


def test_progress_is_reported(clock, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(search_module, "time", SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks)))
    seen = []
    find_timetable(CHAIN, 12, COSTS, memory_limit=3, cache=False, seconds=2, progress=seen.append)
    assert seen
    assert all(a.seconds <= b.seconds and a.makespan >= b.makespan for a, b in pairwise(seen))
    assert all(p.makespan >= p.lower_bound for p in seen)
    assert str(seen[0]).startswith("searching a timetable: 0 of at most 2 s, makespan ")


def test_prints_a_table():
    lines = str(find_timetable(CHAIN, 8, StageCosts.uniform(4), memory_limit=4, cache=False)).splitlines()
    assert lines[0].split() == ["executor", "free", "bubble", "memory"]
    gpipe = next(line for line in lines if line.startswith("gpipe, exchange 1"))
    assert gpipe.split()[3:] == ["33", "33", "27.3%", "8", "too", "much", "memory"]
    auto = next(line for line in lines if line.startswith("auto"))
    assert auto.split()[-4:] == ["27", "27", "11.1%", "4"]
    assert lines[-1].split() == ["lower", "bound", "27", "gap", "0.0%"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_limit": 0}, r"memory limit too low .* \(rank 0: 0 < 1, .*\)"),
        ({"memory_limit": (4, 4)}, "the memory limit is for 2 ranks and 4 stages, but the stage graph has 4 and 4"),
        ({"memory_limit": MemoryLimit((4,) * 4, (1.0,))}, "is for 4 ranks and 1 stages"),
        ({"seconds": 0}, "needs some seconds, got seconds=0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ScheduleError, match=message):
        find_timetable(CHAIN, 4, COSTS, cache=False, **options)


def test_costs_of_another_graph_and_no_micro_batches():
    with pytest.raises(ScheduleError, match="costs are for 3 stages"):
        find_timetable(CHAIN, 4, StageCosts.uniform(3), cache=False)
    with pytest.raises(ScheduleError, match="at least one micro-batch, got 0"):
        find_timetable(CHAIN, 0, COSTS, cache=False)
