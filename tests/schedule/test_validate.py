import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageDag, Timetable, gpipe, one_f_one_b, validate_timetable

CHAIN = StageDag.chain(2)


def read(*rows: str, microbatches: int = 1, exchange: int = 1, dag: StageDag = CHAIN) -> Timetable:
    lines = [f"rank {rank} | {row}" for rank, row in enumerate(rows)]
    return Timetable.from_text(
        "\n".join([f"by hand  microbatches={microbatches} exchange={exchange}", *lines]), dag=dag
    )


def complaints(timetable: Timetable, **options) -> list[str]:
    with pytest.raises(ScheduleError) as error:
        validate_timetable(timetable, **options)
    return [line.strip() for line in str(error.value).splitlines()[1 : -timetable.dag.num_ranks - 1]]


def test_valid_ones_come_back():
    good = read("0F0 .   .   0B0", ".   1F0 1B0 .")
    assert validate_timetable(good) is good
    validate_timetable(read("0F0 . .   .   0I0 0W0 0U0", ".   . 1F0 1I0 1W0 1U0 .", exchange=1))
    validate_timetable(read("0F0", ".", dag=StageDag(1, (), (), (0,), 2, has_backward=False)))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (("0F0 . . 0B0", ". . 1B0 ."), "1F0 is never done"),
        (("0F0 . .", ". 1F0 1B0"), "0B0 is never done (nor 0I0 and 0W0)"),
        (("0F0 . . 0B0 0B0", ". 1F0 1B0 . ."), "0B0 is done twice, in ticks 3 and 4"),
        (("0F0 . . 0B0", "0F0 1F0 1B0 ."), "0F0 is done twice, in ticks 0 and 0"),
        (("0F0 . 1B0 . 0B0", ". 1F0 . . ."), "1B0 is on rank 0, but stage 1 lives on rank 1"),
        (("0F0 7F0 . 0B0", ". 1F0 1B0 ."), "7F0: no stage 7, stages are 0 ... 1"),
        (("0F0 0F4 . 0B0", ". 1F0 1B0 ."), "0F4: no micro-batch 4, those of F are 0 ... 0"),
        (("0F0 . . 0B0", "1F0 . 1B0 ."), "1F0 in tick 0 needs 0F0, which is there from tick 1"),
        (("0B0 0F0 . .", ". . 1F0 1B0"), "0B0 in tick 0 needs 0F0, which is there from tick 2"),
        (("0F0 . . 0I0 0W0", ". 1F0 . 1B0 ."), "0I0 in tick 3 needs 1B0, which is there from tick 4"),
        (("0F0 . 0B0 .", ". 1F0 1I0 1W0"), "0B0 in tick 2 needs 1I0, which is there from tick 3"),
        (("0F0 . . 0W0 0I0", ". 1F0 1B0 . ."), "0W0 in tick 3 needs 0I0, which is there from tick 5"),
        (("0F0 . . 0I0 .", ". 1F0 1B0 . ."), "0I0 is done, but 0W0 never is"),
        (("0F0 . . 0W0 .", ". 1F0 1B0 . ."), "0W0 is done, but 0I0 never is"),
        (("0F0 . . 0B0 0W0", ". 1F0 1B0 . ."), "0B0 is done, and so is 0W0: split a backward or don't"),
        (("0F0 . 0U0 0B0", ". 1F0 1B0 ."), "0U0 in tick 2 needs 0B0, which is there from tick 4"),
        (("0F0 . . 0B0 0U1", ". 1F0 1B0 . ."), "0U1: no micro-batch 1, those of U are 0 ... 0"),
    ],
)
def test_each_failure(rows, complaint):
    assert complaint in complaints(read(*rows))


def test_the_exchange_takes_its_ticks_between_ranks_only():
    rows = ("0F0 . . 0B0", ". 1F0 1B0 .")
    assert complaints(read(*rows, exchange=2)) == [
        "1F0 in tick 1 needs 0F0, which is there from tick 2",
        "0B0 in tick 3 needs 1B0, which is there from tick 4",
    ]
    together = StageDag(2, ((0, 1),), ((1, 0),), (0, 0), 1)
    validate_timetable(read("0F0 1F0 1B0 0B0", exchange=2, dag=together))


def test_a_forward_only_step_has_no_backward():
    dag = StageDag.chain(1, has_backward=False)
    assert complaints(read("0F0 0B0", dag=dag)) == ["0B0: a backward in a forward-only step"]


def test_max_in_flight():
    timetable = gpipe(CHAIN, 3, exchange=1)
    assert complaints(timetable, max_in_flight=(2, 3)) == [
        "stage 0 holds 3 micro-batches in flight, first over its 2 in tick 2"
    ]
    with pytest.raises(ScheduleError, match="max_in_flight has 1 entries, but there are 2 stages"):
        validate_timetable(timetable, max_in_flight=(2,))


def test_all_failures_come_at_once_with_the_grid_marked():
    with pytest.raises(ScheduleError) as error:
        validate_timetable(read("0F0 .   .   0B0 0B0", "1F0 1B0 .   .   ."))
    assert (
        str(error.value)
        == """\
timetable 'by hand' (M=1, exchange=1) is not valid, 2 failures:
  0B0 is done twice, in ticks 3 and 4
  1F0 in tick 0 needs 0F0, which is there from tick 1
  tick |     0   1 2     3     4
rank 0 | [0F0]  .  . [0B0] [0B0]
rank 1 | [1F0] 1B0 .   .     ."""
    )


def test_a_long_grid_is_shown_around_the_bad_cells_only():
    good = one_f_one_b(StageDag.chain(4), 32, extra=0)
    grid = list(good.grid)
    bad_tick = next(tick for tick, cells in enumerate(grid) if tick > 40 and cells[2] is not None)
    grid[bad_tick] = (*grid[bad_tick][:2], None, *grid[bad_tick][3:])
    moved = Timetable("holed", good.dag, 32, (*grid, (None, None, good.grid[bad_tick][2], None)))
    with pytest.raises(ScheduleError) as error:
        validate_timetable(moved)
    lines = str(error.value).splitlines()
    assert f"[{good.grid[bad_tick][2]}]" in lines[-2]
    assert "..." in lines[-1]
    assert max(map(len, lines)) < 120


def test_a_hundred_failures_are_counted_not_listed():
    empty = Timetable("empty", StageDag.chain(4), 20, ((None,) * 4,))
    assert complaints(empty)[-1] == "... and 140 more"
