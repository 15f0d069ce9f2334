import builtins
from itertools import pairwise

import pytest

from jaxpar.schedule import Action, StageCosts, StageDag, Timetable, forward_only, gpipe, one_f_one_b
from jaxpar.show import draw_timetable, render_timetable


def labels(figure) -> list:
    """The texts inside boxes: those that are numbers alone."""
    return [text for text in figure.axes[0].texts if text.get_text().isdigit()]


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_each_action_has_a_readable_label_that_overlaps_no_other(p, m):
    figure = draw_timetable(one_f_one_b(StageDag.chain(p), m))
    figure.draw_without_rendering()
    assert len(labels(figure)) == 2 * p * m
    assert min(text.get_fontsize() for text in labels(figure)) >= 5
    extents = [text.get_window_extent() for text in labels(figure)]
    by_rank = {}
    for extent in extents:
        by_rank.setdefault(round(extent.y0 + extent.height / 2), []).append((extent.x0, extent.x1))
    for spans in by_rank.values():
        spans.sort()
        assert all(left[1] < right[0] for left, right in pairwise(spans))


def test_labels_fit_their_boxes():
    figure = draw_timetable(gpipe(StageDag.chain(8), 32))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    forward = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert max(text.get_window_extent().width for text in labels(figure)) < forward


def test_labels_that_do_not_fit_are_left_out():
    figure = draw_timetable(one_f_one_b(StageDag.chain(2), 4), StageCosts((1, 1e-4), (1, 1)))
    assert len(labels(figure)) == 12


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_suffix_decides_the_format(tmp_path, suffix, magic):
    path = tmp_path / f"picture.{suffix}"
    draw_timetable(gpipe(StageDag.chain(2), 2), path=path, mode="free")
    assert path.read_bytes().startswith(magic)


def test_title_and_legend():
    figure = draw_timetable(one_f_one_b(StageDag.chain(4), 16, extra=0), mode="free")
    title = figure.axes[0].get_title(loc="left")
    assert title == "1f1b: 4 ranks, 16 micro-batches, makespan 57 (free), bubble 15.8 %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "backward", "in flight"]
    peaks = [text.get_text() for text in figure.axes[0].texts if "in flight" in text.get_text()]
    assert peaks == ["4 in flight", "3 in flight", "2 in flight", "1 in flight"]


def test_split_backwards_updates_shared_ranks_and_forward_only_draw():
    split = Timetable("split", StageDag.chain(1), 1, tuple((Action(kind, 0, 0),) for kind in "FIWU"))
    assert len(labels(draw_timetable(split))) == 3
    shared = StageDag(4, ((0, 1), (1, 2), (2, 3)), ((3, 2), (2, 1), (1, 0)), (0, 1, 0, 1), 3)
    assert len(labels(draw_timetable(one_f_one_b(shared, 2)))) == 16
    draw_timetable(forward_only(StageDag.chain(2, has_backward=False), 3))
    draw_timetable(gpipe(StageDag.chain(2), 1), StageCosts.uniform(2, forward=0, backward=0))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxpar\[draw\]'"):
        draw_timetable(gpipe(StageDag.chain(2), 2))


def test_text_for_a_terminal_wraps_and_loses_nothing():
    timetable = one_f_one_b(StageDag.chain(4), 16)
    text = render_timetable(timetable, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for cells in timetable.grid:
        assert all(str(action) in text for action in cells if action)
    assert text.splitlines()[-1] == "peak in flight: rank 0: 6, rank 1: 5, rank 2: 4, rank 3: 1"
