import itertools

import pytest

from jaxpar.schedule import StageCosts, StageDag, simulate, validate_timetable
from jaxpar.schedule.bounds import _run_preemptive, bound_makespan
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.problem import SearchProblem

from .random_timetables import draw_problem, draw_timetable


def bound(dag, m, costs, most=None, split=True):
    memory = None if most is None else MemoryLimit.in_microbatches(dag, most)
    return bound_makespan(SearchProblem(dag, m, costs, memory, split))


def check_sound(seeds):
    """No valid timetable, drawn blindly, is faster than its bound."""
    for seed in seeds:
        problem = draw_problem(seed, max_stages=6, max_ranks=5, max_microbatches=6)
        try:
            timetable = draw_timetable(problem, seed)
        except AssertionError:
            continue  # several stages of a rank share memory, and blind orders block each other
        validate_timetable(timetable)
        assert problem.accepts(timetable)
        makespan = simulate(timetable, problem.costs).makespan
        assert bound_makespan(problem).best <= makespan * (1 + 1e-9), (seed, problem, timetable)


def test_sound():
    check_sound(range(600))


@pytest.mark.slow
def test_sound_on_many():
    check_sound(range(1000, 9000))


@pytest.mark.parametrize(("p", "m"), [(1, 1), (4, 1), (4, 3), (4, 16), (8, 32)])
def test_published_optima_are_met(p, m):
    """GPipe and 1F1B take 3 (m + p - 1), which no whole backward beats; ZB-H1 takes 3 m + p - 1."""
    chain, costs = StageDag.chain(p), StageCosts.uniform(p)
    assert bound(chain, m, costs, split=False).best == 3 * (m + p - 1)
    if m >= p:
        assert bound(chain, m, costs).best == 3 * m + p - 1


def test_critical_path_with_transfers():
    costs = StageCosts.uniform(3, transfer=0.5)
    assert bound(StageDag.chain(3), 1, costs, split=False).critical_path == 3 * 3 + 4 * 0.5


def test_memory_bounds_the_rate():
    """One micro-batch at a time: each waits for the one before to come back."""
    assert bound(StageDag.chain(4), 5, StageCosts.uniform(4), most=1, split=False).memory == 5 * 4 * 3


def test_slow_links_bound_the_ticks():
    """Each of 2 * 10 actions on a rank needs a tick, and every second tick a transfer."""
    limits = bound(StageDag.chain(2), 10, StageCosts.uniform(2, transfer=100.0))
    assert limits.exchange == 900
    assert limits.best >= limits.exchange


def test_the_busiest_rank_of_a_graph():
    """Two towers of one stage that meet in a trunk three times as long."""
    dag = StageDag(3, ((0, 2), (1, 2)), ((2, 0), (2, 1)), (0, 1, 2), 3)
    assert bound(dag, 8, StageCosts((1, 1, 3), (2, 2, 6)), split=False).best == 1 + 8 * 9 + 2


def test_jacksons_rule_is_below_every_order():
    """Against all orders of small job sets; and equal to the best where interruption can't help."""
    import random

    rng = random.Random(0)
    for _ in range(200):
        jobs = sorted((rng.randint(0, 5), rng.randint(1, 4), rng.randint(0, 6)) for _ in range(5))
        best = float("inf")
        for order in itertools.permutations(jobs):
            now = end = 0
            for head, duration, tail in order:
                now = max(now, head) + duration
                end = max(end, now + tail)
            best = min(best, end)
        assert _run_preemptive(jobs) <= best
        same_heads = [(0, duration, tail) for _, duration, tail in jobs]
        longest_tail_first = sorted(same_heads, key=lambda job: -job[2])
        now = end = 0
        for _, duration, tail in longest_tail_first:
            now += duration
            end = max(end, now + tail)
        assert _run_preemptive(same_heads) == end


def test_prints_the_tightest():
    limits = bound(StageDag.chain(4), 16, StageCosts.uniform(4), most=1, split=False)
    marked = [line for line in str(limits).splitlines() if line.endswith("*")]
    assert marked == ["memory                192  *"]
