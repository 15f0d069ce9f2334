import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import PLACEMENTS, SCHEDULES, StageDag, Timetable, gpipe, make_timetable, one_f_one_b

CHAIN = StageDag.chain(3)
EVAL = StageDag.chain(3, has_backward=False)


def test_by_name_callable_and_ready():
    assert make_timetable("gpipe", CHAIN, 4) == gpipe(CHAIN, 4)
    assert make_timetable("1f1b", CHAIN, 4, extra=0, exchange=1) == one_f_one_b(CHAIN, 4, extra=0, exchange=1)
    assert make_timetable(gpipe, CHAIN, 4, exchange=1) == gpipe(CHAIN, 4, exchange=1)
    ready = gpipe(CHAIN, 4)
    assert make_timetable(ready, CHAIN, 4) is ready


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_takes_the_placement_that_it_is_made_for(name):
    if name in PLACEMENTS:
        dag = StageDag.chain(6, num_ranks=3, placement=PLACEMENTS[name])
    else:
        dag = CHAIN
    timetable = make_timetable(name, dag, 5)
    assert (timetable.name, timetable.num_microbatches) == (name, 5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_forward_only_graph_gets_its_schedule_whichever_name_is_given(name):
    assert make_timetable(name, EVAL, 4, exchange=1).name == "forward_only"


def test_options_about_backwards_are_without_effect_on_a_forward_only_graph():
    assert make_timetable("1f1b", EVAL, 4, extra=0) == make_timetable("1f1b", EVAL, 4)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("zb", {}, "no schedule is called 'zb'; known: 'gpipe', '1f1b'"),
        (
            "zb",
            {},
            "known: .*'kfkb'.*'interleaved_1f1b'.*'zb_v'.*'dualpipe_v', for a step also 'auto'; or give a func",
        ),
        ("kfkb", {"k": 0}, r"kfkb: k is at least 1, one number or one for each of 3 stages, got 0"),
        ("kfkb", {"k": 1.5}, r"kfkb: k is at least 1, .* got 1.5"),
        ("kfkb", {"k": (1, 2)}, r"kfkb: k is at least 1, .* got \(1, 2\)"),
        ("zb_v", {"extra": 1}, "schedule 'zb_v' takes exchange, not extra"),
        ("zb_v", {}, "schedule 'zb_v' needs two stages on each rank"),
        ("gpipe", {"extra": 1}, "schedule 'gpipe' takes exchange, not extra"),
        (one_f_one_b, {"exta": 1}, "schedule one_f_one_b takes extra, exchange, not exta"),
        (gpipe(CHAIN, 4), {"exchange": 1}, "a ready timetable takes no options, got exchange"),
        (gpipe(CHAIN, 5), {}, "timetable 'gpipe' is for 5 micro-batches, but the step has 4"),
        (gpipe(EVAL, 4), {}, "timetable 'gpipe' is for another stage graph"),
        (lambda dag, m: None, {}, "a schedule returns a Timetable, got NoneType"),
        (lambda dag, m: Timetable("mine", dag, m, ()), {}, "timetable 'mine' .* is not valid, 24 failures"),
    ],
)
def test_errors(schedule, options, message):
    with pytest.raises(ScheduleError, match=message):
        make_timetable(schedule, CHAIN, 4, **options)


def test_no_micro_batches():
    with pytest.raises(ScheduleError, match="num_microbatches=0"):
        make_timetable("1f1b", CHAIN, 0)
