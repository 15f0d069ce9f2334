"""A timetable as text for a terminal: ranks down, ticks across, kinds of action in colour."""

import os
import re
import shutil
import sys
import textwrap

from jaxpar.schedule.action import KINDS
from jaxpar.schedule.text import format_grid
from jaxpar.schedule.timetable import Timetable

_ANSI = {"F": 34, "B": 32, "I": 36, "W": 33, "U": 35}  # foreground colours
_ACTION = re.compile(rf"\b\d+([{''.join(KINDS)}])\d+\b")


def render_timetable(
    timetable: Timetable, *, width: int | None = None, colour: bool | None = None, memory: bool = False
) -> str:
    """What `Timetable.render` gives."""
    width = width or shutil.get_terminal_size().columns
    ranks, ticks = timetable.dag.num_ranks, timetable.num_ticks
    cell = 1 + max((len(str(action)) for cells in timetable.grid for action in cells if action), default=1)
    a_block = max(1, (width - len(f"rank {ranks - 1} | ... ...")) // cell)
    blocks = [
        format_grid(timetable.grid, ranks, ticks=range(first, min(first + a_block, ticks)))
        for first in range(0, ticks, a_block)
    ]
    if memory:
        blocks = [_add_memory(block, timetable) for block in blocks]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") if colour is None else colour:
        blocks = [_ACTION.sub(_paint, block) for block in blocks]
    head = f"{timetable.name}: {count_ranks(timetable)}, {ticks} ticks, exchange {timetable.exchange}"
    peaks = "peak in flight: " + ", ".join(
        f"rank {rank}: {peak}" for rank, peak in enumerate(timetable.peak_in_flight_on_rank)
    )
    return "\n\n".join([head, *blocks, textwrap.fill(peaks, max(width, 20))])


def count_ranks(timetable: Timetable) -> str:
    """
    >>> from jaxpar.schedule import StageDag, gpipe
    >>> count_ranks(gpipe(StageDag.chain(1), 2))
    '1 rank, 2 micro-batches'
    """
    ranks, microbatches = timetable.dag.num_ranks, timetable.num_microbatches
    return f"{ranks} rank{'s' * (ranks > 1)}, {microbatches} micro-batch{'es' * (microbatches > 1)}"


def _add_memory(block: str, timetable: Timetable) -> str:
    """Under each rank's row, the micro-batches in flight, right below the ticks of the first line."""
    head, *rows = block.splitlines()
    ends = [(int(match[0]), match.end()) for match in re.finditer(r"\d+", head)]
    lines = [head]
    for rank, row in enumerate(rows):
        stages = [timetable.in_flight(stage) for stage in timetable.dag.stages_on(rank)]
        line = "held |".rjust(row.index("|") + 1)
        for tick, end in ends:
            line += str(sum(held[tick] for held in stages)).rjust(end - len(line))
        lines += [row, line]
    return "\n".join(lines)


def _paint(match: re.Match[str]) -> str:
    return f"\x1b[{_ANSI[match[1]]}m{match[0]}\x1b[0m"
