"""No pipeline at all: one stage that holds the whole program, replicated.

What every pipeline has to beat: nothing fills or drains and nothing travels between stages, but each device holds all
of the state, and all gradients are reduced over all devices.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.planners.base import make_plan
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.misfit import explain_misfit
from jaxpar.plan.planners.options import Replicas, count_devices, list_microbatches, list_replicas
from jaxpar.plan.predict import estimate_step, stage_memory


def data_parallel(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    *,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    num_devices: int | None = None,
    recompute: bool = False,
    progress: bool = False,
) -> PipelinePlan:
    """The fastest plan of one stage: micro-batches are then gradient accumulation, and there may be just one.

    Args:
      graph, cluster, batch_size: what to plan.
      microbatches: sizes to try; None for the powers of two that divide the batch.
      replicas: replica counts to try; fewer than all devices are taken where that is faster.
      num_devices: how many devices may be used; None for all.
      recompute: also try to keep only the inputs, and compute the forward again.
      progress: without effect: this takes no time.

    Raises:
      PlanError: it doesn't fit into memory, by how much, and what would help.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op("a", 1e-3), Op("b", 1e-3)], [("a", "b")])
    >>> plan = data_parallel(graph, ClusterSpec.preset("cpu", 4), 16)
    >>> len(plan.stages), plan.microbatch, len(plan.stages[0].devices)
    (1, 4, 4)
    """
    started = time.perf_counter()
    plans = list_replicated(graph, cluster, batch_size, microbatches, replicas, num_devices, recompute=recompute)
    if not plans:
        count = count_devices(cluster, num_devices)
        why = explain_misfit(graph, cluster, batch_size, count, microbatches, replicas, recompute=recompute)
        raise PlanError(f"{why}; a pipeline, whose devices share the state ('graphpipe' or 'auto')")
    # The smallest micro-batch among equals, which needs least memory.
    best = min(plans, key=lambda plan: (estimate_step(plan), plan.microbatch))
    return replace(best, planner="data_parallel", search_seconds=time.perf_counter() - started)


def list_replicated(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    num_devices: int | None = None,
    *,
    recompute: bool = False,
) -> list[PipelinePlan]:
    """All plans of one stage that fit into memory."""
    plans = []
    for size in list_microbatches(batch_size, microbatches):
        for d in list_replicas(count_devices(cluster, num_devices), replicas):
            for again in (False, True)[: 1 + recompute]:
                if size % d == 0:
                    stages = [(tuple(range(graph.num_ops)), Variant(d, again))]
                    plan = make_plan(graph, cluster, stages, size, batch_size // size)
                    memory = min(cluster.devices[i].memory_bytes for i in plan.stages[0].devices)
                    if stage_memory(plan, 0, 1) <= memory:
                        plans.append(plan)
    return plans
