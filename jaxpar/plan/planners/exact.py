"""The best plan of a small graph, by trying all of them: the oracle of the other planners.

All divisions of the operators into stages whose graph has no cycle, with all replica counts and micro-batch sizes, are
gone through, and parts of divisions that can't become better than the best plan so far are left. It is exponential:
some twelve operators and six devices are what it is for.

Two things can be asked for. The *bottleneck* is the seconds per example of the slowest stage, what GraphPipe and the
planners for chains make small. The *step* is the simulated time of a whole step, with fill, drain, transfers, gradient
reduction and update: the plans are simulated in the order of a lower bound of that time, until the bound of the next
one is no less than the best time found.

Stages get neighbouring devices in topological order. Where all devices are equal and joined by equal links, as an
oracle wants it, that is no restriction.
"""

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from jaxpar.errors import PlanError
from jaxpar.plan.acyclic_partitions import Division
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import members_of
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.exact_costs import StagePrice, StagePrices
from jaxpar.plan.planners.options import Replicas, count_devices, list_microbatches, list_replicas
from jaxpar.plan.predict import estimate_step, predict
from jaxpar.schedule.simulate import Mode

TEXTBOOK: tuple[tuple[str, Mapping[str, Any]], ...] = (("1f1b", {"extra": 0}),)
_SHORTER = 1 - 1e-12  # a time below this share of another is less, and not by rounding


