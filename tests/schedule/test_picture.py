import builtins
from itertools import pairwise

import pytest

from jaxpar.schedule import Action, Simulation, StageCosts, StageDag, Timetable, forward_only, gpipe, one_f_one_b


def labels(figure) -> list:
    """The texts inside boxes: those that are numbers alone."""
    return [text for text in figure.axes[0].texts if text.get_text().isdigit()]


@pytest.mark.parametrize(("p", "m"), [(4, 16), (8, 32)])
def test_each_action_has_a_readable_label_that_overlaps_no_other(p, m):
    figure = one_f_one_b(StageDag.chain(p), m).draw()
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
    figure = gpipe(StageDag.chain(8), 32).draw()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    forward = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert max(text.get_window_extent().width for text in labels(figure)) < forward


def test_labels_that_do_not_fit_are_left_out():
    figure = one_f_one_b(StageDag.chain(2), 4).draw(costs=StageCosts((1, 1e-4), (1, 1)))
    assert len(labels(figure)) == 12


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_suffix_decides_the_format(tmp_path, suffix, magic):
    path = tmp_path / f"picture.{suffix}"
    gpipe(StageDag.chain(2), 2).draw(path, mode="free")
    assert path.read_bytes().startswith(magic)


def test_title_and_legend():
    figure = one_f_one_b(StageDag.chain(4), 16, extra=0).draw(mode="free")
    title = figure.axes[0].get_title(loc="left")
    assert title == "1f1b: 4 ranks, 16 micro-batches, makespan 57 (free), bubble 15.8 %"
    assert figure.axes[0].get_xlabel() == "time (1 = a forward)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "backward", "residuals"]
    peaks = [text.get_text() for text in figure.axes[0].texts if "in flight" in text.get_text()]
    assert peaks == ["4 in flight", "3 in flight", "2 in flight", "1 in flight"]


def test_split_backwards_updates_shared_ranks_and_forward_only_draw():
    split = Timetable("split", StageDag.chain(1), 1, tuple((Action(kind, 0, 0),) for kind in "FIWU"))
    assert len(labels(split.draw())) == 3
    shared = StageDag(4, ((0, 1), (1, 2), (2, 3)), ((3, 2), (2, 1), (1, 0)), (0, 1, 0, 1), 3)
    assert len(labels(one_f_one_b(shared, 2).draw())) == 16
    forward_only(StageDag.chain(2, has_backward=False), 3).draw()
    gpipe(StageDag.chain(2), 1).draw(costs=StageCosts.uniform(2, forward=0, backward=0))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxpar\[draw\]'"):
        gpipe(StageDag.chain(2), 2).draw()


def test_a_ranks_first_stage_is_dark_with_white_numbers_and_its_last_light():
    looped = StageDag(4, ((0, 1), (1, 2), (2, 3)), ((3, 2), (2, 1), (1, 0)), (0, 1, 0, 1), 2)
    figure = one_f_one_b(looped, 2).draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()][-3:] == [
        "first stage of a rank",
        "last",
        "residuals",
    ]
    inks = [text.get_color() for text in labels(figure)]
    assert (inks.count("white"), inks.count("black")) == (8, 8)
    brightness = {
        sum(boxes.get_facecolor()[0][:3]) for boxes in figure.axes[0].collections if len(boxes.get_paths()) == 2
    }
    assert len(brightness) == 4, "two kinds, two shades each"


def test_memory_is_drawn_in_bytes_where_sizes_are_known():
    """Rank 1's strip is a tenth as high as rank 0's at its peak."""
    costs = StageCosts((1, 1), (2, 2), residual_bytes=(10 * 2**20, 2 * 2**20))
    figure = one_f_one_b(StageDag.chain(2), 4, extra=0).draw(costs=costs)
    assert figure.axes[0].get_xlabel() == "time (s)"
    assert [text.get_text() for text in figure.axes[0].texts if "iB" in text.get_text()] == ["20.0 MiB", "2.0 MiB"]
    strips = [strip.get_paths()[0].get_extents() for strip in figure.axes[0].collections[-2:]]
    assert strips[1].height == pytest.approx(strips[0].height / 10)


def test_measured_times_are_drawn_as_they_are():
    timetable = gpipe(StageDag.chain(1), 1)
    run = Simulation.from_times(timetable, {Action("F", 0, 0): (5.0, 6.0), Action("B", 0, 0): (7.5, 9.0)})
    figure = run.draw()
    assert figure.axes[0].get_title(loc="left").endswith("1 micro-batch, makespan 4 (measured), bubble 37.5 %")
    forward, backward = (boxes.get_paths()[0].get_extents() for boxes in figure.axes[0].collections[:2])
    assert (forward.x0, forward.x1, backward.x0, backward.x1) == (0, 1, 2.5, 4)
