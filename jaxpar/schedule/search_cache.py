"""Timetables that were searched for, kept in memory and, if there is a directory, on disk as their text form."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from jaxpar.errors import ScheduleError
from jaxpar.schedule.problem import SearchProblem
from jaxpar.schedule.timetable import Timetable
from jaxpar.schedule.validate import validate_timetable


def make_key(problem: SearchProblem, **options: object) -> str:
    """A name for all that decides a search's result: the graph, M, costs, limits and options.

    >>> from jaxpar.schedule import StageCosts, StageDag
    >>> problem = SearchProblem(StageDag.chain(2), 4, StageCosts.uniform(2))
    >>> make_key(problem, seed=0) == make_key(problem, seed=0) != make_key(problem, seed=1)
    True
    """
    costs = {
        name: sorted(value.items()) if isinstance(value, Mapping) else value
        for name, value in vars(problem.costs).items()
        if not name.startswith("_")
    }
    parts = (
        problem.dag,
        problem.num_microbatches,
        costs,
        problem.memory,
        problem.split_backward,
        sorted(options.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def find_directory(given: str | os.PathLike[str] | None) -> Path | None:
    """The directory given, or `JAXPAR_CACHE_DIR`, or none."""
    found = given if given is not None else os.environ.get("JAXPAR_CACHE_DIR")
    return Path(found) if found else None


def read_timetable(directory: Path, key: str, problem: SearchProblem) -> Timetable | None:
    """The timetable kept under a key, validated; None if there is none.

    Raises:
      ScheduleError: the file holds something else.
    """
    path = directory / f"{key}.timetable"
    if not path.exists():
        return None
    try:
        timetable = validate_timetable(Timetable.from_text(path.read_text(), dag=problem.dag))
        if timetable.num_microbatches != problem.num_microbatches or not problem.accepts(timetable):
            raise ScheduleError("it is for other micro-batches, or breaks the limits")
    except ScheduleError as error:
        raise ScheduleError(f"the cached timetable {path} can't be used, delete it: {error}") from error
    return timetable


def write_timetable(directory: Path, key: str, timetable: Timetable) -> None:
    """Keep a timetable."""
    write_whole(directory / f"{key}.timetable", f"{timetable}\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
