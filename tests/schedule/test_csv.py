import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, StageDag, Timetable, dualpipe_v, gpipe, one_f_one_b, validate_timetable, zb_h1, zb_v

from .strategies import dags, exchanges, microbatches

CHAIN = StageDag.chain(2)


@given(dags(), microbatches, exchanges, st.sampled_from([gpipe, one_f_one_b, zb_h1]))
def test_round_trips(dag, num_microbatches, exchange, schedule):
    timetable = schedule(dag, num_microbatches, exchange=exchange)
    again = Timetable.from_csv(timetable.to_csv(), dag=dag, name=timetable.name, exchange=exchange)
    assert again == timetable
    as_pytorch_ends_lines = timetable.to_csv().replace("\n", "\r\n")
    assert Timetable.from_csv(as_pytorch_ends_lines, dag=dag, name=timetable.name, exchange=exchange) == timetable


def test_golden():
    assert zb_h1(CHAIN, 2).to_csv() == "0F0,0F1,,0I0,0W0,0I1,0W1\n,1F0,1I0,1F1,1I1,1W0,1W1\n"


def test_columns_that_leave_a_value_its_time_are_ticks():
    """Idle ticks that nothing asks for are kept, and so is what isn't there for others to wait for."""
    read = Timetable.from_csv("0F0,,,,,,0B0\n,,,1F0,1B0", dag=CHAIN)
    assert str(read).splitlines()[1:] == ["rank 0 | 0F0 . .  .   .  . 0B0", "rank 1 |  .  . . 1F0 1B0 .  ."]


def test_other_columns_are_orders():
    """Rows of unequal length, as of PyTorch's 1F1B: rank 1 waits for its first value in the table's second column."""
    text = "0F0,0F1,,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"
    assert Timetable.from_csv(text, dag=CHAIN, name="1f1b", exchange=1) == Timetable.from_text(
        "1f1b  microbatches=2 exchange=1\nrank 0 | 0F0 0F1 . . 0B0 0B1\nrank 1 | . 1F0 1B0 1F1 1B1 .", dag=CHAIN
    )
    spread = Timetable.from_csv(text, dag=CHAIN)
    assert str(spread).splitlines()[1:] == [
        "rank 0 | 0F0 0F1  .   .   .  0B0 . 0B1",
        "rank 1 |  .   .  1F0 1B0 1F1 1B1 .  .",
    ]
    validate_timetable(spread)


@given(st.integers(2, 4), st.integers(0, 5))
def test_overlapped_pairs_are_their_actions_in_turn(ranks, more):
    """DualPipeV as PyTorch writes it: no idle cells, and each F in one cell with the B beside it."""
    dag = StageDag.chain(2 * ranks, num_ranks=ranks, placement="v")
    timetable = dualpipe_v(dag, 2 * ranks + more)
    rows = []
    for rank in range(ranks):
        row: list[str] = []
        for action in timetable.order(rank):
            if action.kind == "F" and row and "B" in row[-1] and ";" not in row[-1]:
                row[-1] = f"({action};{row[-1]})OVERLAP_F_B"
            else:
                row.append(str(action))
        rows.append(",".join(row))
    read = validate_timetable(Timetable.from_csv("\r\n".join(rows), dag=dag, exchange=1))
    for rank in range(ranks):
        assert sorted(map(str, read.order(rank))) == sorted(map(str, timetable.order(rank)))
    first = read.order(0).index(Action("B", 2 * ranks - 1, ranks - 1))
    assert read.order(0)[first - 1] == Action("F", 0, 2 * ranks - 1), "a pair's F is written first"


def test_older_tables_write_b_for_i():
    dag = StageDag.chain(4, num_ranks=2, placement="v")
    timetable = zb_v(dag, 4)
    assert Timetable.from_csv(timetable.to_csv().replace("I", "B"), dag=dag, name="zb_v", exchange=1) == timetable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0SEND_F0\n", r"row 0, column 1: '0SEND_F0' has no place here \(SEND_F\): write the table of compute"),
        ("0UNSHARD,0F0\n", r"row 0, column 0: '0UNSHARD' has no place here \(UNSHARD\)"),
        ("0F0,(0F1;0RECV_B0)OVERLAP_F_B\n", "row 0, column 1: '0RECV_B0' is not an action"),
        ("0F0,0B0\n1F0,1X0", "row 1, column 1: '1X0' is not an action: write stage, kind"),
        ("0F0,0B0\n1F0,7B0", r"row 1, column 1: 7B0: no stage 7, stages are 0 \.\.\. 1"),
        ("0F0,0B0", "the action table has 1 rows, but the stage graph is on 2 ranks"),
        (",\n,", "the action table has no actions"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ScheduleError, match=message):
        Timetable.from_csv(text, dag=CHAIN)


def test_all_bad_cells_come_at_once():
    with pytest.raises(ScheduleError) as error:
        Timetable.from_csv("0F0,x\ny,1F0", dag=CHAIN)
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == [
        "  row 0, column 1",
        "  row 1, column 0",
    ]


def test_orders_that_wait_for_each_other():
    with pytest.raises(ScheduleError) as error:
        Timetable.from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1", dag=CHAIN, name="mine")
    assert (
        str(error.value)
        == """\
timetable 'mine' deadlocks after 2 of 8 actions:
  rank 0 is stuck at 0B0, which needs 1B0; rank 1 has it behind 1F1, 1 later
  rank 1 is stuck at 1F1, which needs 0F1; rank 0 has it behind 0B0, 1 later"""
    )


def test_what_is_missing_is_left_for_validation():
    read = Timetable.from_csv("0F0,0B0\n1B0", dag=CHAIN)
    with pytest.raises(ScheduleError, match="1F0 is never done"):
        validate_timetable(read)
