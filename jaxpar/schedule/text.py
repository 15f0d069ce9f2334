"""The text form of a grid of actions: one row a rank, one aligned column a tick, `.` where a rank is idle.

rank 0 | 0F0 0F1  .   .  0B0 0B1
rank 1 |  .   .  1F0 ...
"""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action

Grid = tuple[tuple[Action | None, ...], ...]  # grid[tick][rank]

IDLE = "."
_ROW = re.compile(r"rank (\d+) \|(.*)")


def format_grid(
    grid: Grid, num_ranks: int, *, ticks: Sequence[int] | None = None, marked: Collection[tuple[int, int]] = ()
) -> str:
    """Write a grid; cells `(tick, rank)` in `marked` stand in brackets.

    Args:
      grid: `grid[tick][rank]`.
      num_ranks: R, the number of rows.
      ticks: the ticks to write, with a first row that counts them, and `...` where some are left out; all by default,
        without that row.
      marked: cells to put in brackets.

    >>> print(format_grid(((Action("F", 0, 0), None), (None, Action("F", 1, 0))), 2, marked={(1, 1)}))
    rank 0 | 0F0   .
    rank 1 |  .  [1F0]
    """
    shown = range(len(grid)) if ticks is None else ticks
    columns = [[f"rank {rank} |" for rank in range(num_ranks)]]
    heads = ["tick |"]
    for previous, tick in pairwise([-1, *shown]):
        if tick != previous + 1:
            columns.append(["..."] * num_ranks)
            heads.append("...")
        columns.append([_format_cell(grid[tick][rank], (tick, rank) in marked) for rank in range(num_ranks)])
        heads.append(str(tick))
    if shown and shown[-1] != len(grid) - 1:
        columns.append(["..."] * num_ranks)
        heads.append("...")
    if ticks is not None:
        columns = [[head, *column] for head, column in zip(heads, columns, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join(" ".join(map(_align, row, widths)).rstrip() for row in rows)


def parse_grid(lines: Sequence[str], num_ranks: int) -> Grid:
    """Read what `format_grid` wrote (whole and unmarked); all bad cells are reported at once.

    >>> parse_grid(["rank 0 | 0F0 .", "rank 1 | . 1F0"], num_ranks=2)
    ((0F0, None), (None, 1F0))
    """
    problems: list[str] = []
    rows: list[list[Action | None]] = []
    for line in lines:
        match = _ROW.fullmatch(line.strip())
        if match is None or int(match[1]) != len(rows):
            row = f"rank {len(rows)}"
            raise ScheduleError(f"expected the row of {row}, written '{row} | 0F0 . ...', got:\n  {line}")
        rows.append(_parse_row(line, problems))
    if problems:
        raise ScheduleError("can't read the timetable:\n" + "\n".join(problems))
    if len(rows) != num_ranks:
        raise ScheduleError(f"the text has rows for {len(rows)} ranks, but the stage graph is on {num_ranks}")
    if len({len(row) for row in rows}) > 1:
        counts = ", ".join(f"rank {rank}: {len(row)}" for rank, row in enumerate(rows))
        raise ScheduleError(f"rows differ in their number of ticks ({counts}): write '{IDLE}' where a rank is idle")
    return tuple(zip(*rows, strict=True))


def _parse_row(line: str, problems: list[str]) -> list[Action | None]:
    start = line.index("|") + 1
    cells: list[Action | None] = []
    for match in re.finditer(r"\S+", line[start:]):
        try:
            cells.append(None if match[0] == IDLE else Action.from_text(match[0]))
        except ScheduleError as error:
            marks = " " * (start + match.start()) + "^" * len(match[0])
            problems.append(f"  {line}\n  {marks} {error}")
    return cells


def _format_cell(action: Action | None, marked: bool) -> str:
    text = IDLE if action is None else str(action)
    return f"[{text}]" if marked else text


def _align(cell: str, width: int) -> str:
    return cell.center(width) if cell in (IDLE, f"[{IDLE}]") else cell.rjust(width)
