"""A simulated or measured run as a picture: ranks down, time across, memory under each rank.

The look is that of the papers: boxes with the micro-batch's number, a colour for each kind of work, and where a rank
has several stages, dark boxes with white numbers for the first and light ones for the last.
"""

import os
from collections import defaultdict
from typing import TYPE_CHECKING

from jaxpar.schedule.action import KINDS, Action
from jaxpar.schedule.simulation import Simulation
from jaxpar.schedule.terminal import count_ranks
from jaxpar.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

Colour = tuple[float, float, float]

COLOURS = {"F": "#739fe2", "B": "#86c985", "I": "#5ac9bd", "W": "#c3da58", "U": "#b9b9b9"}
_MEANING = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward", "U": "update"}
EDGE, MEMORY = "#404040", "#d0c3da"

# A rank's row is one unit high: the actions above, the memory strip below, a gap. The axis points down.
_BOX, _STRIP = (0.0, 0.54), (0.58, 0.3)  # top, height

_FONT, _SMALLEST_FONT = 7.0, 4.0  # points
_DIGIT = 0.64 / 72  # inches of a digit per point of font
_NARROWEST, _WIDEST = 7.0, 28.0  # inches of the time axis
ROW = 0.5  # inches


def draw_simulation(run: Simulation, path: str | os.PathLike[str] | None = None, *, unit: str = "s") -> "Figure":
    """What `Simulation.draw` does. Labels that don't fit their box are left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a timetable needs matplotlib: pip install 'jaxpar[draw]'") from error
    inches, font = choose_scale(run)
    figure = Figure(figsize=(inches + 1.4, ROW * run.timetable.dag.num_ranks + 1.1), layout="constrained")
    handles = fill_axes(figure.add_subplot(), run, inches, font, unit)
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=_FONT, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def fill_axes(axes: "Axes", run: Simulation, inches: float, font: float, unit: str) -> "list[Patch]":
    """Draw a run on axes that are `inches` wide and have `ROW` inches for each rank; returns what a legend shows."""
    for rank in range(run.timetable.dag.num_ranks):
        _draw_actions(axes, run, rank, inches, font)
    _draw_memory(axes, run)
    return _dress(axes, run, unit)


def choose_scale(simulation: Simulation, widest: float = _WIDEST) -> tuple[float, float]:
    """Inches of the time axis and points of the labels: the widest label fits the shortest action, within bounds."""
    durations = [simulation.end[action] - begin for action, begin in simulation.start.items()]
    shortest = min((d for d in durations if d > 0), default=1.0)
    digits = len(str(simulation.timetable.num_microbatches - 1))
    wanted = simulation.makespan / shortest * (digits + 1) * _DIGIT * _FONT
    inches = min(max(wanted, _NARROWEST), widest)
    return inches, max(_SMALLEST_FONT, _FONT * min(1.0, inches / wanted if wanted else 1.0))


def _draw_actions(axes: "Axes", simulation: Simulation, rank: int, inches: float, font: float) -> None:
    """Boxes, one collection for each kind and stage, and the labels that fit."""
    stages = simulation.timetable.dag.stages_on(rank)
    boxes: dict[tuple[str, int], list[Action]] = defaultdict(list)
    for action in simulation.timetable.order(rank):
        boxes[action.kind, stages.index(action.stage)].append(action)
    for (kind, chunk), actions in boxes.items():
        colour = _shade(COLOURS[kind], chunk, len(stages))
        spans = [(simulation.start[a], simulation.end[a] - simulation.start[a]) for a in actions]
        axes.broken_barh(
            spans, (rank + _BOX[0], _BOX[1]), facecolor=colour, edgecolor=EDGE, linewidth=0.5, clip_on=False
        )
        ink = "white" if _is_dark(colour) else "black"
        for action, (begin, duration) in zip(actions, spans, strict=True):
            label = "" if kind == "U" else str(action.microbatch)
            if duration and duration / simulation.makespan * inches > len(label) * _DIGIT * font:
                place = begin + duration / 2, rank + _BOX[0] + _BOX[1] / 2
                axes.text(*place, label, fontsize=font, ha="center", va="center_baseline", color=ink)


def _draw_memory(axes: "Axes", simulation: Simulation) -> None:
    """The strip under each rank: a step up where residuals come, a step down where they are freed."""
    in_bytes = simulation.costs is not None and bool(simulation.costs.residual_bytes)
    ranks = range(simulation.timetable.dag.num_ranks)
    curves = [simulation.memory_curve(rank) if in_bytes else simulation.in_flight_curve(rank) for rank in ranks]
    peaks = [max(held for _, held in curve) for curve in curves]
    for rank, (curve, peak) in enumerate(zip(curves, peaks, strict=True)):
        floor = rank + sum(_STRIP)
        times = [*(time for time, _ in curve), simulation.makespan]
        heights = [floor - _STRIP[1] * held / (max(peaks) or 1) for _, held in (*curve, curve[-1])]
        axes.fill_between(times, heights, floor, step="post", facecolor=MEMORY, edgecolor="none")
        label = format_bytes(peak) if in_bytes else f"{peak:.0f} in flight"
        axes.text(1.004, floor, label, transform=axes.get_yaxis_transform(), fontsize=_FONT, va="bottom")


def _dress(axes: "Axes", simulation: Simulation, unit: str) -> "list[Patch]":
    """Title and axes, and what the legend shows."""
    from matplotlib.patches import Patch

    timetable = simulation.timetable
    title = f"makespan {simulation.makespan:.4g} ({simulation.mode}), bubble {simulation.bubble_fraction:.1%}"
    axes.set_title(f"{timetable.name}: {count_ranks(timetable)}, {title.replace('%', ' %')}", loc="left", fontsize=10)
    kinds = {action.kind for action in simulation.start}
    handles = [Patch(facecolor=COLOURS[k], edgecolor=EDGE, label=_MEANING[k]) for k in KINDS if k in kinds]
    chunks = max(len(timetable.dag.stages_on(rank)) for rank in range(timetable.dag.num_ranks))
    if chunks > 1:
        for chunk, name in ((0, "first stage of a rank"), (chunks - 1, "last")):
            handles.append(Patch(facecolor=_shade(COLOURS["U"], chunk, chunks), edgecolor=EDGE, label=name))
    handles.append(Patch(facecolor=MEMORY, label="residuals"))
    axes.set_xlim(0, simulation.makespan or 1)
    axes.set_ylim(timetable.dag.num_ranks, -0.1)
    axes.set_yticks([rank + _BOX[1] / 2 for rank in range(timetable.dag.num_ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(timetable.dag.num_ranks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"time ({unit})", fontsize=8, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return handles


def _shade(colour: str, chunk: int, chunks: int) -> Colour:
    """The plain colour of a rank's only stage; from dark for the first of several to light for the last."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    if chunks == 1:
        return red, green, blue
    share = chunk / (chunks - 1)  # 0 is dark, 1 is pale
    return _between(red, share), _between(green, share), _between(blue, share)


def _between(channel: float, share: float) -> float:
    return (1 - share) * 0.62 * channel + share * (channel + 0.38 * (1 - channel))


def _is_dark(colour: Colour) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
