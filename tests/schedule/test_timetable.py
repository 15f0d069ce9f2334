import pytest
from hypothesis import given

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, StageDag, Timetable, one_f_one_b

from .strategies import dags, exchanges, microbatches

CHAIN = StageDag.chain(2)
TEXT = """\
1f1b  microbatches=2 exchange=1
rank 0 | 0F0 0F1  .  0B0  .  0B1
rank 1 |  .  1F0 1B0 1F1 1B1  ."""


def test_golden_text():
    assert str(one_f_one_b(CHAIN, 2, exchange=1)) == TEXT


@given(dags(), microbatches, exchanges)
def test_text_round_trips(dag, num_microbatches, exchange):
    timetable = one_f_one_b(dag, num_microbatches, exchange=exchange)
    again = Timetable.from_text(timetable.to_text(), dag=dag)
    assert again == timetable
    assert hash(again) == hash(timetable)


def test_text_of_a_name_with_spaces_and_of_no_ticks():
    for timetable in (
        Timetable("my own 1f1b", CHAIN, 1, (), 1),
        Timetable("x microbatches=3", CHAIN, 1, ((None, None),)),
    ):
        assert Timetable.from_text(timetable.to_text(), dag=CHAIN) == timetable


def test_typed_text_need_not_be_aligned():
    typed = TEXT.replace("  ", " ").replace("1f1b ", "1f1b  ").replace("\n", "\n\n  ")
    assert Timetable.from_text(typed, dag=CHAIN) == one_f_one_b(CHAIN, 2, exchange=1)


def test_bad_cells_are_marked_in_their_row_all_at_once():
    bad = TEXT.replace("0F1", "0X1").replace("1B1", "1B")
    with pytest.raises(ScheduleError) as error:
        Timetable.from_text(bad, dag=CHAIN)
    assert (
        str(error.value)
        == """\
can't read the timetable:
  rank 0 | 0F0 0X1  .  0B0  .  0B1
               ^^^ '0X1' is not an action: write stage, kind (F, B, I, W, U), micro-batch: 2F0
  rank 1 |  .  1F0 1B0 1F1 1B  .
                           ^^ '1B' is not an action: write stage, kind (F, B, I, W, U), micro-batch: 2F0"""
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with 'NAME  microbatches=4 exchange=2'"),
        ("1f1b\nrank 0 | .\nrank 1 | .", "starts with 'NAME"),
        ("x  microbatches=1 exchange=1\nrank 1 | .", r"expected the row of rank 0.*got:\n  rank 1"),
        ("x  microbatches=1 exchange=1\nrank 0 | .", "rows for 1 ranks, but the stage graph is on 2"),
        ("x  microbatches=1 exchange=1\nrank 0 | .\nrank 1 | . .", r"rows differ .*\(rank 0: 1, rank 1: 2\)"),
        ("x  microbatches=1 exchange=3\nrank 0 | .\nrank 1 | .", "exchange is 1 or 2 ticks, got 3"),
        ("x  microbatches=0 exchange=1\nrank 0 | .\nrank 1 | .", "at least one micro-batch, got 0"),
    ],
)
def test_text_errors(text, message):
    with pytest.raises(ScheduleError, match=message):
        Timetable.from_text(text, dag=CHAIN)


def test_construction_checks_the_shape():
    with pytest.raises(ScheduleError, match="tick 1 has 1 cells for 2 ranks"):
        Timetable("x", CHAIN, 1, ((None, None), (None,)))
    with pytest.raises(ScheduleError, match="name is one line"):
        Timetable("two\nlines", CHAIN, 1, ())


def test_helpers():
    timetable = Timetable.from_text(TEXT, dag=CHAIN)
    assert timetable.num_ticks == 6
    assert timetable.tick_of(Action("B", 1, 1)) == 4
    assert [str(action) for action in timetable.order(1)] == ["1F0", "1B0", "1F1", "1B1"]
    assert timetable.in_flight(0) == (1, 2, 2, 2, 1, 1)
    assert timetable.peak_in_flight == (2, 1)
    with pytest.raises(ScheduleError, match="has no action 1B7"):
        timetable.tick_of(Action("B", 1, 7))


def test_a_split_backward_holds_its_residuals_until_w():
    one = StageDag.chain(1)
    timetable = Timetable.from_text("x  microbatches=2 exchange=1\nrank 0 | 0F0 0I0 0F1 0W0 0I1 0W1", dag=one)
    assert timetable.in_flight(0) == (1, 1, 2, 2, 1, 1)


def test_in_flight_of_a_rank_sums_over_its_stages():
    both = StageDag(2, ((0, 1),), ((1, 0),), (0, 0), 1)
    timetable = Timetable.from_text("x  microbatches=1 exchange=1\nrank 0 | 0F0 1F0 1B0 0B0", dag=both)
    assert timetable.peak_in_flight == (1, 1)
    assert timetable.peak_in_flight_on_rank == (2,)


def test_unknown_kind():
    with pytest.raises(ScheduleError, match="one of the kinds F, B, I, W, U, got 'X'"):
        Action("X", 0, 0)
