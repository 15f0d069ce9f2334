from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import FancyArrowPatch, Rectangle

from jaxpar.plan.plan_layout import lay_out
from tests.schedule.strategies import dags

from .strategies import plans
from .test_pipeline import diamond


@given(dags(), st.data())
@settings(deadline=None)
def test_boxes_stand_in_columns_by_depth_and_never_overlap(dag, data):
    heights = [data.draw(st.floats(0.5, 3)) for _ in range(dag.num_stages)]
    layout = lay_out(dag, heights, gap=0.25)
    boxes = [(c, m, h) for c, m, h in zip(layout.column, layout.middle, heights, strict=True)]
    boxes += [(c, m, 0.0) for bends in layout.bends.values() for c, m in bends]
    for (c, m, h), (other, n, g) in combinations(boxes, 2):
        assert c != other or abs(m - n) >= (h + g) / 2 + 0.25 - 1e-6
    assert all(m - h / 2 >= -1e-6 and m + h / 2 <= layout.height + 1e-6 for _, m, h in boxes)
    assert layout.column == tuple(max(dag.depth) - depth for depth in dag.depth)
    for a, b in dag.forward:
        assert [c for c, _ in layout.bends[a, b]] == list(range(layout.column[a] + 1, layout.column[b]))


def test_what_a_picture_shows(tmp_path):
    plan = replace(diamond(planner="hand"), num_microbatches=4)
    figure = plan.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    graph, timetable = figure.axes
    texts = [text.get_text() for text in graph.texts]
    for part in ("stage 3", "in", "a_0, a_1", "on 2,3", "F 4   B 8 s", "16 B", "120 B (12%), 2 in flight"):
        assert part in texts
    assert texts.count("16 B") == 4
    assert sum(isinstance(patch, FancyArrowPatch) for patch in graph.patches) == 4
    assert [label.get_text() for label in timetable.get_yticklabels()] == [
        "stage 0",
        "stage 1",
        "stage 2\n× 2",
        "stage 3",
    ]
    assert figure.texts[0].get_text() == "hand: 4 stages, depth 3, 5 devices, micro-batches of 2"


@pytest.mark.parametrize("stages", [4, 16])
def test_texts_stay_in_their_boxes(stages):
    from .test_predict import make_chain

    figure = make_chain(stages, 4).draw()
    figure.draw_without_rendering()
    graph = figure.axes[0]
    widest = max(patch.get_width() for patch in graph.patches if isinstance(patch, Rectangle))
    boxes = [p for p in graph.patches if isinstance(p, Rectangle) and p.get_width() == widest]
    assert len(boxes) == stages
    for text in graph.texts:
        if "MiB" in text.get_text() or "stage" in text.get_text() or "ms" in text.get_text():
            extent = text.get_window_extent()
            assert any(
                box.get_window_extent().x0 <= extent.x0 and extent.x1 <= box.get_window_extent().x1 for box in boxes
            ), text.get_text()


@given(plans(max_ops=5))
@settings(max_examples=10, deadline=None)
def test_any_plan_can_be_drawn(plan):
    figure = replace(plan, num_microbatches=min(plan.num_microbatches, 3)).draw(mode="free")
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
