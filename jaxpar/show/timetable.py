"""A timetable as a picture (ranks down, time across) and as text for a terminal."""

import os
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpar.schedule.action import KINDS, Action
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.simulate import Mode, Simulation, simulate
from jaxpar.schedule.text import format_grid
from jaxpar.schedule.timetable import Timetable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"F": "#7fa9dd", "B": "#8cc98a", "I": "#7fd0cf", "W": "#e3cf6d", "U": "#b9b9b9"}
_MEANING = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward", "U": "update"}
_EDGE, _MEMORY = "#404040", "#c9b6d6"

# A rank's row is one unit high: the actions above, the in-flight strip below, a gap. The axis points down.
_BOX, _STRIP = (0.0, 0.54), (0.58, 0.3)  # top, height

_FONT, _SMALLEST_FONT = 7.0, 4.0  # points
_DIGIT = 0.64 / 72  # inches of a digit per point of font
_NARROWEST, _WIDEST = 7.0, 28.0  # inches of the time axis
_ROW = 0.5  # inches


def draw_timetable(
    timetable: Timetable,
    costs: StageCosts | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    mode: Mode = "executor",
) -> "Figure":
    """Draw each rank's actions over simulated time, coloured by kind and labelled with the micro-batch.

    Under each rank a thin strip shows its micro-batches in flight (memory), all ranks to one scale, with the peak at
    the right. A rank's second and later stages are paler. Labels that don't fit their box are left out.

    Args:
      timetable: a valid one.
      costs: seconds per micro-batch; by default F = 1 and B = 2 for all stages, transfers free.
      path: where to write it, an SVG or PNG by its suffix; None not to.
      mode: "executor" for lockstep ticks, "free" for ranks that run freely.

    Returns:
      the `matplotlib.figure.Figure`, made without pyplot.

    Raises:
      ImportError: matplotlib is not installed.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> figure = draw_timetable(one_f_one_b(StageDag.chain(4), 8))
    >>> figure.axes[0].get_title(loc="left")
    '1f1b: 4 ranks, 8 micro-batches, makespan 34 (executor), bubble 29.4 %'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_timetable needs matplotlib: pip install 'jaxpar[draw]'") from error
    simulation = simulate(timetable, costs or StageCosts.uniform(timetable.dag.num_stages), mode=mode)
    inches, font = _choose_scale(simulation)
    ranks = timetable.dag.num_ranks
    figure = Figure(figsize=(inches + 1.4, _ROW * ranks + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for rank in range(ranks):
        _draw_actions(axes, simulation, rank)
        _label_actions(axes, simulation, rank, inches, font)
        _draw_in_flight(axes, simulation, rank)
    _dress(axes, simulation, in_forwards=costs is None)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def render_timetable(timetable: Timetable, *, width: int | None = None) -> str:
    """Write a timetable for a terminal: ticks counted across, wrapped to `width`, peaks in flight at the end.

    Args:
      timetable: any.
      width: columns of text; those of the terminal by default.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> print(render_timetable(one_f_one_b(StageDag.chain(2), 3), width=40))
    1f1b: 2 ranks, 3 micro-batches, 10 ticks, exchange 2
    <BLANKLINE>
      tick |   0   1   2   3   4   5 ...
    rank 0 | 0F0 0F1 0F2  .   .  0B0 ...
    rank 1 |  .   .  1F0 1B0 1F1 1B1 ...
    <BLANKLINE>
      tick | ...   6   7 8   9
    rank 0 | ...  .  0B1 . 0B2
    rank 1 | ... 1F2 1B2 .  .
    <BLANKLINE>
    peak in flight: rank 0: 3, rank 1: 1
    """
    width = width or shutil.get_terminal_size().columns
    ranks, ticks = timetable.dag.num_ranks, timetable.num_ticks
    cell = 1 + max((len(str(action)) for cells in timetable.grid for action in cells if action), default=1)
    a_block = max(1, (width - len(f"rank {ranks - 1} | ... ...")) // cell)
    blocks = [
        format_grid(timetable.grid, ranks, ticks=range(first, min(first + a_block, ticks)))
        for first in range(0, ticks, a_block)
    ]
    head = f"{timetable.name}: {_count(timetable)}, {ticks} ticks, exchange {timetable.exchange}"
    peaks = "peak in flight: " + ", ".join(
        f"rank {rank}: {peak}" for rank, peak in enumerate(timetable.peak_in_flight_on_rank)
    )
    return "\n\n".join([head, *blocks, textwrap.fill(peaks, max(width, 20))])


def _count(timetable: Timetable) -> str:
    ranks, microbatches = timetable.dag.num_ranks, timetable.num_microbatches
    return f"{ranks} rank{'s' * (ranks > 1)}, {microbatches} micro-batch{'es' * (microbatches > 1)}"


def _choose_scale(simulation: Simulation) -> tuple[float, float]:
    """Inches of the time axis and points of the labels: the widest label fits the shortest action, within bounds."""
    durations = [simulation.end[action] - begin for action, begin in simulation.start.items()]
    shortest = min((d for d in durations if d > 0), default=1.0)
    digits = len(str(simulation.timetable.num_microbatches - 1))
    wanted = simulation.makespan / shortest * (digits + 1) * _DIGIT * _FONT
    inches = min(max(wanted, _NARROWEST), _WIDEST)
    return inches, max(_SMALLEST_FONT, _FONT * min(1.0, inches / wanted if wanted else 1.0))


def _draw_actions(axes: "Axes", simulation: Simulation, rank: int) -> None:
    """Boxes, one collection for each kind and stage."""
    stages = simulation.timetable.dag.stages_on(rank)
    boxes: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for action in simulation.timetable.order(rank):
        begin = simulation.start[action]
        boxes[action.kind, stages.index(action.stage)].append((begin, simulation.end[action] - begin))
    for (kind, chunk), spans in boxes.items():
        colour = _fade(_COLOURS[kind], chunk / len(stages))
        axes.broken_barh(
            spans, (rank + _BOX[0], _BOX[1]), facecolor=colour, edgecolor=_EDGE, linewidth=0.5, clip_on=False
        )


def _label_actions(axes: "Axes", simulation: Simulation, rank: int, inches: float, font: float) -> None:
    for action in simulation.timetable.order(rank):
        begin, end = simulation.start[action], simulation.end[action]
        label = "" if action.kind == "U" else str(action.microbatch)
        if end > begin and (end - begin) / simulation.makespan * inches > len(label) * _DIGIT * font:
            middle = rank + _BOX[0] + _BOX[1] / 2
            axes.text((begin + end) / 2, middle, label, fontsize=font, ha="center", va="center_baseline")


def _draw_in_flight(axes: "Axes", simulation: Simulation, rank: int) -> None:
    """The strip under a rank: a step up where an F starts, a step down where its B or W ends."""
    timetable = simulation.timetable
    peaks = timetable.peak_in_flight_on_rank
    times, held = [0.0], [0]
    for action, change in _memory_changes(timetable, timetable.order(rank)):
        times.append(simulation.start[action] if change > 0 else simulation.end[action])
        held.append(held[-1] + change)
    times.append(simulation.makespan)
    held.append(held[-1])
    floor = rank + sum(_STRIP)
    heights = [floor - _STRIP[1] * count / max(peaks) for count in held]
    axes.fill_between(times, heights, floor, step="post", facecolor=_MEMORY, edgecolor="none")
    axes.text(
        1.004, floor, f"{peaks[rank]} in flight", transform=axes.get_yaxis_transform(), fontsize=_FONT, va="bottom"
    )


def _memory_changes(timetable: Timetable, order: Sequence[Action]) -> list[tuple[Action, int]]:
    changes = []
    for action in order:
        if action.kind == "F":
            changes.append((action, 1))
        if action.kind in ("BW" if timetable.dag.has_backward else "F"):
            changes.append((action, -1))
    return changes


def _dress(axes: "Axes", simulation: Simulation, *, in_forwards: bool) -> None:
    """Title, legend, axes."""
    from matplotlib.patches import Patch

    timetable = simulation.timetable
    title = f"makespan {simulation.makespan:.4g} ({simulation.mode}), bubble {simulation.bubble_fraction:.1%}"
    axes.set_title(f"{timetable.name}: {_count(timetable)}, {title.replace('%', ' %')}", loc="left", fontsize=10)
    kinds = {action.kind for action in simulation.start}
    handles = [Patch(facecolor=_COLOURS[k], edgecolor=_EDGE, label=_MEANING[k]) for k in KINDS if k in kinds]
    handles.append(Patch(facecolor=_MEMORY, label="in flight"))
    axes.figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=_FONT, frameon=False)
    axes.set_xlim(0, simulation.makespan or 1)
    axes.set_ylim(timetable.dag.num_ranks, -0.1)
    axes.set_yticks([rank + _BOX[1] / 2 for rank in range(timetable.dag.num_ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(timetable.dag.num_ranks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("time (1 = a forward)" if in_forwards else "time (s)", fontsize=8, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _fade(colour: str, share: float) -> tuple[float, float, float]:
    """Mix a colour with white: 0 leaves it, 1 would be white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (channel + (1 - channel) * share for channel in to_rgb(colour))
    return red, green, blue
