"""The action tables that PyTorch's pipelining writes as CSV: one row a rank, one action a cell, empty where it idles.

What `_dump_csv` and `_load_csv` of `torch.distributed.pipelining.schedules` write and read, in their form of compute
actions only. Its cells are written as ours are. A pair that PyTorch overlaps, `(0F1;1B0)OVERLAP_F_B`, is here its
actions one after the other. Older tables write `B` for `I`: a B beside a W of its own is read as an I. Cells that say
when values travel or weights are gathered (`0SEND_F1`, `0UNSHARD`) are refused: the executor decides that itself.
"""

import csv
import io
import re
from collections.abc import Container, Iterator, Sequence

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.text import Grid

_PAIR = re.compile(r"\((?P<actions>[^()]*)\)OVERLAP_F_B")
_TRAFFIC = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")

Row = list[Action | None]


def write_csv(grid: Grid, num_ranks: int) -> str:
    """One line a rank, one cell a tick.

    >>> print(write_csv(((Action("F", 0, 0), None), (None, Action("F", 1, 0))), 2))
    0F0,
    ,1F0
    <BLANKLINE>
    """
    out = io.StringIO()
    rows = ([str(cells[rank] or "") for cells in grid] for rank in range(num_ranks))
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def read_csv(text: str, dag: StageDag) -> list[Row]:
    """The rows of ranks 0 ... R-1, which may differ in length; all cells that can't be read are reported at once.

    >>> read_csv("0F0,0B0\\n,(1F0;1B0)OVERLAP_F_B", StageDag.chain(2))
    [[0F0, 0B0], [None, 1F0, 1B0]]
    """
    lines = list(csv.reader(io.StringIO(text.rstrip("\r\n"))))
    problems: list[str] = []
    rows = [list(_read_row(line, rank, dag, problems)) for rank, line in enumerate(lines)]
    if problems:
        raise ScheduleError("can't read the action table:\n  " + "\n  ".join(problems))
    if len(rows) != dag.num_ranks:
        raise ScheduleError(f"the action table has {len(rows)} rows, but the stage graph is on {dag.num_ranks} ranks")
    split = {(action.stage, action.microbatch) for row in rows for action in row if action and action.kind == "W"}
    return [[_rename(action, split) for action in row] for row in rows]


def _rename(action: Action | None, split: Container[tuple[int, int]]) -> Action | None:
    """A B that is followed by a W of its own is an I."""
    if action and action.kind == "B" and (action.stage, action.microbatch) in split:
        return Action("I", action.stage, action.microbatch)
    return action


def _read_row(line: Sequence[str], rank: int, dag: StageDag, problems: list[str]) -> Iterator[Action | None]:
    for column, cell in enumerate(line):
        try:
            actions = _read_cell(cell.strip())
        except ScheduleError as error:
            problems.append(f"row {rank}, column {column}: {error}")
            continue
        for action in actions:
            if action is not None and action.stage >= dag.num_stages:
                stages = f"stages are 0 ... {dag.num_stages - 1}"
                problems.append(f"row {rank}, column {column}: {action}: no stage {action.stage}, {stages}")
        yield from actions


def _read_cell(cell: str) -> Row:
    if not cell:
        return [None]
    if pair := _PAIR.fullmatch(cell):
        return [Action.from_text(action.strip()) for action in pair["actions"].split(";")]
    if traffic := _TRAFFIC.fullmatch(cell):
        raise ScheduleError(f"{cell!r} has no place here ({traffic[1]}): write the table of compute actions only")
    return [Action.from_text(cell)]
