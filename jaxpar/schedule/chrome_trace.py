"""A simulated or measured run as a trace file, for https://ui.perfetto.dev or chrome://tracing.

The format is the JSON of the Trace Event Format, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU:
an `X` event for each action, on the thread of its rank, and a `C` event at each step of a rank's memory.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from jaxpar.schedule.simulation import Simulation

_MICROSECONDS = 1e6


def write_chrome_trace(run: Simulation, path: str | os.PathLike[str]) -> None:
    """What `Simulation.write_chrome_trace` does."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": list(_make_events(run)), "displayTimeUnit": "ms"}, file)


def _make_events(run: Simulation) -> Iterator[dict[str, Any]]:
    timetable = run.timetable
    yield _name("process_name", 0, f"{timetable.name} ({run.mode})")
    in_bytes = run.costs is not None and bool(run.costs.residual_bytes)
    for rank in range(timetable.dag.num_ranks):
        yield _name("thread_name", rank, f"rank {rank}")
        for action in timetable.order(rank):
            begin = run.start[action] * _MICROSECONDS
            duration = run.end[action] * _MICROSECONDS - begin
            args = {"kind": action.kind, "stage": action.stage, "microbatch": action.microbatch}
            yield {"ph": "X", "pid": 0, "tid": rank, "name": str(action), "ts": begin, "dur": duration, "args": args}
        unit = "bytes" if in_bytes else "micro-batches"
        for time, held in run.memory_curve(rank) if in_bytes else run.in_flight_curve(rank):
            name = f"rank {rank} residuals"
            yield {"ph": "C", "pid": 0, "name": name, "ts": time * _MICROSECONDS, "args": {unit: held}}


def _name(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": thread, "name": what, "args": {"name": name}}
