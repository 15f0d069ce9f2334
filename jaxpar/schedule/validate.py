"""Does a timetable do everything once, in its place, and after what it needs?"""

from collections.abc import Iterator, Sequence

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.needs import find_needs
from jaxpar.schedule.text import format_grid
from jaxpar.schedule.timetable import Timetable

Cell = tuple[int, int]  # (tick, rank)
Failure = tuple[str, tuple[Cell, ...]]

_MOST_LISTED = 20
_WHOLE_GRID = 24  # ticks; a longer grid is shown around its bad cells only
_AROUND = 3


def validate_timetable(timetable: Timetable, *, max_in_flight: Sequence[int] | None = None) -> Timetable:
    """Check a timetable against its stage graph and return it.

    With `t(a)` the tick of an action and `lag` the exchange between ranks, for each stage s and micro-batch m:

        F(s, m) once;  B(s, m) once, or I(s, m) and W(s, m) once each     no backward at all in a forward-only step
        each action on rank rank_of[s]
        t(F(s, m)) >= t(F(p, m)) + lag(p, s)             forward edges (p, s)
        t(B(s, m)) >= t(F(s, m)) + 1                     I likewise
        t(B(s, m)) >= t(B(p, m)) + lag(p, s)             backward edges (p, s); I likewise on either side
        t(W(s, m)) >= t(I(s, m)) + 1
        t(U(s))    >= t(a) + 1                           every other action a of stage s; U is optional, and written sU0

    Args:
      timetable: what to check.
      max_in_flight: for each stage, the most micro-batches that it may hold at once.

    Raises:
      ScheduleError: lists all failures, and shows the grid with the bad cells in brackets.

    >>> from jaxpar.schedule import StageDag, one_f_one_b
    >>> validate_timetable(one_f_one_b(StageDag.chain(4), 8, extra=0), max_in_flight=(4, 3, 2, 1)).num_ticks
    38
    """
    if max_in_flight is not None and len(max_in_flight) != timetable.dag.num_stages:
        raise ScheduleError(
            f"max_in_flight has {len(max_in_flight)} entries, but there are {timetable.dag.num_stages} stages"
        )
    known, failures = _place_actions(timetable)
    failures += _find_missing(timetable, known)
    failures += _find_early(timetable, known)
    failures += _find_crowded(timetable, max_in_flight)
    if failures:
        raise ScheduleError(_explain(timetable, failures))
    return timetable


def _place_actions(timetable: Timetable) -> tuple[dict[Action, Cell], list[Failure]]:
    """Where each action is done, and the cells that hold what they should not."""
    dag = timetable.dag
    known: dict[Action, Cell] = {}
    failures: list[Failure] = []
    for tick, cells in enumerate(timetable.grid):
        for rank, action in enumerate(cells):
            if action is None:
                continue
            cell = (tick, rank)
            if wrong := _find_stranger(timetable, action):
                failures.append((wrong, (cell,)))
                continue
            if rank != (home := dag.rank_of[action.stage]):
                text = f"{action} is on rank {rank}, but stage {action.stage} lives on rank {home}"
                failures.append((text, (cell,)))
            first = known.setdefault(action, cell)
            if first != cell:
                failures.append((f"{action} is done twice, in ticks {first[0]} and {tick}", (first, cell)))
    return known, failures


def _find_stranger(timetable: Timetable, action: Action) -> str:
    """Why this timetable can't hold the action at all; empty if it can."""
    dag, count = timetable.dag, 1 if action.kind == "U" else timetable.num_microbatches
    if not 0 <= action.stage < dag.num_stages:
        return f"{action}: no stage {action.stage}, stages are 0 ... {dag.num_stages - 1}"
    if not 0 <= action.microbatch < count:
        return f"{action}: no micro-batch {action.microbatch}, those of {action.kind} are 0 ... {count - 1}"
    if action.kind in "BIW" and not dag.has_backward:
        return f"{action}: a backward in a forward-only step"
    return ""


def _find_missing(timetable: Timetable, known: dict[Action, Cell]) -> Iterator[Failure]:
    dag = timetable.dag
    for stage in range(dag.num_stages):
        for m in range(timetable.num_microbatches):
            if Action("F", stage, m) not in known:
                yield f"{stage}F{m} is never done", ()
            whole, split = Action("B", stage, m), (Action("I", stage, m), Action("W", stage, m))
            halves = [half for half in split if half in known]
            if not dag.has_backward:
                continue
            if whole in known and halves:
                cells = tuple(known[action] for action in (whole, *halves))
                yield f"{whole} is done, and so is {' and '.join(map(str, halves))}: split a backward or don't", cells
            elif whole not in known and not halves:
                yield f"{whole} is never done (nor {split[0]} and {split[1]})", ()
            elif len(halves) == 1:
                other = split[1] if halves[0] == split[0] else split[0]
                yield f"{halves[0]} is done, but {other} never is", (known[halves[0]],)


def _find_early(timetable: Timetable, known: dict[Action, Cell]) -> Iterator[Failure]:
    """Actions that come before something they need has arrived."""
    for action, cell in known.items():
        for need, lag in _needs(timetable, action, known):
            earliest = known[need][0] + lag
            if cell[0] < earliest:
                text = f"{action} in tick {cell[0]} needs {need}, which is there from tick {earliest}"
                yield text, (cell, known[need])


def _needs(timetable: Timetable, action: Action, known: dict[Action, Cell]) -> Iterator[tuple[Action, int]]:
    """The actions of `known` that `action` waits for, and the ticks from each to the first in which it may be done."""
    needs = find_needs(timetable.dag, action, known)
    if action.kind == "U":
        needs = (other for other in known if other.stage == action.stage and other != action)
    return ((need, timetable.lag(need.stage, action.stage)) for need in needs)


def _find_crowded(timetable: Timetable, max_in_flight: Sequence[int] | None) -> Iterator[Failure]:
    for stage, most in enumerate(max_in_flight or ()):
        counts = timetable.in_flight(stage)
        if counts and max(counts) > most:
            first = next(tick for tick, count in enumerate(counts) if count > most)
            text = f"stage {stage} holds {max(counts)} micro-batches in flight, first over its {most} in tick {first}"
            yield text, ((first, timetable.dag.rank_of[stage]),)


def _explain(timetable: Timetable, failures: Sequence[Failure]) -> str:
    listed = [f"  {text}" for text, _ in failures[:_MOST_LISTED]]
    if len(failures) > _MOST_LISTED:
        listed.append(f"  ... and {len(failures) - _MOST_LISTED} more")
    marked = {cell for _, cells in failures[:_MOST_LISTED] for cell in cells}
    ticks = list(range(timetable.num_ticks))
    if timetable.num_ticks > _WHOLE_GRID:
        near = {t for tick, _ in marked for t in range(tick - _AROUND, tick + _AROUND + 1)} or set(range(_WHOLE_GRID))
        ticks = [t for t in ticks if t in near]
    shown = format_grid(timetable.grid, timetable.dag.num_ranks, ticks=ticks, marked=marked)
    count = "1 failure" if len(failures) == 1 else f"{len(failures)} failures"
    sizes = f"M={timetable.num_microbatches}, exchange={timetable.exchange}"
    return "\n".join([f"timetable {timetable.name!r} ({sizes}) is not valid, {count}:", *listed, shown])
