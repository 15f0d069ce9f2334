"""A plan as a picture: its stages as a graph, and under it the timetable that they run by.

Stages stand in columns by their depth, since depth is what decides how many micro-batches are in flight. A box is as
tall as its stage is wide: its left edge has a cell for each device. In the box are the operators, the time of F and B
as bars against the slowest stage, and the memory against the device's.
"""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jaxpar.plan.op_names import describe_ops
from jaxpar.plan.plan_layout import Layout, lay_out
from jaxpar.plan.plan_text import format_ranges
from jaxpar.plan.predict import stage_memory
from jaxpar.schedule.picture import COLOURS, EDGE, MEMORY, ROW, choose_scale, fill_axes
from jaxpar.schedule.simulate import Mode
from jaxpar.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxpar.plan.pipeline import PipelinePlan

# Inches.
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 0.75, 0.85, 0.55, 0.75, 0.65
_USUAL = 15.0  # the width that all is fitted into if it can be
_LINE, _BAR, _PAD = 0.135, 0.07, 0.07
_CELL = 0.1  # the strip of devices
_MOST_CELLS, _PER_DOUBLING = 32, 0.22
_BOX_WIDTHS, _GAP_WIDTHS = (1.05, 2.0), (0.5, 1.1)  # least, most
_FONT = 7.0
_PAPER, _FAINT = "#fbfaf7", "#8a8a8a"


