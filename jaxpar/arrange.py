"""What is settled before a program is cut into stages: who works on what, and in how many micro-batches.

The user says it with `replicas`, `stages_per_rank` and `schedule`; or a plan does, made by hand or by a planner for the
program's own graph of operators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxpar.errors import PlanError
from jaxpar.lower import Axes, StateLayout
from jaxpar.options import DEFAULT_SCHEDULE, Options
from jaxpar.plan import ClusterSpec, PipelinePlan
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.plan.planners import plan as plan_graph
from jaxpar.planning import build_graph
from jaxpar.schedule import Timetable
from jaxpar.trace import Eqn
from jaxpar.tracing import TracedStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Groups of ranks, the group of each stage, micro-batches and schedule; and the cut itself, if a plan says it."""

    groups: tuple[tuple[int, ...], ...]  # positions on the stage axis that are replicas of each other
    rank_of: tuple[int, ...]  # the group of each stage
    num_microbatches: int
    schedule: str | Timetable | Callable[..., Timetable]
    schedule_options: Mapping[str, Any]
    pipeline: PipelinePlan | None = None
    forward_stage: Mapping[Eqn, int] | None = None
    recompute: frozenset[int] = frozenset()


def arrange_stages(
    traced: TracedStep,
    mesh: Mesh,
    axes: Axes,
    options: Options,
    layouts: Sequence[StateLayout] | None,
) -> Arrangement:
    """Settle it.

    Args:
        layouts: where the state is, if it is placed already.

    Raises: PlanError where a plan isn't for this program or this mesh.
    """
    if options.plan is None:
        groups = layouts[0].groups if layouts else options.groups(axes.num_ranks)
        rank_of = layouts[0].rank_of if layouts else options.rank_of(len(groups))
        assert options.num_microbatches is not None
        schedule = options.schedule or DEFAULT_SCHEDULE
        return Arrangement(groups, rank_of, options.num_microbatches, schedule, options.schedule_options)
    return _follow_plan(traced, mesh, axes, options)


def _follow_plan(traced: TracedStep, mesh: Mesh, axes: Axes, options: Options) -> Arrangement:
    cluster = options.cluster or cluster_of_stage_axis(mesh, axes)
    operators = build_graph(traced, AnalyticCosts(cluster.devices[0]))
    plan = options.plan
    if isinstance(plan, str):
        batch, settled = traced.program.num_examples // axes.replicas, dict(options.plan_options)
        if options.num_microbatches is not None:
            settled["microbatches"] = (batch // options.num_microbatches,)
        plan = plan_graph(operators.graph, cluster, batch, plan, **settled)
        logger.info("planned %s:\n%s", operators, plan)
    assert isinstance(plan, PipelinePlan)
    plan.check()
    ranks = _check_devices(plan, axes)
    unused = tuple((r,) for r in range(axes.num_ranks) if r not in ranks)
    chosen = options.schedule is not None
    return Arrangement(
        groups=(*plan.rank_devices, *unused),
        rank_of=plan.rank_of,
        num_microbatches=options.num_microbatches or plan.num_microbatches,
        schedule=options.schedule if chosen else plan.schedule,  # type: ignore[arg-type]
        schedule_options=options.schedule_options if chosen else plan.schedule_options,
        pipeline=plan,
        forward_stage=operators.assign_stages(plan.graph, plan.stage_of),
        recompute=frozenset(s for s, stage in enumerate(plan.stages) if stage.recompute),
    )


def cluster_of_stage_axis(mesh: Mesh, axes: Axes) -> ClusterSpec:
    """The devices along the axis of stages, at the first position of all other axes."""
    first = tuple(slice(None) if name == axes.stage else 0 for name in mesh.axis_names)
    return ClusterSpec.from_mesh(Mesh(np.asarray(mesh.devices)[first], (axes.stage,)))


def _check_devices(plan: PipelinePlan, axes: Axes) -> set[int]:
    used = {device for stage in plan.stages for device in stage.devices}
    if max(used) >= axes.num_ranks:
        raise PlanError(
            f"the plan uses the devices {sorted(used)}, but the mesh has {axes.num_ranks} positions on its axis "
            f"{axes.stage!r}: device i of a plan is position i. Use a larger mesh, or plan for a cluster of "
            f"{axes.num_ranks} devices."
        )
    return used
