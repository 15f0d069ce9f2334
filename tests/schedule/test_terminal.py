import re
import sys

import pytest

from jaxpar.schedule import StageDag, one_f_one_b

TIMETABLE = one_f_one_b(StageDag.chain(4), 16)


def test_text_for_a_terminal_wraps_and_loses_nothing():
    text = TIMETABLE.render(width=80)
    assert max(map(len, text.splitlines())) <= 80
    for cells in TIMETABLE.grid:
        assert all(str(action) in text for action in cells if action)
    assert text.splitlines()[-1] == "peak in flight: rank 0: 6, rank 1: 5, rank 2: 4, rank 3: 1"


def test_colours_are_around_the_actions_and_nothing_else():
    plain, coloured = (TIMETABLE.render(width=80, colour=colour) for colour in (False, True))
    assert "\x1b" not in plain
    painted = re.findall(r"\x1b\[(\d+)m(\d+)([FB])(\d+)\x1b\[0m", coloured)
    assert len(painted) == 2 * 4 * 16
    assert {(kind, code) for code, _, kind, _ in painted} == {("F", "34"), ("B", "32")}
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


@pytest.mark.parametrize(
    ("terminal", "no_colour", "expected"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_by_default_on_a_terminal_only(monkeypatch, terminal, no_colour, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert ("\x1b" in TIMETABLE.render(width=80)) == expected


def test_memory_stands_under_each_rank():
    text = one_f_one_b(StageDag.chain(2), 3).render(width=60, memory=True)
    assert text.splitlines()[2:7] == [
        "  tick |   0   1   2   3   4   5   6   7 8   9",
        "rank 0 | 0F0 0F1 0F2  .   .  0B0  .  0B1 . 0B2",
        "  held |   1   2   3   3   3   3   2   2 1   1",
        "rank 1 |  .   .  1F0 1B0 1F1 1B1 1F2 1B2 .  .",
        "  held |   0   0   1   1   1   1   1   1 0   0",
    ]
