"""GraphPipe: stages that form a graph, with the least bottleneck, found over the series-parallel tree.

Jeon et al. 2025, GraphPipe: Improving Performance and Scalability of DNN Training with Graph Pipeline Parallelism,
https://arxiv.org/abs/2406.17145. For each micro-batch size a bisection on the seconds per example of the slowest stage,
each step of which asks for the fewest devices (see `tree_search`). Micro-batch sizes that can't beat the best one so
far cost one step.

Beyond the paper: stages may hold pieces of several branches; and where a graph has few down-sets, all of them are
searched (see `frontier_search`), which is exact whatever the graph's form. Graphs that aren't series-parallel and are
too wide for that are planned by the tree of a completion, and along two orders of their operators.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.coarsen import Coarsening, coarsen
from jaxpar.plan.down_sets import count_down_sets, list_down_sets
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.planners.base import Stage, make_plan
from jaxpar.plan.planners.bisection import Found, StageSearch, bisect_bottleneck, measure
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.frontier_search import Frontiers, FrontierSearch
from jaxpar.plan.planners.local_search import LocalSearch, Moves
from jaxpar.plan.planners.misfit import explain_blocks, explain_misfit
from jaxpar.plan.planners.options import Replicas, count_devices, list_microbatches, list_replicas
from jaxpar.plan.planners.stage_prices import Pricing
from jaxpar.plan.planners.step_model import BottleneckModel, Sketch, StepModel
from jaxpar.plan.planners.tree_search import TreeSearch
from jaxpar.plan.planners.tree_shapes import TreeShapes
from jaxpar.plan.series_parallel import decompose

logger = logging.getLogger(__name__)

MAX_BLOCKS = 160
MAX_DOWN_SETS = 500  # with all pairs of them, a second's work for each micro-batch size
MAX_DEPTH = 48
_EFFORT, _MEASURED = 4000, 20  # plans that the refinement estimates, and prices in full
_TINY = 12  # operators for which all labels of a down-set are kept
_LABELS = 4  # else


def graphpipe(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    *,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    num_devices: int | None = None,
    recompute: bool = False,
    transfers: bool = True,
    max_blocks: int = MAX_BLOCKS,
    progress: bool = False,
) -> PipelinePlan:
    """The plan whose slowest stage takes least time per example, and of those one of the least depth.

    Args:
      graph: the program.
      cluster: the machine; unequal devices all count as the slowest, with the memory of the smallest.
      batch_size: examples in a step.
      microbatches: sizes to try; None for the powers of two that divide the batch.
      replicas: replica counts to try.
      num_devices: how many devices may be used; None for all.
      recompute: whether stages may compute their forward again in the backward.
      transfers: whether a stage takes at least as long as its values are on their way; the bottleneck is that of
        computation alone if not.
      max_blocks: larger graphs are coarsened to so many blocks first.
      progress: log what is being done, at level INFO.

    Raises:
      PlanError: no plan fits into memory, by how much, and what would help; or an option is out of range.

    >>> from jaxpar.plan.op_graph import Op
    >>> ops = [Op("a", 2e-3), Op("b", 2e-3), Op("join", 2e-3)]
    >>> graph = OpGraph.build(ops, [("a", "join"), ("b", "join")])
    >>> plan = graphpipe(graph, ClusterSpec.preset("cpu", 3), 8, microbatches=[1])
    >>> [stage.ops for stage in plan.stages], plan.depth
    ([(0,), (1,), (2,)], (2, 2, 1))
    """
    started = time.perf_counter()
    count = count_devices(cluster, num_devices)
    coarse = coarsen(graph, max_blocks)
    space = SearchSpace(coarse.graph, min(count, MAX_DEPTH))
    sizes = list_microbatches(batch_size, microbatches)
    best: Found | None = None
    for size in reversed(sizes):
        pricing = Pricing.make(
            coarse.graph, cluster, batch_size, size, count, replicas, recompute=recompute, transfers=transfers
        )
        for search in space.searches(pricing):
            found = bisect_bottleneck(search, best.per_example if best else float("inf"))
            best = found or best
        if progress and best:
            taken = time.perf_counter() - started
            logger.info("graphpipe: micro-batch %d: best %.4g s an example, %.1f s", size, best.per_example, taken)
    if best is None:
        why = explain_misfit(graph, cluster, batch_size, count, microbatches, replicas, recompute=recompute)
        raise PlanError(why + explain_blocks(coarse))
    if not space.is_exact:
        best = _refine(best, sizes, replicas, recompute=recompute)
    best = space.flatten(best)
    plan = plan_of(coarse, cluster, best)
    return replace(plan, planner="graphpipe", search_seconds=time.perf_counter() - started)


def _refine(best: Found, sizes: tuple[int, ...], replicas: Replicas, *, recompute: bool) -> Found:
    """A smaller bottleneck by small changes, if there is one: where not all down-sets are searched."""
    pricing = best.pricing
    steps = StepModel(
        pricing.graph, pricing.cluster, pricing.microbatch * pricing.num_microbatches, pricing.num_devices
    )
    counts = list_replicas(pricing.num_devices, replicas)
    moves = Moves(pricing.graph, counts, sizes, pricing.num_devices, recompute)
    search = LocalSearch(BottleneckModel(steps), moves)
    search.add([Sketch.of_stages(pricing.microbatch, best.stages)])
    for sketch in list(search.run(_EFFORT))[:_MEASURED]:
        count = steps.batch_size // sketch.microbatch
        variants = tuple(
            Variant(d, r) for d in counts if sketch.microbatch % d == 0 for r in (False, True)[: 1 + recompute]
        )
        mine = replace(pricing, microbatch=sketch.microbatch, num_microbatches=count, variants=variants)
        here = measure(mine, sketch.stages())
        if here.per_example < best.per_example * (1 - 1e-9):
            best = here
    return best


def plan_of(coarse: Coarsening, cluster: ClusterSpec, found: Found) -> PipelinePlan:
    """The plan of the operators before coarsening."""
    stages = [(coarse.expand(blocks), variant) for blocks, variant in found.stages]
    pricing = found.pricing
    return make_plan(coarse.original, cluster, stages, pricing.microbatch, pricing.num_microbatches)


@dataclass(frozen=True)
class SearchSpace:
    """The searches that fit a graph's form; what doesn't depend on the micro-batch size is made once.

    Args:
      graph: the operators, not too many.
      deepest: the largest depth of a plan.
    """

    graph: OpGraph
    deepest: int

    def searches(self, pricing: Pricing, *, quick: bool = False) -> Iterator[StageSearch]:
        """Those worth trying, the fastest first; with `quick` those that look along orders are left out."""
        yield TreeSearch(self._shapes, pricing, self._deepest)
        for frontiers in self._frontiers if self.is_small or not quick else ():
            yield FrontierSearch(frontiers, pricing, self._deepest, None if self.graph.num_ops <= _TINY else _LABELS)

    def flatten(self, found: Found) -> Found:
        """The same bottleneck with less depth, if a search finds it."""
        best, depth = found, depth_of(self.graph, found.stages)
        for search in self.searches(found.pricing):
            while depth > 1:
                stages = search.solve(found.seconds * (1 + 1e-9), depth - 1)
                if stages is None:
                    break
                best, depth = measure(found.pricing, stages), depth_of(self.graph, stages)
        return best

    @cached_property
    def is_small(self) -> bool:
        """Whether all down-sets are looked at."""
        graph = self.graph
        return count_down_sets(graph.predecessors, graph.order, MAX_DOWN_SETS) <= MAX_DOWN_SETS

    @property
    def is_exact(self) -> bool:
        """Whether one of the searches finds the least bottleneck for sure."""
        return self.is_small and self.graph.num_ops <= _TINY

    @property
    def _deepest(self) -> int:
        return min(self.deepest, self.graph.num_ops)

    @cached_property
    def _shapes(self) -> TreeShapes:
        tree, factory, _ = decompose(self.graph)
        return TreeShapes(self.graph, tree, factory)

    @cached_property
    def _frontiers(self) -> tuple[Frontiers, ...]:
        graph = self.graph
        if self.is_small:
            return (Frontiers.of(graph, list_down_sets(graph.predecessors, graph.order, MAX_DOWN_SETS)),)
        orders = dict.fromkeys((self._shapes.tree.ops, graph.order))
        return tuple(Frontiers.of_order(graph, order) for order in orders)


def depth_of(graph: OpGraph, stages: Sequence[Stage]) -> int:
    """Stages on the longest path."""
    home = {op: s for s, (ops, _) in enumerate(stages) for op in ops}
    reached: dict[int, int] = {}
    edges = {(home[e.source], home[e.target]) for e in graph.edges if home[e.source] != home[e.target]}
    feeds: dict[int, list[int]] = {}
    for a, b in edges:
        feeds.setdefault(a, []).append(b)

    def deep(stage: int) -> int:
        if stage not in reached:
            reached[stage] = 1 + max(map(deep, feeds.get(stage, ())), default=0)
        return reached[stage]

    return max(deep(s) for s in range(len(stages)))