def draw_plan(plan: PipelinePlan, path: str | os.PathLike[str] | None = None, *, mode: Mode = "executor") -> Figure:
    """Draw the stage graph with operators, devices, costs and bytes, and under it the timetable.

    Args:
      plan: what to draw.
      path: where to write it, an SVG or PNG by its suffix; None not to.
      mode: how to simulate the timetable: "executor", "free" or "blocking".

    Returns:
      the `matplotlib.figure.Figure`, made without pyplot.

    Raises:
      ImportError: matplotlib is not installed.

    >>> from jaxpar.plan import ClusterSpec, Op, OpGraph, PlannedStage, PipelinePlan
    >>> graph = OpGraph.build([Op("a", 1.0, 1.0, 1.0), Op("b", 1.0, 1.0, 1.0)], [("a", "b")])
    >>> stages = PlannedStage((0,), (0,)), PlannedStage((1,), (1,))
    >>> figure = draw_plan(PipelinePlan(graph, ClusterSpec.preset("cpu", 2), stages, 1, 4))
    >>> [axes.get_title(loc="left") for axes in figure.axes][1]
    '1f1b: 2 ranks, 4 micro-batches, makespan 15 (executor), bubble 20.0 %'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a plan needs matplotlib: pip install 'jaxpar[draw]'") from error
    run = plan.simulate(mode)
    sizes = _Sizes.choose(plan)
    heights = [_box_height(plan, s, sizes) for s in range(len(plan.stages))]
    layout = lay_out(plan.dag, heights, gap=0.28)
    inches, font = choose_scale(run, widest=max(_USUAL, sizes.graph_width(layout)))
    inches = max(inches, sizes.graph_width(layout))
    rows = ROW * plan.dag.num_ranks
    width, height = _LEFT + inches + _RIGHT, _TOP + layout.height + _BETWEEN + rows + _BOTTOM
    figure = Figure(figsize=(width, height))
    graph_axes = figure.add_axes(
        (_LEFT / width, 1 - (_TOP + layout.height) / height, inches / width, layout.height / height)
    )
    _draw_graph(graph_axes, plan, layout, heights, sizes, inches)
    time_axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inches / width, rows / height))
    handles = fill_axes(time_axes, run, inches, max(font, _FONT - 1), "s")
    _name_ranks(time_axes, plan)
    figure.legend(
        handles=handles, loc="lower right", ncols=len(handles), fontsize=_FONT, frameon=False, bbox_to_anchor=(1.0, 0.0)
    )
    _write_title(figure, plan, mode, _LEFT / width, 1 - 0.12 / height)
    note = "bars: F and B of a micro-batch against the slowest stage; memory against the device's"
    figure.text(_LEFT / width, 0.12 / height, note, fontsize=_FONT, va="bottom", color=_FAINT)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


@dataclass(frozen=True)
class _Sizes:
    """Inches of a box and of the gap between columns, and points of text."""

    box: float
    gap: float
    font: float

    @classmethod
    def choose(cls, plan: PipelinePlan) -> _Sizes:
        """As wide as text wants, narrower for so many columns that the picture would be too wide to read."""
        columns = max(plan.depth)
        each = min(max(_USUAL, columns * (_BOX_WIDTHS[0] + _GAP_WIDTHS[0])) / columns, _BOX_WIDTHS[1] + _GAP_WIDTHS[1])
        box = min(max(each - _GAP_WIDTHS[0], _BOX_WIDTHS[0]), _BOX_WIDTHS[1])
        return cls(box, each - box, _FONT if box > 1.3 else _FONT - 1)

    def graph_width(self, layout: Layout) -> float:
        return layout.num_columns * (self.box + self.gap) - self.gap

    @property
    def characters(self) -> int:
        """That fit a line of a box."""
        return int((self.box - _CELL - 2 * _PAD) / (0.53 * self.font / 72))


def _box_lines(plan: PipelinePlan, s: int, sizes: _Sizes) -> tuple[list[str], list[str]]:
    """The operators, then the figures of a stage."""
    stage, (forward, for_inputs, for_weights) = plan.stages[s], plan.stage_times[s]
    names = textwrap.wrap(describe_ops(plan.graph, stage.ops), sizes.characters, break_long_words=True)
    names = names if len(names) <= 3 else [*names[:2], names[2][: sizes.characters - 2] + " …"]
    scale, unit = (1e3, "ms") if max(forward, for_inputs + for_weights) < 1 else (1.0, "s")
    figures = [f"F {forward * scale:.3g}   B {(for_inputs + for_weights) * scale:.3g} {unit}"]
    memory = stage_memory(plan, s, plan.in_flight[s])
    most = min(plan.cluster.devices[d].memory_bytes for d in stage.devices)
    texts = [f"{format_bytes(memory)} ({memory / most:.0%}),", f"{plan.in_flight[s]} in flight"]
    figures += [" ".join(texts)] if len(" ".join(texts)) <= sizes.characters + 2 else texts
    return names, [*figures, *(["recomputes"] if stage.recompute else [])]


def _box_height(plan: PipelinePlan, s: int, sizes: _Sizes) -> float:
    """As tall as its text needs, and taller each time that its replicas double."""
    names, figures = _box_lines(plan, s, sizes)
    lines = 1 + len(names) + len(figures)
    return lines * _LINE + 2 * _BAR + 3 * _PAD + _PER_DOUBLING * math.log2(len(plan.stages[s].devices))


def _draw_graph(
    axes: Axes, plan: PipelinePlan, layout: Layout, heights: list[float], sizes: _Sizes, inches: float
) -> None:
    axes.set_xlim(0, inches)
    axes.set_ylim(layout.height, 0)
    axes.set_axis_off()
    start = (inches - sizes.graph_width(layout)) / 2
    left = [start + (sizes.box + sizes.gap) * column for column in layout.column]
    _draw_edges(axes, plan, layout, heights, left, start, sizes)
    for s, height in enumerate(heights):
        _draw_box(axes, plan, s, (left[s], layout.middle[s] - height / 2), height, sizes)


def _draw_box(
    axes: Axes, plan: PipelinePlan, s: int, corner: tuple[float, float], height: float, sizes: _Sizes
) -> None:
    from matplotlib.patches import Rectangle

    stage, (x, y) = plan.stages[s], corner
    axes.add_patch(Rectangle(corner, sizes.box, height, facecolor=_PAPER, edgecolor=EDGE, linewidth=0.8, clip_on=False))
    cells = min(len(stage.devices), _MOST_CELLS)
    for cell in range(cells):
        place = x, y + cell * height / cells
        axes.add_patch(
            Rectangle(place, _CELL, height / cells, facecolor="#e3ded2", edgecolor=EDGE, linewidth=0.5, clip_on=False)
        )
    inside, right = x + _CELL + _PAD, x + sizes.box - _PAD
    devices = format_ranges(stage.devices)
    devices = f"on {devices}" if len(devices) <= 7 else devices if len(devices) <= 11 else f"× {len(stage.devices)}"
    devices = devices.removeprefix("on ") if len(devices) + 9 > sizes.characters else devices
    names, figures = _box_lines(plan, s, sizes)
    line = y + _PAD + _LINE / 2
    text: dict[str, Any] = {"fontsize": sizes.font, "va": "center", "clip_on": False}
    axes.text(inside, line, f"stage {s}", weight="bold", **text)
    axes.text(right, line, devices, ha="right", color=_FAINT, **text)
    for name in names:
        line += _LINE
        axes.text(inside, line, name, **text)
    _draw_bars(axes, plan, s, (inside, line + _LINE / 2 + _PAD / 2), right - inside)
    line += 2 * _BAR + _PAD
    for figure in figures:
        line += _LINE
        axes.text(inside, line, figure, color="#404040", **{**text, "fontsize": sizes.font - 0.5})


def _draw_bars(axes: Axes, plan: PipelinePlan, s: int, corner: tuple[float, float], width: float) -> None:
    """F and B of a micro-batch against those of the slowest stage, and memory against the device's."""
    from matplotlib.patches import Rectangle

    (x, y), stage = corner, plan.stages[s]
    slowest = max(map(sum, plan.stage_times)) or 1.0
    forward, backward = plan.stage_times[s][0] / slowest, sum(plan.stage_times[s][1:]) / slowest
    most = min(plan.cluster.devices[d].memory_bytes for d in stage.devices)
    memory = min(stage_memory(plan, s, plan.in_flight[s]) / most, 1.0)
    bars = [(0.0, 0.0, forward, COLOURS["F"]), (forward, 0.0, backward, COLOURS["B"]), (0.0, _BAR, memory, MEMORY)]
    for top in (0.0, _BAR):
        axes.add_patch(Rectangle((x, y + top), width, _BAR, facecolor="white", edgecolor="none", clip_on=False))
    for begin, top, share, colour in bars:
        place = x + begin * width, y + top
        axes.add_patch(Rectangle(place, share * width, _BAR, facecolor=colour, edgecolor="none", clip_on=False))
    axes.add_patch(Rectangle((x, y), width, 2 * _BAR, fill=False, edgecolor=_FAINT, linewidth=0.4, clip_on=False))


