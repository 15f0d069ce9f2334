import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageDag, fill_greedily, validate_timetable

from .strategies import dags, exchanges, microbatches


@given(dags(), microbatches, exchanges, st.data())
def test_any_limits_of_at_least_one_give_a_valid_timetable(dag, num_microbatches, exchange, data):
    limit = [data.draw(st.integers(1, 5)) for _ in range(dag.num_stages)]
    timetable = fill_greedily(dag, num_microbatches, limit=limit, exchange=exchange)
    validate_timetable(timetable, max_in_flight=limit)
    assert any(timetable.grid[-1]), "the last tick is not idle"


@given(dags(), microbatches, exchanges)
def test_forwards_first(dag, num_microbatches, exchange):
    timetable = validate_timetable(fill_greedily(dag, num_microbatches, exchange=exchange, forwards_first=True))
    for rank in range(dag.num_ranks):
        kinds = "".join(action.kind for action in timetable.order(rank))
        assert "BF" not in kinds


@given(dags(), microbatches)
def test_stages_take_micro_batches_in_order(dag, num_microbatches):
    timetable = fill_greedily(dag, num_microbatches)
    for stage in range(dag.num_stages):
        for kind in "FB" if dag.has_backward else "F":
            order = [a.microbatch for a in timetable.order(dag.rank_of[stage]) if (a.kind, a.stage) == (kind, stage)]
            assert order == list(range(num_microbatches))


def test_a_rank_with_two_stages_prefers_backwards_then_the_lower_micro_batch():
    dag = StageDag(4, ((0, 1), (1, 2), (2, 3)), ((3, 2), (2, 1), (1, 0)), (0, 1, 0, 1), 2)
    assert str(fill_greedily(dag, 3, exchange=1)).splitlines()[1:] == [
        "rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0  .  0B0 2B1 2F2 0B1  .  2B2  .  0B2",
        "rank 1 |  .  1F0 1F1 3F0 3B0 3F1 1B0 3B1 1F2 1B1 3F2 3B2  .  1B2  .",
    ]


def test_limits_too_low_are_named():
    with pytest.raises(ScheduleError, match=r"too low to finish 4 micro-batches \(stage 1: 0\).*give at least 1"):
        fill_greedily(StageDag.chain(3), 4, limit=(1, 0, 1))
    with pytest.raises(ScheduleError, match=r"\(stage 0: 3\): with all forwards first .* give at least 4"):
        fill_greedily(StageDag.chain(2), 4, limit=(3, 4), forwards_first=True)
    with pytest.raises(ScheduleError, match="limit has 1 entries, but there are 2 stages"):
        fill_greedily(StageDag.chain(2), 4, limit=(3,))


@given(dags(has_backward=True), microbatches, exchanges, st.data())
def test_split_backwards_keep_both_limits(dag, num_microbatches, exchange, data):
    limit, hold = ([data.draw(st.integers(1, 5)) for _ in range(dag.num_stages)] for _ in range(2))
    timetable = fill_greedily(dag, num_microbatches, limit=limit, hold=hold, exchange=exchange)
    validate_timetable(timetable, max_in_flight=hold)
    for stage in range(dag.num_stages):
        kinds = [a.kind for a in timetable.order(dag.rank_of[stage]) if a.stage == stage]
        ahead = [kinds[:i].count("F") - kinds[:i].count("I") for i in range(len(kinds))]
        assert max(ahead) <= limit[stage]


def test_a_w_makes_way_for_a_forward_that_it_alone_stops():
    """ZB-H1's order. Were I's taken first, rank 0 would do 0I1 before 0F2, and the last rank would wait for it."""
    assert str(fill_greedily(StageDag.chain(2), 4, limit=(2, 1), hold=(2, 2), exchange=1)).splitlines()[1:] == [
        "rank 0 | 0F0 0F1  .  0I0 0W0 0F2 0I1 0W1 0F3 0I2 0W2 0I3 0W3",
        "rank 1 |  .  1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3",
    ]


def test_groups_that_differ():
    """Stage 1 waits for its group of two before its first backward, so stage 0 must hold two before its own."""
    assert str(fill_greedily(StageDag.chain(2), 4, limit=(3, 2), group=(1, 2), exchange=1)).splitlines()[1:] == [
        "rank 0 | 0F0 0F1 0F2  .  0B0 0B1 0F3  .   .  0B2 0B3",
        "rank 1 |  .  1F0 1F1 1B0 1B1 1F2  .  1F3 1B2 1B3  .",
    ]


def test_groups_without_room_for_those_downstream():
    with pytest.raises(ScheduleError, match=r"limits \(1, 2\) are too low to finish in groups of \(1, 2\)"):
        fill_greedily(StageDag.chain(2), 4, limit=(1, 2), group=(1, 2))
    with pytest.raises(ScheduleError, match=r"\(stage 1: 1\): a stage must hold a group; give at least 2"):
        fill_greedily(StageDag.chain(2), 4, limit=(4, 1), group=(1, 2))
    with pytest.raises(ScheduleError, match="a group has at least one micro-batch, got stage 1: 0"):
        fill_greedily(StageDag.chain(2), 4, group=(1, 0))


@pytest.mark.parametrize("num_microbatches", [0, -1])
def test_no_micro_batches(num_microbatches):
    with pytest.raises(ScheduleError, match="at least one micro-batch"):
        fill_greedily(StageDag.chain(2), num_microbatches)
