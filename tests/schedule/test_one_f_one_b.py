import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageCosts, StageDag, one_f_one_b, simulate, validate_timetable

from .strategies import dags, exchanges, microbatches


def lockstep_ratio(p: int, m: int, **options) -> float:
    """The executor's makespan over the free-running `3 (m + p - 1)`, at F = 1 and B = 2."""
    timetable = one_f_one_b(StageDag.chain(p), m, **options)
    return simulate(timetable, StageCosts.uniform(p)).makespan / (3 * (m + p - 1))


@given(dags(), microbatches, exchanges, st.none() | st.integers(0, 3))
def test_valid_on_any_graph_within_its_bound(dag, num_microbatches, exchange, extra):
    slack = max(dag.depth) // 2 if extra is None else extra
    bound = [min(num_microbatches, depth + slack) for depth in dag.depth]
    validate_timetable(one_f_one_b(dag, num_microbatches, extra=extra, exchange=exchange), max_in_flight=bound)


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 8), (4, 1), (4, 3), (4, 16), (8, 32)])
def test_published_time_and_memory(p, m, exchange):
    timetable = one_f_one_b(StageDag.chain(p), m, extra=0, exchange=exchange)
    assert simulate(timetable, StageCosts.uniform(p), mode="free").makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == tuple(min(m, p - r) for r in range(p))


def test_textbook_order():
    """Megatron's figure 4 (top): warm up, then one forward and one backward in turn, then drain."""
    timetable = one_f_one_b(StageDag.chain(4), 8, extra=0)
    for rank in range(4):
        kinds = "".join(action.kind for action in timetable.order(rank))
        warm = 4 - rank
        assert kinds == "F" * warm + "BF" * (8 - warm) + "B" * warm


@pytest.mark.parametrize("p", [4, 8])
@pytest.mark.parametrize("m", [16, 32])
def test_default_is_within_six_percent_of_free_running(p, m):
    assert lockstep_ratio(p, m) <= 1.06
    timetable = one_f_one_b(StageDag.chain(p), m)
    assert all(peak <= min(m, p - r) + p // 2 for r, peak in enumerate(timetable.peak_in_flight))


@pytest.mark.parametrize(
    ("p", "m", "by_extra"),
    [
        (4, 16, {0: 1.19, 1: 1.11, 2: 1.04, 3: 1.00}),
        (8, 32, {0: 1.23, 1: 1.16, 2: 1.13, 3: 1.09, 4: 1.05, 7: 1.00}),
    ],
)
def test_what_memory_buys_in_lockstep(p, m, by_extra):
    assert lockstep_ratio(p, m, extra=0, exchange=1) == pytest.approx(1.26, abs=0.006)
    for extra, ratio in by_extra.items():
        assert lockstep_ratio(p, m, extra=extra) == pytest.approx(ratio, abs=0.006)


def test_a_graph_holds_less_than_the_chain_of_its_stages():
    """Two towers of three stages that meet in one: depth 4, where a chain of the 7 stages has depth 7."""
    forward = ((0, 1), (1, 2), (2, 6), (3, 4), (4, 5), (5, 6))
    towers = StageDag(7, forward, tuple((b, a) for a, b in forward), tuple(range(7)), 7)
    graph, chain = one_f_one_b(towers, 16, extra=0), one_f_one_b(StageDag.chain(7), 16, extra=0)
    assert graph.peak_in_flight == (4, 3, 2, 4, 3, 2, 1)
    assert chain.peak_in_flight == (7, 6, 5, 4, 3, 2, 1)
    costs = StageCosts.uniform(7)
    assert simulate(graph, costs, mode="free").makespan == 3 * (16 + 4 - 1)


def test_negative_extra():
    with pytest.raises(ScheduleError, match=r"1f1b: extra .* at least 0, got -1"):
        one_f_one_b(StageDag.chain(2), 4, extra=-1)
