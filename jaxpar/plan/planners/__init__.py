"""Planners: from a graph of operators and a cluster to a plan. One in a file, all called alike."""

from dataclasses import replace
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.planners.auto import auto
from jaxpar.plan.planners.base import Planner, check_options
from jaxpar.plan.planners.data_parallel import data_parallel
from jaxpar.plan.planners.exact import exact
from jaxpar.plan.planners.graphpipe import graphpipe
from jaxpar.plan.planners.in_flight import count_in_flight
from jaxpar.plan.planners.options import count_devices
from jaxpar.plan.planners.pipedream import pipedream
from jaxpar.plan.planners.piper import piper

PLANNERS: dict[str, Planner] = {
    "auto": auto,
    "graphpipe": graphpipe,
    "pipedream": pipedream,
    "piper": piper,
    "exact": exact,
    "data_parallel": data_parallel,
}


def plan(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    planner: str | Planner = "auto",
    *,
    use_all: bool = False,
    **options: Any,
) -> PipelinePlan:
    """Plan a training step on a cluster.

    Args:
      graph: the program.
      cluster: the machine.
      batch_size: examples in a step.
      planner: one of `PLANNERS`, or a function called like them.
      use_all: whether it is an error to use fewer devices than there are (or than `num_devices` says).
      **options: for all planners `microbatches` (sizes to try; None for the powers of two that divide the batch),
        `replicas` ("powers_of_two" or "any"), `num_devices` (how many may be used; None for all) and `progress`
        (whether to tell what is being done); and each one's own.

    Returns:
      A plan that passes its `check`; its `notes` say so if it leaves devices over.

    Raises:
      PlanError: no plan fits into memory; an option is unknown or out of range; or `use_all` can't be met.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op("a", 1e-3), Op("b", 1e-3)], [("a", "b")])
    >>> len(plan(graph, ClusterSpec.preset("cpu", 2), 8, "graphpipe").stages)
    1
    """
    if isinstance(planner, str) and planner not in PLANNERS:
        raise PlanError(f"no planner is called {planner!r}; known: {', '.join(map(repr, PLANNERS))}")
    search = PLANNERS[planner] if isinstance(planner, str) else planner
    name = planner if isinstance(planner, str) else getattr(planner, "__name__", "planner")
    check_options(name, search, options)
    found = search(graph, cluster, batch_size, **options)
    found.check()
    available = count_devices(cluster, options.get("num_devices"))
    used = len({device for stage in found.stages for device in stage.devices})
    if used == available:
        return found
    if use_all:
        raise PlanError(
            f"{name} plans {used} of {available} devices, and use_all=True: it found nothing faster with more, for "
            f"{graph.num_ops} operators and micro-batches of {found.microbatch}. Plan for num_devices={used}, leave "
            f"use_all out, or give replicas='any' and microbatches that {available} devices can share"
        )
    left = f"uses {used} of {available} devices"
    mentioned = any(left in note for note in found.notes)
    return found if mentioned else replace(found, notes=(*found.notes, left))


__all__ = [
    "PLANNERS",
    "Planner",
    "auto",
    "count_in_flight",
    "data_parallel",
    "exact",
    "graphpipe",
    "pipedream",
    "piper",
    "plan",
]
