"""What a search for a timetable returns, and what it reports on the way."""

import dataclasses

from jaxpar.schedule.bounds import LowerBounds
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.problem import SearchProblem
from jaxpar.schedule.simulate import simulate
from jaxpar.schedule.timetable import Timetable


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a search is: seconds spent of those it may take, the best makespan so far and the bound."""

    seconds: float
    most_seconds: float
    makespan: float
    lower_bound: float

    def __str__(self) -> str:
        return (
            f"searching a timetable: {self.seconds:.0f} of at most {self.most_seconds:.0f} s, makespan "
            f"{self.makespan:.4g}, {_percent(self.makespan, self.lower_bound)} above the lower bound"
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a timetable would cost: by the executor's ticks, running freely, and the most that a rank holds.

    `objection` says why it is not allowed, and is empty if it is.
    """

    name: str
    makespan: float
    free: float
    bubble_fraction: float
    memory: float
    objection: str = ""

    @property
    def fits(self) -> bool:
        """Whether it keeps the limits of the search."""
        return not self.objection


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """A timetable, what it takes, and what is known to be impossible; prints as a table.

    Args:
      timetable: the best that was found.
      makespan: its executor makespan, in the unit of the costs.
      bounds: what no valid timetable can beat.
      candidates: the named schedules, and last the timetable itself.
      seconds: what the search took.
      finished: false if the clock ended it.
    """

    timetable: Timetable
    makespan: float
    bounds: LowerBounds
    candidates: tuple[Candidate, ...]
    seconds: float
    finished: bool

    @property
    def lower_bound(self) -> float:
        """The largest of `bounds`."""
        return self.bounds.best

    @property
    def gap(self) -> float:
        """How much longer than the lower bound it takes, as a share of the bound; 0 if it is optimal."""
        return max(0.0, self.makespan / self.lower_bound - 1) if self.lower_bound else 0.0

    def __str__(self) -> str:
        rows = [("", "executor", "free", "bubble", "memory", "")]
        rows += [
            (
                c.name,
                f"{c.makespan:.4g}",
                f"{c.free:.4g}",
                f"{c.bubble_fraction:.1%}",
                f"{c.memory:.4g}",
                c.objection,
            )
            for c in self.candidates
        ]
        rows += [("lower bound", f"{self.lower_bound:.4g}", "", "", "", f"gap {self.gap:.1%}")]
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{n:<{width}} {a:>10} {b:>10} {c:>7} {d:>8}  {e}".rstrip() for n, a, b, c, d, e in rows)


def cost_candidate(name: str, timetable: Timetable, problem: SearchProblem) -> Candidate:
    """Simulate a timetable both ways."""
    run = simulate(timetable, problem.costs)
    free = simulate(timetable, problem.costs, mode="free")
    memory = problem.memory or MemoryLimit.in_microbatches(problem.dag, 0)
    peak = max(memory.peaks(timetable))
    return Candidate(name, run.makespan, free.makespan, run.bubble_fraction, peak, problem.objection(timetable))


def _percent(makespan: float, lower_bound: float) -> str:
    return f"{makespan / lower_bound - 1:.1%}" if lower_bound else "0.0%"