def _draw_edges(
    axes: Axes,
    plan: PipelinePlan,
    layout: Layout,
    heights: list[float],
    left: list[float],
    start: float,
    sizes: _Sizes,
) -> None:
    """Curves from the right of a box to the left of another, through the places of the columns between.

    Where a stage of a chain waits for another and receives nothing from it, the curve is dotted.
    """
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    leaves, enters = _spread_ends(plan, layout, heights)
    most = max(plan.edges.values(), default=0.0) or 1.0
    for edge, size in plan.waits.items():
        a, b = edge
        points = [(left[a] + sizes.box, leaves[edge])]
        for column, middle in layout.bends[edge]:
            x = start + (sizes.box + sizes.gap) * column
            points += [(x, middle), (x + sizes.box, middle)]
        points.append((left[b], enters[edge]))
        vertices, codes = [points[0]], [Path.MOVETO]
        for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
            if i % 2:
                vertices.append((x1, y1))
                codes.append(Path.LINETO)
            else:
                half = (x0 + x1) / 2
                vertices += [(half, y0), (half, y1), (x1, y1)]
                codes += [Path.CURVE4] * 3
        sends = edge in plan.edges
        arrow = FancyArrowPatch(
            path=Path(vertices, codes),
            arrowstyle="-|>",
            mutation_scale=7,
            color="#606060" if sends else _FAINT,
            linewidth=0.7 + 1.3 * size / most,
            linestyle="-" if sends else ":",
            clip_on=False,
        )
        axes.add_patch(arrow)
        if not sends:
            continue
        (x0, y0), (x1, y1) = points[-2:]
        label = format_bytes(size * plan.microbatch)
        box = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}
        place = (x0 + x1) / 2, (y0 + y1) / 2
        axes.text(*place, label, fontsize=sizes.font - 1, ha="center", va="center", color="#404040", bbox=box)


def _spread_ends(
    plan: PipelinePlan, layout: Layout, heights: list[float]
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """Where edges leave and enter boxes: side by side, in the order of where they go to or come from."""
    leaves: dict[tuple[int, int], float] = {}
    enters: dict[tuple[int, int], float] = {}
    for s, height in enumerate(heights):
        for ends, edges in (
            (leaves, [edge for edge in plan.waits if edge[0] == s]),
            (enters, [edge for edge in plan.waits if edge[1] == s]),
        ):
            away = 1 if ends is leaves else 0
            near = [
                (layout.bends[edge][0 if away else -1][1] if layout.bends[edge] else layout.middle[edge[away]], edge)
                for edge in edges
            ]
            step = min(0.22, 0.8 * height / max(len(edges), 1))
            for k, (_, edge) in enumerate(sorted(near)):
                ends[edge] = layout.middle[s] + (k - (len(edges) - 1) / 2) * step
    return leaves, enters


def _name_ranks(axes: Axes, plan: PipelinePlan) -> None:
    labels = []
    for rank, devices in enumerate(plan.rank_devices):
        stages = [str(s) for s, r in enumerate(plan.rank_of) if r == rank]
        name = f"stage{'s' * (len(stages) > 1)} {', '.join(stages)}"
        labels.append(name + (f"\n× {len(devices)}" if len(devices) > 1 else ""))
    axes.set_yticklabels(labels, fontsize=8)


def _write_title(figure: Figure, plan: PipelinePlan, mode: Mode, x: float, y: float) -> None:
    found = plan.predict(mode)
    used = len({d for devices in plan.rank_devices for d in devices})
    name = f"{plan.planner}: " if plan.planner else ""
    stages = "1 stage" if len(plan.stages) == 1 else f"{len(plan.stages)} stages, depth {max(plan.depth)}"
    text = f"{name}{stages}, {used} devices, micro-batches of {plan.microbatch}"
    cost = f"{found.step_seconds:.4g} s a step, {found.throughput:.4g} examples/s"
    rest = found.reduce_seconds + found.update_seconds
    cost += f" ({found.makespan:.4g} s of timetable, {rest:.3g} s for gradients and update)"
    figure.text(x, y, text, fontsize=11, weight="bold", va="top")
    figure.text(x, y - 0.2 / figure.get_figheight(), cost, fontsize=8, va="top", color="#404040")
