"""Ticks of a forward and a backward against one action a tick."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.composites import Case, improve, pair_greedily, part_pairs, strip
from jaxpar.schedule import StageCosts, StageDag, eager_1f1b, gpipe, one_f_one_b, simulate, validate_timetable


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize("transfer", [0, 0.5])
@pytest.mark.parametrize("make", [one_f_one_b, eager_1f1b, gpipe])
def test_one_action_a_tick_takes_what_the_simulator_says(make, exchange, transfer):
    timetable = make(StageDag.chain(4), 8, exchange=exchange)
    expected = simulate(timetable, StageCosts.uniform(4, transfer=transfer)).makespan
    assert Case(4, 8, exchange, (8,) * 4, transfer).makespan(strip(timetable)) == pytest.approx(expected)


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_pairs_with_twice_the_depth_in_flight_are_as_fast_as_ranks_that_run_freely(p, m):
    case = Case(p, m, 1, tuple(2 * (p - s) - 1 for s in range(p)))
    assert case.makespan(pair_greedily(case)) == case.free == 3 * (m + p - 1)


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 4), st.floats(0, 2), st.integers(0, 9))
def test_parted_pairs_are_never_slower_and_hold_no_more(p, m, extra, transfer, seed):
    """Random pairs: those of greedy, some of them parted."""
    case, rng = Case(p, m, 1, tuple(min(m, p - s + extra) for s in range(p)), transfer), random.Random(seed)
    orders = [
        [part for cell in order for part in (cell if rng.random() < 0.3 else (cell,))] for order in pair_greedily(case)
    ]
    parted = validate_timetable(part_pairs(case, orders), max_in_flight=case.limits)
    took = simulate(parted, StageCosts.uniform(p, transfer=transfer)).makespan
    assert took <= case.makespan(orders) * (1 + 1e-9)


def test_annealing_keeps_the_limit_and_finds_pairs():
    case = Case(3, 6, 1, (5, 3, 1))
    singles = pair_greedily(case, pairs=False)
    assert case.makespan(singles) > case.free
    assert improve(case, [singles], 20.0) == case.free
