"""From what a user writes as `schedule=...` to a validated timetable."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxpar.errors import ScheduleError
from jaxpar.schedule.dag import Placement, StageDag
from jaxpar.schedule.dualpipe_v import dualpipe_v
from jaxpar.schedule.eager_1f1b import eager_1f1b
from jaxpar.schedule.forward_only import forward_only
from jaxpar.schedule.gpipe import gpipe
from jaxpar.schedule.interleaved_1f1b import interleaved_1f1b
from jaxpar.schedule.kfkb import kfkb
from jaxpar.schedule.looped_bfs import looped_bfs
from jaxpar.schedule.one_f_one_b import one_f_one_b
from jaxpar.schedule.timetable import Timetable
from jaxpar.schedule.v_half import v_half
from jaxpar.schedule.v_min import v_min
from jaxpar.schedule.validate import validate_timetable
from jaxpar.schedule.zb_h1 import zb_h1
from jaxpar.schedule.zb_h2 import zb_h2
from jaxpar.schedule.zb_v import zb_v

Schedule = Callable[..., Timetable]  # (dag, num_microbatches, **options) -> Timetable

SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_1f1b,
    "kfkb": kfkb,
    "interleaved_1f1b": interleaved_1f1b,
    "looped_bfs": looped_bfs,
    "zb_h1": zb_h1,
    "zb_h2": zb_h2,
    "zb_v": zb_v,
    "v_half": v_half,
    "v_min": v_min,
    "dualpipe_v": dualpipe_v,
}

PLACEMENTS: dict[str, Placement] = {  # those made for several stages on each rank, and how the stages are laid out
    "interleaved_1f1b": "round_robin",
    "looped_bfs": "round_robin",
    "zb_v": "v",
    "v_half": "v",
    "v_min": "v",
    "dualpipe_v": "v",
}


def default_layout(schedule: object) -> tuple[int, Placement]:
    """How many stages a schedule wants on each rank, and how they go to ranks, where the user doesn't say.

    >>> default_layout("zb_v"), default_layout("1f1b")
    ((2, 'v'), (1, 'round_robin'))
    """
    several = isinstance(schedule, str) and schedule in PLACEMENTS
    return (2, PLACEMENTS[schedule]) if several else (1, "round_robin")  # type: ignore[index]


def make_timetable(
    schedule: str | Schedule | Timetable, dag: StageDag, num_microbatches: int, **options: Any
) -> Timetable:
    """Make the timetable of a step and validate it.

    Args:
      schedule: a name, one of `SCHEDULES`; a callable `(dag, num_microbatches, **options) -> Timetable`; or a
        timetable, which must be for this graph and M. With a name, a forward-only graph gets the `forward_only`
        schedule, and options that are only about backwards are then without effect.
      dag: the stage graph.
      num_microbatches: M.
      **options: of the schedule, such as `exchange` or `extra`.

    Raises:
      ScheduleError: the name or an option is unknown, or the timetable is not valid or not for this graph and M.

    >>> make_timetable("1f1b", StageDag.chain(4), 8, extra=0).peak_in_flight
    (4, 3, 2, 1)
    >>> make_timetable("1f1b", StageDag.chain(4, has_backward=False), 8, extra=0).name
    'forward_only'
    """
    if num_microbatches < 1:
        raise ScheduleError(f"a step needs at least one micro-batch, got num_microbatches={num_microbatches}")
    if isinstance(schedule, Timetable):
        if options:
            raise ScheduleError(f"a ready timetable takes no options, got {', '.join(options)}")
        timetable = schedule
    elif isinstance(schedule, str):
        timetable = _call_by_name(schedule, dag, num_microbatches, options)
    else:
        _check_options(getattr(schedule, "__name__", repr(schedule)), schedule, options)
        timetable = schedule(dag, num_microbatches, **options)
    _check_is_for(timetable, dag, num_microbatches)
    return validate_timetable(timetable)


def _call_by_name(name: str, dag: StageDag, num_microbatches: int, options: dict[str, Any]) -> Timetable:
    if name not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise ScheduleError(
            f"no schedule is called {name!r}; known: {known}, for a step also 'auto'; or give a function or a Timetable"
        )
    make = SCHEDULES[name]
    _check_options(repr(name), make, options)
    if not dag.has_backward:
        make = forward_only
        options = {key: value for key, value in options.items() if key in _options_of(make)}
    return make(dag, num_microbatches, **options)


def _check_options(name: str, make: Schedule, options: dict[str, Any]) -> None:
    takes = _options_of(make)
    unknown = [key for key in options if key not in takes]
    if unknown and "**" not in takes:
        raise ScheduleError(f"schedule {name} takes {', '.join(takes) or 'no options'}, not {', '.join(unknown)}")


def _options_of(make: Schedule) -> list[str]:
    """The keyword options of a schedule, `**` among them if it takes any."""
    parameters = list(inspect.signature(make).parameters.values())[2:]
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


def _check_is_for(timetable: Timetable, dag: StageDag, num_microbatches: int) -> None:
    if not isinstance(timetable, Timetable):
        raise ScheduleError(f"a schedule returns a Timetable, got {type(timetable).__name__}")
    if timetable.num_microbatches != num_microbatches:
        counts = f"{timetable.num_microbatches} micro-batches, but the step has {num_microbatches}"
        raise ScheduleError(f"timetable {timetable.name!r} is for {counts}")
    if timetable.dag != dag:
        graphs = f"\n  {timetable.dag}\nand the step has\n  {dag}"
        raise ScheduleError(f"timetable {timetable.name!r} is for another stage graph: it has{graphs}")
