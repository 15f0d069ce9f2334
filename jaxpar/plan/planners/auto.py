"""The fastest plan that any planner finds, judged by the simulated step, and improved; it may be not to pipeline.

The candidates are GraphPipe's plans, for each micro-batch size those with the least bottleneck and those with less
depth for a bottleneck a little worse, which fill and drain faster; PipeDream's and Piper's; one replicated stage;
several stages on each device. What GraphPipe lacks is found by `local_search` from the best of them: stages that hold
pieces of several branches, recomputation stage by stage, uneven replica counts. All are judged by one measure, so that
the result is never slower than any of them by it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec, LinkMatrix
from jaxpar.plan.coarsen import Coarsening, coarsen
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.base import Stage, make_plan
from jaxpar.plan.planners.bisection import StageSearch, bisect_bottleneck
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.data_parallel import list_replicated
from jaxpar.plan.planners.graphpipe import MAX_BLOCKS, SearchSpace, graphpipe
from jaxpar.plan.planners.interleave import list_interleaved
from jaxpar.plan.planners.judge import Judge, ScheduleChoice, choose_schedules
from jaxpar.plan.planners.local_search import LocalSearch, Moves
from jaxpar.plan.planners.misfit import explain_blocks, explain_misfit
from jaxpar.plan.planners.options import Replicas, count_devices, list_microbatches, list_replicas
from jaxpar.plan.planners.pipedream import pipedream
from jaxpar.plan.planners.piper import piper
from jaxpar.plan.planners.reasons import explain_choice
from jaxpar.plan.planners.stage_prices import Pricing
from jaxpar.plan.planners.step_model import Sketch, StepModel
from jaxpar.plan.planners.tree_search import TreeSearch
from jaxpar.schedule.simulate import Mode

logger = logging.getLogger(__name__)

SLACKS = (1.0, 1.04, 1.1, 1.2, 1.4, 1.8)
_PRECISION = 4e-3  # of the bottleneck; the local search does the rest
_MOST_SIZES = 20  # of micro-batches
_DEEPEST = 24  # of the plans that the tree is asked for
_BEST_SIZES = 4  # micro-batch sizes whose plans are improved
_SIMULATED = 60  # of the plans that the local search finds for a size
_POLISHED = 40  # neighbours of the best plan simulated in each round
_PIPER_DOWN_SETS = 600  # where Piper's search is a matter of seconds


def auto(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    *,
    mode: Mode = "executor",
    schedules: Sequence[ScheduleChoice] | None = None,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "any",
    num_devices: int | None = None,
    recompute: bool = True,
    max_blocks: int = MAX_BLOCKS,
    effort: int = 12_000,
    progress: bool = False,
) -> PipelinePlan:
    """The plan with the least simulated step that is found.

    Args:
      graph, cluster, batch_size: what to plan.
      mode: how steps are simulated: "executor" is what jaxpar runs, "free" what the literature has.
      schedules: names and options of the timetables to try; None for 1F1B with and without slack, eager 1F1B, and ZB-H1
        where backwards can be split.
      microbatches: sizes to try; None for the divisors of the batch ("any" replicas; of many some), or its powers of
        two.
      replicas: replica counts to try.
      num_devices: how many devices may be used; fewer are taken where that is faster.
      recompute: whether stages may compute their forward again in the backward.
      max_blocks: larger graphs are coarsened to so many blocks.
      effort: how many plans the local search estimates.
      progress: log what is being done, at level INFO.

    Returns:
      The plan, whose `notes` say what it was compared with and why it won.

    Raises:
      PlanError: no plan fits into memory, by how much, and what would help; or an option is out of range.

    >>> from jaxpar.plan.op_graph import Op
    >>> ops = [Op(name, 2e-3, 2e-3, 2e-3, parameter_bytes=1e9) for name in ("a", "b")]
    >>> graph = OpGraph.build([*ops, Op("join", 1e-3, 1e-3, 1e-3)], [("a", "join"), ("b", "join")])
    >>> plan = auto(graph, ClusterSpec.preset("v100", 2), 16)
    >>> sorted(len(stage.ops) for stage in plan.stages), plan.notes[0].split(":")[0]
    ([1, 2], 'chosen')
    """
    started = time.perf_counter()
    count = count_devices(cluster, num_devices)
    if microbatches is None and replicas == "any":
        microbatches = choose_sizes(batch_size)
    sizes = list_microbatches(batch_size, microbatches)
    coarse = coarsen(graph, max_blocks)
    judge = Judge(mode, tuple(schedules or choose_schedules(graph)))
    hunt = _Hunt(
        coarse.graph, cluster, batch_size, sizes, replicas, count, recompute and graph.has_backward, effort, judge
    )
    for name, step in hunt.steps():
        step()
        if progress:
            taken = time.perf_counter() - started
            logger.info("auto: %s: best %.4g s, %d simulated, %.1f s", name, judge.seconds, judge.simulated, taken)
    if judge.best is None:
        why = explain_misfit(graph, cluster, batch_size, count, sizes, replicas, recompute=recompute)
        raise PlanError(why + explain_blocks(coarse))
    notes = explain_choice(judge, count)
    best = _expand(coarse, judge.best)
    return replace(best, planner="auto", search_seconds=time.perf_counter() - started, notes=notes)


def choose_sizes(batch_size: int) -> list[int]:
    """The divisors of a batch; if there are many, the powers of two and some between them, evenly in their order.

    >>> choose_sizes(12), len(choose_sizes(5040))
    ([1, 2, 3, 4, 6, 12], 23)
    """
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    if len(divisors) <= _MOST_SIZES:
        return divisors
    spread = {divisors[round(i * (len(divisors) - 1) / (_MOST_SIZES - 1))] for i in range(_MOST_SIZES)}
    return sorted(spread | {size for size in divisors if size & (size - 1) == 0})


def _expand(coarse: Coarsening, plan: PipelinePlan) -> PipelinePlan:
    """The plan of the operators that a plan of the blocks stands for."""
    stages = tuple(PlannedStage(coarse.expand(s.ops), s.devices, s.recompute) for s in plan.stages)
    return replace(plan, graph=coarse.original, stages=stages)


@dataclass
class _Hunt:
    """The candidates, kind by kind, all given to the judge."""

    graph: OpGraph
    cluster: ClusterSpec
    batch_size: int
    sizes: tuple[int, ...]
    replicas: Replicas
    num_devices: int
    recompute: bool
    effort: int
    judge: Judge

    def __post_init__(self) -> None:
        self.model = StepModel(self.graph, self.cluster, self.batch_size, self.num_devices)
        self.sketches: dict[Sketch, float] = {}

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is tried, in order."""
        yield "no pipeline", self.try_replicated
        yield "graphpipe", self.try_graphpipe
        yield "chains", self.try_chains
        yield "several stages a device", self.try_interleaved
        yield "local search", self.try_local_search
        yield "polish", self.polish

    def try_replicated(self) -> None:
        plans = list_replicated(
            self.graph,
            self.cluster,
            self.batch_size,
            self.sizes,
            self.replicas,
            self.num_devices,
            recompute=self.recompute,
        )
        self.judge.consider("no pipeline", plans)
        self._note(plans)

    def try_graphpipe(self) -> None:
        """Those sizes first that do least work; those that can't be faster than the best plan not at all."""
        self._try_bottleneck()
        space = SearchSpace(self.graph, min(self.num_devices, _DEEPEST))
        pricings = [
            Pricing.make(
                self.graph,
                self.cluster,
                self.batch_size,
                size,
                self.num_devices,
                self.replicas,
                recompute=self.recompute,
                reduction=True,
            )
            for size in self.sizes
        ]
        work = {p.microbatch: p.num_microbatches * p.least_work / self.num_devices for p in pricings}
        for pricing in sorted(pricings, key=lambda p: work[p.microbatch]):
            if work[pricing.microbatch] >= self.judge.seconds:
                break
            found = dict[Sketch, float]()
            for search in space.searches(pricing, quick=True):
                best = bisect_bottleneck(search, self.judge.seconds / self.batch_size, _PRECISION)
                limits = [best.seconds * slack * (1 + 1e-9) for slack in SLACKS] if best else []
                for limit in limits:
                    for stages in self._solve(search, limit):
                        sketch = Sketch.of_stages(pricing.microbatch, stages)
                        found[sketch] = self.model.estimate(sketch)
            self._judge("graphpipe", found, 6)

    def _solve(self, search: StageSearch, limit: float) -> list[Sequence[Stage]]:
        if isinstance(search, TreeSearch):
            return list(search.solve_deeper(limit))
        stages = search.solve(limit)
        return [stages] if stages else []

    def _try_bottleneck(self) -> None:
        """The plan of GraphPipe itself, for the bottleneck of computation and transfers alone."""
        common: dict[str, Any] = {"microbatches": self.sizes, "replicas": self.replicas, "recompute": self.recompute}
        try:
            plan = graphpipe(self.graph, self.cluster, self.batch_size, num_devices=self.num_devices, **common)
        except PlanError:
            return  # nothing fits; the others will find the same
        self.judge.consider("graphpipe", [replace(plan, notes=())])
        self._note([plan])

    def try_chains(self) -> None:
        """PipeDream's plans and Piper's, as they are and with their stages as a graph."""
        graph, cluster, batch_size = self.graph, self.cluster, self.batch_size
        common: dict[str, Any] = {"microbatches": self.sizes, "replicas": self.replicas, "mode": self.judge.mode}
        common["num_devices"] = self.num_devices
        for_piper = common | {"max_down_sets": _PIPER_DOWN_SETS, "recompute": self.recompute}
        for name, search in (
            ("pipedream", lambda: pipedream(graph, cluster, batch_size, **common)),
            ("piper", lambda: piper(graph, cluster, batch_size, **for_piper)),
        ):
            try:
                plan = search()
            except PlanError:  # it has too many down-sets, or memory for none of its chains
                continue
            self.judge.consider(name, [plan], as_is=True)
            self.judge.consider(name, [plan])
            self.judge.consider(f"{name}'s stages as a graph", [replace(plan, chain=False)])
            self._note([plan])

    def try_interleaved(self) -> None:
        """Several stages on each device, whose fill and drain are shorter."""
        if self.judge.schedules != choose_schedules(self.graph):
            return  # the caller wants those timetables and no others
        plans = list_interleaved(self.graph, self.cluster, self.batch_size, self.sizes, self.replicas, self.num_devices)
        self.judge.consider("several stages a device", plans, as_is=True)

    def try_local_search(self) -> None:
        """From the best plans of each of the most promising micro-batch sizes."""
        by_size: dict[int, list[Sketch]] = {}
        for sketch in sorted(self.sketches, key=lambda s: self.sketches[s]):
            by_size.setdefault(sketch.microbatch, []).append(sketch)
        searches: dict[int, LocalSearch] = {}
        for size in list(by_size)[:_BEST_SIZES]:
            searches[size] = LocalSearch(self.model, self._moves((size,)))
            searches[size].add(by_size[size])
            self._judge("local search", searches[size].run(self.effort // 2 // _BEST_SIZES), _SIMULATED)
        # The other half of the effort is for the best size.
        if self.judge.best is not None and self.judge.best.microbatch in searches:
            search = searches[self.judge.best.microbatch]
            search.add([self._sketch_of(self.judge.best)])
            self._judge("local search", search.run(self.effort // 2), _SIMULATED)

    def polish(self) -> None:
        """Neighbours of the best plan, as long as one is faster; simulated, not only estimated."""
        moves, known = self._moves(self.sizes), set[Sketch]()
        while self.judge.best is not None and len(set(self.judge.best.rank_of)) == len(self.judge.best.stages):
            before = self.judge.seconds
            around = {s: self.model.estimate(s) for s in moves.of(self._sketch_of(self.judge.best)) if s not in known}
            around = {s: value for s, value in around.items() if value < before}
            self._judge("local search", around, _POLISHED)
            known |= set(around)
            if self.judge.seconds >= before:
                break

    def _moves(self, sizes: tuple[int, ...]) -> Moves:
        counts = list_replicas(self.num_devices, self.replicas)
        return Moves(self.graph, counts, sizes, self.num_devices, self.recompute)

    def _sketch_of(self, plan: PipelinePlan) -> Sketch:
        return Sketch.of_stages(plan.microbatch, [(s.ops, Variant(len(s.devices), s.recompute)) for s in plan.stages])

    def _note(self, plans: Sequence[PipelinePlan]) -> None:
        """Keep plans to begin the local search with."""
        for plan in plans:
            sketch = self._sketch_of(plan)
            self.sketches[sketch] = self.model.estimate(sketch)

    def _judge(self, kind: str, found: dict[Sketch, float], most: int) -> None:
        self.sketches |= found
        ranked = sorted(found, key=lambda sketch: found[sketch])[:most]
        ranked = [sketch for i, sketch in enumerate(ranked) if not i or found[sketch] < self.judge.seconds]
        self.judge.consider(kind, [plan for sketch in ranked for plan in self._make_plans(sketch)])

    def _make_plans(self, sketch: Sketch) -> Iterator[PipelinePlan]:
        """With devices in order, and where links differ also with large stages within nodes."""
        count = self.batch_size // sketch.microbatch
        links = self.cluster.links
        for aligned in (False,) if not isinstance(links, LinkMatrix) and len(links) < 2 else (False, True):
            stages = sketch.stages()
            yield make_plan(self.graph, self.cluster, stages, sketch.microbatch, count, aligned=aligned)
