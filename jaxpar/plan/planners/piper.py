"""Piper: a chain of stages with replicas and recomputation, by dynamic programming over down-sets.

Tarnawski, Narayanan and Phanishayee, NeurIPS 2021: Piper, multidimensional planner for DNN parallelization. The stages
are the differences of two down-sets of the graph, so that one may hold pieces of several branches; each has a number of
replicas and may compute its forward again in the backward; its time is its work and its transfers, one after the other.
Left out is tensor parallelism inside a stage, which operators here don't describe, and the paper's asynchronous
schedule: as for the other planners, a stage keeps as many micro-batches in flight as there are stages from it to the
last.

The number of down-sets grows exponentially with the number of branches, and that of pairs with its square: the search
says so and gives up.
"""

from collections.abc import Sequence

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import list_down_sets
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.planners.chain_plans import ChainOptions, Select, plan_chains
from jaxpar.plan.planners.chain_stages import StageSpans, span_down_sets
from jaxpar.plan.planners.options import Replicas
from jaxpar.plan.planners.pipedream import MAX_DOWN_SETS, MAX_PAIRS
from jaxpar.schedule.simulate import Mode


def piper(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    *,
    recompute: bool = True,
    select: Select = "step",
    mode: Mode = "free",
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    num_devices: int | None = None,
    max_ops: int = 128,
    max_down_sets: int = MAX_DOWN_SETS,
    max_pairs: int = MAX_PAIRS,
    progress: bool = False,
) -> PipelinePlan:
    """The best chain of stages, by Piper's search.

    Args:
      graph, cluster, batch_size: what to plan.
      recompute: whether stages may compute their forward again.
      select, mode, microbatches, replicas, num_devices, max_ops, progress: as for `pipedream`.
      max_down_sets, max_pairs: where it gives up: the down-sets, and the pairs of them.

    Raises:
      PlanError: no chain fits into memory; or the graph has too many down-sets, and how many were counted.

    >>> from jaxpar.plan.op_graph import Op
    >>> ops = [Op(name, 1e-3, 1e-3, 1e-3, parameter_bytes=1e9) for name in "abcd"]
    >>> graph = OpGraph.build(ops, [("a", "b"), ("c", "d")])
    >>> plan = piper(graph, ClusterSpec.preset("v100", 2), 16)
    >>> sorted(len(stage.ops) for stage in plan.stages)
    [2, 2]
    """

    def list_spans(blocks: OpGraph) -> list[StageSpans]:
        found = list_down_sets(blocks.predecessors, blocks.order, max_down_sets)
        return [span_down_sets(blocks, found, max_pairs)]

    options = ChainOptions(microbatches, replicas, num_devices, progress, select, mode, max_ops)
    return plan_chains(
        graph, cluster, batch_size, list_spans, options, planner="piper", overlap=False, recompute=recompute
    )
