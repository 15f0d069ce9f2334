"""Which of many plans has the least simulated step: each in its best timetable, with as few simulations as can be."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpar.errors import PlanError, ScheduleError
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.predict import estimate_step, predict
from jaxpar.schedule.simulate import Mode

ScheduleChoice = tuple[str, Mapping[str, Any]]  # name and options
TEXTBOOK: ScheduleChoice = ("1f1b", {"extra": 0})
_QUICK = ("1f1b", "eager_1f1b", "gpipe")  # timed without making a timetable
_SLOW_TRIED = 4  # plans, of those given at once, for which the others are tried
_SHORTER = 1 - 1e-9  # less than this share of another is less, and not by rounding


def choose_schedules(graph: OpGraph) -> tuple[ScheduleChoice, ...]:
    """Those that may be the best for some plan: textbook memory, slack for lockstep, split backwards if there are."""
    choices: list[ScheduleChoice] = [TEXTBOOK, ("1f1b", {}), ("eager_1f1b", {})]
    if any(op.weight_backward for op in graph.ops):
        choices.append(("zb_h1", {}))
    return tuple(choices)


@dataclass
class Judge:
    """The fastest plan so far, and the fastest of each kind.

    Args:
      mode: how steps are simulated.
      schedules: the timetables to try for each plan.
    """

    mode: Mode
    schedules: Sequence[ScheduleChoice]
    best: PipelinePlan | None = None
    seconds: float = math.inf
    kind: str = ""  # of the best
    by_kind: dict[str, tuple[float, PipelinePlan]] = field(default_factory=dict)
    simulated: int = 0

    def consider(self, kind: str, plans: Iterable[PipelinePlan], *, as_is: bool = False) -> None:
        """Simulate plans in the order of their lower bounds, until none can be faster than the best.

        Timetables that take long to make are tried for those that turned out best with the others.

        Args:
          kind: by whom they are; the fastest of each kind is kept, and at least one of each is simulated.
          plans: with any timetable.
          as_is: whether to take them with the timetable that they have.
        """
        timed = [(n, t) for n, plan in enumerate(plans) for t in ([plan] if as_is else self._time(plan))]
        bounds = [(self._bound(plan), n, plan) for n, plan in timed]
        results: dict[int, float] = {}
        for bound, n, plan in sorted((e for e in bounds if e[2].schedule in _QUICK), key=lambda e: e[:2]):
            if not self._is_promising(kind, bound):
                break
            results[n] = min(self._simulate(kind, plan), results.get(n, math.inf))
        slow = [(results.get(n, bound), bound, n, plan) for bound, n, plan in bounds if plan.schedule not in _QUICK]
        slow.sort(key=lambda e: e[:3])
        for _, bound, _, plan in slow[:_SLOW_TRIED]:
            if self._is_promising(kind, bound):
                self._simulate(kind, plan)

    def _is_promising(self, kind: str, bound: float) -> bool:
        """Whether a plan may be the best of its kind, and if the kind is known to have one that can be run, of all."""
        known = self.by_kind.get(kind, (math.inf,))[0]
        return bound < (known if known == math.inf else min(known, self.seconds)) * _SHORTER

    def _time(self, plan: PipelinePlan) -> list[PipelinePlan]:
        """With each timetable; without a pipeline there is one."""
        choices = self.schedules if len(plan.stages) > 1 else self.schedules[:1]
        return [replace(plan, schedule=name, schedule_options=options) for name, options in choices]

    def _bound(self, plan: PipelinePlan) -> float:
        try:
            return estimate_step(plan)
        except (PlanError, ScheduleError):  # stages in a cycle, or a timetable that isn't for such stages
            return math.inf

    def _simulate(self, kind: str, plan: PipelinePlan) -> float:
        """Its seconds; infinite if it can't be run."""
        self.simulated += 1
        try:
            seconds = predict(plan, self.mode).step_seconds
            if seconds < self.by_kind.get(kind, (math.inf,))[0]:
                plan.check()
                self.by_kind[kind] = seconds, plan
        except (PlanError, ScheduleError):
            return math.inf  # it doesn't fit into memory with this timetable
        if seconds < self.seconds * _SHORTER:
            self.best, self.seconds, self.kind = plan, seconds, kind
        return seconds
