"""From the stages that a chain planner may choose to the plan that it gives: the best of all micro-batch sizes.

The planners for chains find the least bottleneck for a micro-batch size. A step also fills and drains, more so with
more stages and larger micro-batches, so each size gives several chains, from the one with the least bottleneck to ones
with fewer stages, and they are judged by their step: by `estimate_step` first, the most promising by simulation.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.coarsen import Coarsening, coarsen
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.chain_search import SLACKS, Chain, search_chains
from jaxpar.plan.planners.chain_stages import StageSpans, Variant, price_stages
from jaxpar.plan.planners.misfit import explain_misfit
from jaxpar.plan.planners.options import Replicas, count_devices, list_microbatches, list_replicas
from jaxpar.plan.predict import estimate_step, predict
from jaxpar.schedule.costs import Link
from jaxpar.schedule.simulate import Mode

Select = Literal["step", "bottleneck"]
_SIMULATED = 8  # plans; the bound is close, so that the best is nearly always the first or the second


@dataclass(frozen=True)
class ChainOptions:
    """What a chain planner is asked for: the options that all planners take, and those of chains.

    Args:
      microbatches, replicas, num_devices, progress: see `jaxpar.plan.planners.plan`.
      select: "bottleneck" takes, for each micro-batch size, the chain with the least bottleneck, as the papers do;
        "step" judges chains with fewer stages too.
      mode: how steps are simulated, see `jaxpar.schedule.simulate`.
      max_ops: larger graphs are coarsened to so many blocks.
    """

    microbatches: Sequence[int] | None
    replicas: Replicas
    num_devices: int | None
    progress: bool
    select: Select
    mode: Mode
    max_ops: int


def plan_chains(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    list_spans: Callable[[OpGraph], Sequence[StageSpans]],
    options: ChainOptions,
    *,
    planner: str,
    overlap: bool,
    recompute: bool,
) -> PipelinePlan:
    """The best chain of stages.

    Args:
      graph, cluster, batch_size: as for all planners.
      list_spans: from the graph of blocks to the stages to choose from; several tables are searched in turn.
      options: what the user asks for.
      planner: its name.
      overlap: whether transfers take place beside work, see `price_stages`.
      recompute: whether stages may compute their forward again.

    Raises:
      PlanError: no chain fits into memory; or what `list_spans` raises.
    """
    started = time.perf_counter()
    count = count_devices(cluster, options.num_devices)
    ways = [Variant(d, r) for d in list_replicas(count, options.replicas) for r in (False, True)[: 1 + recompute]]
    blocks = coarsen(graph, options.max_ops)
    tables = list_spans(blocks.graph)
    slacks = SLACKS if options.select == "step" else SLACKS[:1]
    plans: dict[tuple[int, tuple[PlannedStage, ...]], PipelinePlan] = {}
    for size in list_microbatches(batch_size, options.microbatches):
        fitting = [way for way in ways if size % way.devices == 0]
        for spans in tables:
            for link in _links_between(cluster, count):
                choices = price_stages(spans, cluster, size, batch_size // size, fitting, link=link, overlap=overlap)
                for chain in search_chains(choices, count, slacks=slacks):
                    for stages in _place(chain, blocks):
                        plans.setdefault((size, stages), _make_plan(graph, cluster, stages, size, batch_size // size))
        if options.progress:
            print(f"{planner}: micro-batch {size}, {len(plans)} chains, {time.perf_counter() - started:.1f} s")
    best = _judge(list(plans.values()), options.mode)
    if best is None:
        given = (options.microbatches, options.replicas)
        raise PlanError(explain_misfit(graph, cluster, batch_size, count, *given, recompute=recompute))
    return replace(best, planner=planner, search_seconds=time.perf_counter() - started)


def _links_between(cluster: ClusterSpec, num_devices: int) -> list[Link]:
    """The links that neighbouring stages may have: the best of neighbouring devices, and the worst."""
    links = {cluster.link(i, i + 1) for i in range(num_devices - 1)} or {Link()}
    both = (max(links, key=lambda link: link.bandwidth), min(links, key=lambda link: link.bandwidth))
    return list(dict.fromkeys(both))


def _place(chain: Chain, blocks: Coarsening) -> Iterator[tuple[PlannedStage, ...]]:
    """The chain on devices one after the other; and with the widest stages first, which are then in as few nodes."""
    sizes = [variant.devices for _, variant in chain.stages]
    for order in (range(len(sizes)), sorted(range(len(sizes)), key=lambda s: -sizes[s])):
        devices: dict[int, tuple[int, ...]] = {}
        first = 0
        for s in order:
            devices[s] = tuple(range(first, first + sizes[s]))
            first += sizes[s]
        yield tuple(
            PlannedStage(blocks.expand(ops), devices[s], variant.recompute)
            for s, (ops, variant) in enumerate(chain.stages)
        )


def _make_plan(
    graph: OpGraph, cluster: ClusterSpec, stages: tuple[PlannedStage, ...], microbatch: int, num_microbatches: int
) -> PipelinePlan:
    options = {"extra": 0}
    return PipelinePlan(graph, cluster, stages, microbatch, num_microbatches, "1f1b", options, chain=True)


def _judge(plans: Sequence[PipelinePlan], mode: Mode) -> PipelinePlan | None:
    """The plan with the shortest simulated step, of those with the least bounds."""
    bounds = sorted((estimate_step(plan), i) for i, plan in enumerate(plans))
    best, least, simulated = None, math.inf, 0
    for bound, i in bounds:
        if bound >= least or simulated == _SIMULATED:
            break
        if _fits(plans[i]):
            simulated += 1
            seconds = predict(plans[i], mode).step_seconds
            if seconds < least:
                best, least = plans[i], seconds
    return best


def _fits(plan: PipelinePlan) -> bool:
    try:
        plan.check()
    except PlanError:
        return False
    return True
