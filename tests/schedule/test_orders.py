"""Orders of actions: timed as they stand, or improved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, StageDag, Timetable, fill_greedily, validate_timetable
from jaxpar.schedule.orders import RankOrder, keep_real
from jaxpar.schedule.reorder import fill_in_order, find_peak

from .strategies import dags, exchanges, microbatches


@st.composite
def ordered(draw):
    """A graph, M, and orders that don't deadlock: those of some greedy timetable."""
    dag, m = draw(dags(has_backward=True)), draw(microbatches)
    limit = [draw(st.integers(1, 4)) for _ in range(dag.num_stages)]
    hold = limit if draw(st.booleans()) else None
    timetable = fill_greedily(dag, m, limit=limit, hold=hold, exchange=draw(exchanges))
    return dag, m, [timetable.order(rank) for rank in range(dag.num_ranks)]


@given(ordered(), exchanges)
def test_timed_orders_keep_their_order_and_waste_no_tick(case, exchange):
    dag, m, orders = case
    timetable = validate_timetable(Timetable.from_orders("x", dag, m, orders, exchange=exchange))
    assert [timetable.order(rank) for rank in range(dag.num_ranks)] == orders
    grid = timetable.grid
    for rank in range(dag.num_ranks):
        for tick in range(1, timetable.num_ticks):
            if grid[tick][rank] is not None and grid[tick - 1][rank] is None:
                earlier = [list(cells) for cells in grid]
                earlier[tick - 1][rank], earlier[tick][rank] = grid[tick][rank], None
                with pytest.raises(ScheduleError, match="needs"):
                    validate_timetable(Timetable("x", dag, m, tuple(map(tuple, earlier)), exchange))


@given(ordered(), exchanges)
def test_improved_orders_are_valid_and_hold_no_more(case, exchange):
    dag, m, orders = case
    timetable = validate_timetable(fill_in_order(dag, m, orders, exchange=exchange, name="x"))
    for rank, peak in enumerate(timetable.peak_in_flight_on_rank):
        assert peak == find_peak(timetable.order(rank)) <= find_peak(orders[rank])


def test_an_improved_order_overtakes_what_must_wait():
    """Rank 0 may hold two, and does both F's first, then an I before the W that would delay rank 1's last."""
    orders = [
        list(map(Action.from_text, row.split())) for row in ("0F0 0I0 0W0 0F1 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1")
    ]
    one = fill_in_order(StageDag.chain(2), 2, orders, exchange=1, name="x")
    assert one.peak_in_flight == (1, 1), "no more than the order held"
    orders[0] = list(map(Action.from_text, "0F0 0I0 0F1 0W0 0I1 0W1".split()))
    assert str(fill_in_order(StageDag.chain(2), 2, orders, exchange=1, name="x")).splitlines()[1:] == [
        "rank 0 | 0F0 0F1  .  0I0 0W0  .  0I1 0W1",
        "rank 1 |  .  1F0 1I0 1W0 1F1 1I1 1W1  .",
    ]


def test_orders_that_deadlock_say_where():
    orders = [RankOrder().do("FB", 0, times=2).actions, RankOrder().do("F", 1, times=2).do("B", 1, times=2).actions]
    with pytest.raises(ScheduleError) as error:
        Timetable.from_orders("mine", StageDag.chain(2), 2, orders)
    assert (
        str(error.value)
        == """\
timetable 'mine' deadlocks after 2 of 8 actions:
  rank 0 is stuck at 0B0, which needs 1B0; rank 1 has it behind 1F1, 1 later
  rank 1 is stuck at 1F1, which needs 0F1; rank 0 has it behind 0B0, 1 later"""
    )
    backwards = [[Action("B", 0, 0), Action("F", 0, 0)]]
    with pytest.raises(
        ScheduleError, match="rank 0 is stuck at 0B0, which needs 0F0; rank 0 has it behind 0B0, 1 later"
    ):
        Timetable.from_orders("mine", StageDag.chain(1), 1, backwards)


def test_what_does_not_exist_is_left_out():
    order = RankOrder().do("FB", 0, times=3).actions
    assert str(keep_real(StageDag.chain(1), 2, [order])) == "[[0F0, 0B0, 0F1, 0B1]]"
    assert str(keep_real(StageDag.chain(1, has_backward=False), 2, [order])) == "[[0F0, 0F1]]"
