"""What the user asked for, as `parallelize` was called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpar.arguments import NewState
from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, PipelinePlan
from jaxpar.schedule import Timetable, default_layout, place_stages

DEFAULT_SCHEDULE = "1f1b"


@dataclass(frozen=True)
class Options:
    """See `parallelize`."""

    num_microbatches: int | None
    schedule: str | Timetable | Callable[..., Timetable] | None
    schedule_options: Mapping[str, Any]
    plan: PipelinePlan | str | None
    plan_options: Mapping[str, Any]
    cluster: ClusterSpec | None
    cuts: Sequence[str] | None
    state_of: Any  # PipelinedStep | None
    new_state: NewState
    donate: bool
    stages_per_rank: int | None
    placement: str | None
    replicas: Sequence[int] | None

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.plan is None:
            if self.num_microbatches is None:
                raise PlanError("num_microbatches is missing: give it, or a plan that says how many there are.")
            self.rank_of(1)  # so that a wrong placement shows at once
        else:
            self._check_plan()

    def _check_numbers(self) -> None:
        for name in ("num_microbatches", "stages_per_rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise PlanError(f"{name} is {value!r}; it must be a whole number, at least 1.")
        if self.replicas is not None and any(not isinstance(d, int | np.integer) or d < 1 for d in self.replicas):
            raise PlanError(f"replicas is {self.replicas!r}; it must be a whole number, at least 1, for each stage.")

    def _check_plan(self) -> None:
        if not isinstance(self.plan, PipelinePlan | str):
            raise PlanError(f"plan is a PipelinePlan or the name of a planner, not a {type(self.plan).__name__}.")
        settled = ("cuts", "stages_per_rank", "placement", "replicas", "state_of")
        if given := [name for name in settled if getattr(self, name) is not None]:
            raise PlanError(f"a plan settles what {' and '.join(given)} would: give the plan or those, not both.")

    def groups(self, num_ranks: int) -> tuple[tuple[int, ...], ...]:
        """The positions on the stage axis that are replicas of each other: neighbours."""
        if self.replicas is None:
            return tuple((r,) for r in range(num_ranks))
        if sum(self.replicas) != num_ranks:
            raise PlanError(
                f"replicas={tuple(self.replicas)} takes {sum(self.replicas)} ranks, but the mesh has {num_ranks} on "
                "its axis of stages: the numbers must add up to that."
            )
        ends = np.cumsum(self.replicas).tolist()
        return tuple(tuple(range(end - d, end)) for end, d in zip(ends, self.replicas, strict=True))

    def rank_of(self, num_groups: int) -> tuple[int, ...]:
        """The group of each stage: as asked for, or as the schedule needs it."""
        schedule = self.schedule or DEFAULT_SCHEDULE
        if isinstance(schedule, Timetable) and schedule.dag.num_ranks == num_groups:
            return schedule.dag.rank_of
        count, placement = default_layout(schedule)
        return place_stages((self.stages_per_rank or count) * num_groups, num_groups, self.placement or placement)  # type: ignore[arg-type]