def exact(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    *,
    objective: Literal["step", "bottleneck"] = "step",
    mode: Mode = "free",
    schedules: Sequence[tuple[str, Mapping[str, Any]]] = TEXTBOOK,
    recompute: bool = False,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    num_devices: int | None = None,
    max_divisions: int = 2_000_000,
    max_plans: int = 500_000,
    progress: bool = False,
) -> PipelinePlan:
    """The plan with the least bottleneck, or the one with the least simulated step.

    Args:
      graph: up to some twelve operators.
      cluster: up to some six devices; equal ones on equal links for the result to be the best there is.
      batch_size: examples in a step.
      objective: "step" or "bottleneck".
      mode: how steps are simulated, see `jaxpar.schedule.simulate`.
      schedules: names and options of those to try for a step; plans that don't fit with them are left out. For the
        bottleneck it is 1F1B with as many micro-batches in flight as a stage's depth, which none has less than.
      recompute: whether stages may also compute their forward again in the backward.
      microbatches: micro-batch sizes to try; None for the powers of two that divide the batch.
      replicas: replica counts to try.
      num_devices: how many devices may be used; None for all.
      max_divisions: how many divisions are looked at for each micro-batch size, at most.
      max_plans: how many plans there may be whose bound is below the best time so far, at most.
      progress: print what is being done.

    Raises:
      PlanError: no plan fits into memory; or the search is larger than a limit, and how large it was when it stopped.

    >>> from jaxpar.plan.op_graph import Op
    >>> ops = [Op("a", 2e-3), Op("b", 2e-3), Op("join", 1e-3)]
    >>> graph = OpGraph.build(ops, [("a", "join"), ("b", "join")])
    >>> plan = exact(graph, ClusterSpec.preset("cpu", 2), 8, objective="bottleneck", replicas="any", microbatches=[1])
    >>> [stage.ops for stage in plan.stages], plan.bottleneck
    ([(1,), (0, 2)], 0.003)
    """
    started = time.perf_counter()
    count = count_devices(cluster, num_devices)
    ways = [Variant(d, r) for d in list_replicas(count, replicas) for r in (False, True)[: 1 + recompute]]
    tables = [
        StagePrices(
            graph,
            cluster,
            size,
            batch_size // size,
            tuple(way for way in ways if size % way.devices == 0),
            count,
            max_divisions,
        )
        for size in list_microbatches(batch_size, microbatches)
    ]
    best = _find_least_bottleneck(tables)
    if best is None:
        raise PlanError(_explain_misfit(tables[0]))
    plan = _make_plan(best, TEXTBOOK[0])
    if objective == "step":
        plan = _find_least_step(tables, plan, mode, schedules, max_plans, progress)
    return replace(plan, planner="exact", search_seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Candidate:
    """Stages in topological order, each with its price."""

    prices: StagePrices
    stages: tuple[tuple[int, StagePrice], ...]


def _find_least_bottleneck(tables: Sequence[StagePrices]) -> _Candidate | None:
    """Branch and bound: each stage has the fewest devices that make it faster than the best bottleneck so far."""
    best, least = None, math.inf

    def cheapest(prices: StagePrices, stage: int, depth: int) -> StagePrice | None:
        limit = least * prices.microbatch * _SHORTER
        return _fewest_devices(price for price in prices.fitting(stage, depth) if price.seconds < limit)

    for prices in tables:
        for division in prices.divisions(partial(cheapest, prices)):
            while True:  # with more devices for what is slowest, until there are no more
                chosen = [(k, cheapest(prices, division.stages[k], division.depth[k])) for k in division.order()]
                stages = tuple((division.stages[k], price) for k, price in chosen if price)
                if len(stages) < len(chosen) or sum(p.variant.devices for _, p in stages) > prices.num_devices:
                    break
                least = max(price.seconds for _, price in stages) / prices.microbatch
                best = _Candidate(prices, stages)
    return best


def _fewest_devices(prices: Iterable[StagePrice]) -> StagePrice | None:
    return min(prices, key=lambda price: price.variant.devices, default=None)


@dataclass
class _Best:
    """The fastest plan so far that fits."""

    plan: PipelinePlan
    mode: Mode
    seconds: float = math.inf
    simulated: int = 0

    def offer(self, plan: PipelinePlan) -> None:
        """Take the plan if it is faster."""
        self.simulated += 1
        seconds = predict(plan, self.mode).step_seconds
        if seconds < self.seconds and _fits(plan):
            self.plan, self.seconds = plan, seconds

    def beats(self, bound: float) -> bool:
        """Whether nothing that takes `bound` or longer is of interest."""
        return bound >= self.seconds * _SHORTER


def _fits(plan: PipelinePlan) -> bool:
    try:
        plan.check()
    except PlanError:
        return False
    return True


def _find_least_step(
    tables: Sequence[StagePrices],
    start: PipelinePlan,
    mode: Mode,
    schedules: Sequence[tuple[str, Mapping[str, Any]]],
    max_plans: int,
    progress: bool,
) -> PipelinePlan:
    """Simulate plans in the order of their bounds: first one that is quick to compute, then that of `estimate_step`."""
    best = _Best(start, mode)
    for name, options in schedules:
        best.offer(replace(start, schedule=name, schedule_options=options))
    whole = not any(replace(start, schedule=name).may_split_backward for name, _ in schedules)
    queue: list[tuple[float, int, _Candidate | PipelinePlan]] = []
    lowest = math.inf
    for bound, candidate in _list_candidates(tables, best, whole):
        queue.append((bound, len(queue), candidate))
        if bound < lowest:  # likely to be good, which shortens the list
            lowest = bound * 0.99
            best.offer(_make_plan(candidate, schedules[0]))
        if len(queue) > max_plans:
            raise PlanError(
                f"the exact search has found {max_plans:,} plans whose bound is below the best step so far, "
                f"{best.seconds:.4g} s, and is not done: raise max_plans, give fewer microbatches, or plan with 'auto'"
            )
    heapq.heapify(queue)
    ticket, listed = itertools.count(len(queue)), len(queue)
    while queue and not best.beats(queue[0][0]):
        _, _, item = heapq.heappop(queue)
        if isinstance(item, PipelinePlan):
            best.offer(item)
            continue
        for schedule in schedules:
            plan = _make_plan(item, schedule)
            heapq.heappush(queue, (estimate_step(plan), next(ticket), plan))
    if progress:
        print(f"exact: {listed:,} plans listed, {best.simulated:,} simulated, the best takes {best.seconds:.4g} s")
    if best.seconds == math.inf:
        names = ", ".join(f"{name} {dict(options)}" for name, options in schedules)
        raise PlanError(f"plans fit into memory with 1F1B and no extra micro-batches in flight, but none with {names}")
    return best.plan


def _list_candidates(
    tables: Sequence[StagePrices], best: _Best, whole_backwards: bool
) -> Iterator[tuple[float, _Candidate]]:
    """All plans whose bound is below the best time so far, with their bounds."""

    def good(prices: StagePrices, stage: int, depth: int) -> list[StagePrice]:
        count = prices.num_microbatches
        return [price for price in prices.fitting(stage, depth) if not best.beats(count * price.seconds + price.after)]

    def cheapest(prices: StagePrices, stage: int, depth: int) -> StagePrice | None:
        return _fewest_devices(good(prices, stage, depth))

    for prices in tables:
        for division in prices.divisions(partial(cheapest, prices)):
            offers = (good(prices, *pair) for pair in zip(division.stages, division.depth, strict=True))
            for chosen in itertools.product(*offers):
                if sum(price.variant.devices for price in chosen) <= prices.num_devices:
                    bound = _bound_step(division, chosen, prices.num_microbatches, whole_backwards)
                    if not best.beats(bound):
                        stages = tuple((division.stages[k], chosen[k]) for k in division.order())
                        yield bound, _Candidate(prices, stages)


def _bound_step(
    division: Division, chosen: Sequence[StagePrice], num_microbatches: int, whole_backwards: bool
) -> float:
    """Fill to a stage, its work, drain from it, whichever stage makes most of it; transfers left out.

    Where backwards may be split, the last thing that a stage does may be a W, after which nothing drains.
    """
    order = division.order()
    fill, drain = [0.0] * len(order), [0.0] * len(order)
    for k in order:
        for other in range(len(order)):
            if division.feeds[k] >> other & 1:
                fill[other] = max(fill[other], fill[k] + chosen[k].forward)
                if whole_backwards:
                    drain[other] = max(drain[other], drain[k] + chosen[k].backward)
    makespan = max(fill[k] + num_microbatches * chosen[k].seconds + drain[k] for k in order)
    return makespan + max(price.after for price in chosen)


def _make_plan(candidate: _Candidate, schedule: tuple[str, Mapping[str, Any]]) -> PipelinePlan:
    prices, stages, first = candidate.prices, [], 0
    for members, price in candidate.stages:
        devices = tuple(range(first, first + price.variant.devices))
        stages.append(PlannedStage(members_of(members), devices, price.variant.recompute))
        first += price.variant.devices
    name, options = schedule
    return PipelinePlan(
        prices.graph, prices.cluster, tuple(stages), prices.microbatch, prices.num_microbatches, name, options
    )


def _explain_misfit(prices: StagePrices) -> str:
    """Why there is no plan at all, with the smallest micro-batch."""
    alone = [(op.name, max((p.room for p in prices.of(1 << i)), default=-1)) for i, op in enumerate(prices.graph.ops)]
    large = [repr(name) for name, room in alone if room < 1]
    memory = min(device.memory_bytes for device in prices.cluster.devices)
    whole = float(prices.graph.state_bytes.sum() + prices.graph.gradient_bytes.sum())
    why = f"no device has room for {', '.join(large)} alone" if large else "no division of them fits"
    return (
        f"no plan of {prices.graph.num_ops} operators fits into {prices.num_devices} devices of {memory:.4g} bytes, "
        f"even with micro-batches of {prices.microbatch}: state and gradients are {whole:.4g} bytes, and {why}; more "
        "devices, smaller micro-batches, recompute=True or finer operators would help"
    )
