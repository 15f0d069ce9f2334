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
_SHORTER = 1 - 1e-9  # less than this share of another is less, and not by rounding


def choose_schedules(graph: OpGraph) -> tuple[ScheduleChoice, ...]:
    """Those that may be the best for some plan: textbook memory, slack for lockstep, and split backwards if there are."""
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
    by_kind: dict[str, tuple[float, PipelinePlan]] = field(default_factory=dict)
    simulated: int = 0

    def consider(self, kind: str, plans: Iterable[PipelinePlan], *, most: int = 1 << 30, as_is: bool = False) -> None:
        """Simulate plans in the order of their lower bounds, until none can be faster than the best.

        Args:
          kind: by whom they are; the fastest of each kind is kept, and at least one of each is simulated.
          plans: with any timetable.
          most: how many to simulate at most.
          as_is: whether to take them with the timetable that they have.
        """
        bounds = []
        for plan in plans:
            for timed in [plan] if as_is else self._time(plan):
                if (bound := self._bound(timed)) < math.inf:
                    bounds.append((bound, len(bounds), timed))
        for place, (bound, _, plan) in enumerate(sorted(bounds, key=lambda entry: entry[:2])):
            known = self.by_kind.get(kind, (math.inf,))[0]
            if place >= most or (bound >= self.seconds * _SHORTER and known < math.inf) or bound >= known * _SHORTER:
                break
            self._simulate(kind, plan)

    def _time(self, plan: PipelinePlan) -> list[PipelinePlan]:
        """With each timetable; without a pipeline there is one."""
        choices = self.schedules if len(plan.stages) > 1 else self.schedules[:1]
        return [replace(plan, schedule=name, schedule_options=options) for name, options in choices]

    def _bound(self, plan: PipelinePlan) -> float:
        try:
            return estimate_step(plan)
        except (PlanError, ScheduleError):  # stages in a cycle, or a timetable that isn't for such stages
            return math.inf

    def _simulate(self, kind: str, plan: PipelinePlan) -> None:
        self.simulated += 1
        try:
            seconds = predict(plan, self.mode).step_seconds
            if seconds < self.by_kind.get(kind, (math.inf,))[0]:
                plan.check()
                self.by_kind[kind] = seconds, plan
        except (PlanError, ScheduleError):
            return  # it doesn't fit into memory with this timetable
        if seconds < self.seconds * _SHORTER:
            self.best, self.seconds = plan, seconds
