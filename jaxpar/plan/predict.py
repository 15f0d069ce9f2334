"""How long a step of a plan takes and how much memory its devices need, before anything is built.

The pipeline's part is the simulated timetable, by the executor's ticks or with ranks that run freely; then each stage
adds up its gradients over its replicas and updates its state. `estimate_step` is the bound that searches use instead of
a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.schedule.simulate import Mode

if TYPE_CHECKING:
    from jaxpar.plan.pipeline import PipelinePlan


@dataclass(frozen=True)
class Prediction:
    """What a step of a plan is thought to take.

    Args:
      step_seconds: the whole step: `makespan + reduce_seconds + update_seconds`.
      throughput: examples per second.
      makespan: seconds of the timetable.
      reduce_seconds: of the all-reduce of gradients, on the rank that takes longest for it and its update.
      update_seconds: of that rank's update: its state read and written, its gradients read, at memory bandwidth.
      bubble_fraction: the idle share of all devices' time during the timetable.
      memory_bytes: for each stage, bytes on each of its devices; of stages that share devices, each its own part.
      in_flight: for each stage, the most micro-batches from F to B at once.
      lower_bound: `estimate_step` of the plan.
    """

    step_seconds: float
    throughput: float
    makespan: float
    reduce_seconds: float
    update_seconds: float
    bubble_fraction: float
    memory_bytes: tuple[float, ...]
    in_flight: tuple[int, ...]
    lower_bound: float


def stage_seconds(
    graph: OpGraph,
    cluster: ClusterSpec,
    ops: Sequence[int],
    devices: Sequence[int],
    microbatch: int,
    recompute: bool = False,
) -> tuple[float, float, float]:
    """Seconds of F, I and W of a stage for one micro-batch.

    Each of the d replicas has b / d examples, and the slowest counts. A stage that recomputes does its forward again
    before its backward, which counts to I.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op("a", 1.0, 1.0, 0.5), Op("b", 2.0, 2.0, 1.0)], [("a", "b")])
    >>> stage_seconds(graph, ClusterSpec.preset("cpu", 4), [0, 1], [0, 1], 4)
    (6.0, 6.0, 3.0)
    """
    n = microbatch / len(devices)
    slower = cluster.slowdown(devices, graph.device)
    at = np.asarray(ops, dtype=np.intp)
    forward = float(graph.forward_seconds(n)[at].sum()) * slower
    for_inputs = float(graph.input_backward_seconds(n)[at].sum()) * slower
    for_weights = float(graph.weight_backward_seconds(n)[at].sum()) * slower
    return forward, for_inputs + forward * recompute, for_weights


def stage_memory(plan: PipelinePlan, stage: int, in_flight: float) -> float:
    """Bytes on each device of a stage that has `in_flight` micro-batches between F and B.

        state + gradients + in_flight * residuals of b/d examples

    A stage that recomputes keeps what it receives instead of residuals, and the residuals of one micro-batch.
    """
    ops = plan.op_arrays[stage]
    here = plan.stages[stage]
    rows = plan.microbatch / len(here.devices)
    fixed = float(plan.graph.state_bytes[ops].sum() + plan.graph.gradient_bytes[ops].sum())
    residuals = float(plan.graph.residual_bytes[ops].sum()) * rows
    if here.recompute:
        return fixed + residuals + in_flight * plan.received_bytes[stage] * rows
    return fixed + in_flight * residuals


def reduce_and_update(plan: PipelinePlan) -> tuple[float, float]:
    """Seconds of the gradients' all-reduce and of the update, of the rank for which they take longest together."""
    worst = (0.0, 0.0)
    if not plan.graph.has_backward:
        return worst
    for rank, devices in enumerate(plan.rank_devices):
        stages = [s for s, r in enumerate(plan.rank_of) if r == rank]
        gradients = sum(float(plan.graph.gradient_bytes[plan.op_arrays[s]].sum()) for s in stages)
        state = sum(float(plan.graph.state_bytes[plan.op_arrays[s]].sum()) for s in stages)
        bandwidth = min(plan.cluster.devices[d].memory_bandwidth for d in devices)
        here = (plan.cluster.all_reduce_seconds(devices, gradients), (2 * state + gradients) / bandwidth)
        worst = max(worst, here, key=sum)
    return worst


def predict(plan: PipelinePlan, mode: Mode = "executor") -> Prediction:
    """Simulate the plan's timetable, and add what comes after it.

    Links are those between two ranks at a time: that messages of different pairs of ranks, or all-reduces of different
    ranks, may share a node's way out is not in it.

    Args:
      plan: what to predict.
      mode: "executor" for the lockstep of ticks that jaxpar runs; "free" for ranks that run freely, as the literature
        has it.

    Raises:
      PlanError: the stages form a cycle.
      ScheduleError: the schedule or its options are unknown, or not for such a stage graph.
    """
    makespan, in_flight = _time_schedule(plan, mode)
    reduce_seconds, update_seconds = reduce_and_update(plan)
    step = makespan + reduce_seconds + update_seconds
    return Prediction(
        step_seconds=step,
        throughput=plan.batch_size / step if step else float("inf"),
        makespan=makespan,
        reduce_seconds=reduce_seconds,
        update_seconds=update_seconds,
        bubble_fraction=_weigh_bubble(plan, makespan),
        memory_bytes=tuple(stage_memory(plan, s, in_flight[s]) for s in range(len(plan.stages))),
        in_flight=in_flight,
        lower_bound=estimate_step(plan),
    )


def _time_schedule(plan: PipelinePlan, mode: Mode) -> tuple[float, tuple[int, ...]]:
    """Makespan and each stage's most micro-batches in flight; without a timetable where there is a quicker way."""
    run = plan.quick_run
    if run is None or mode not in ("executor", "free"):
        return plan.simulate(mode).makespan, plan.timetable.peak_in_flight
    return run.time_lockstep(plan.costs) if mode == "executor" else run.time_freely(plan.costs), run.peak_in_flight


def _weigh_bubble(plan: PipelinePlan, makespan: float) -> float:
    """As `Simulation.bubble_fraction`, but each rank counts as many times as it has devices."""
    total = sum(map(len, plan.rank_devices)) * makespan
    each = (len(stage.devices) * sum(times) for stage, times in zip(plan.stages, plan.stage_times, strict=True))
    return 1 - plan.num_microbatches * sum(each) / total if total else 0.0


def estimate_step(plan: PipelinePlan) -> float:
    """Seconds that a step of the plan takes at least, in a time that doesn't depend on the number of micro-batches.

    It bounds the free-running simulation from below, and so the executor's. With `head(s)` the longest way of a
    micro-batch from the inputs to the start of F(s), `tail(s)` that of its cotangents from the end of B(s) to the end
    of the step, `trip(s)` from the start of F(s) to the end of B(s), t the seconds of F and B, and L the most
    micro-batches that the schedule lets s hold:

        rank     min head + M * t + min tail         over and of the stages of a rank, which does one thing at a time
        memory   head(s) + k * trip(s) + max(trip(s), (M - k L) * t(s)) + tail(s)        k = floor((M - 1) / L)

    since F(s, m + L) waits for B(s, m). Of a balanced chain with free transfers it is the time itself. For a schedule
    that splits backwards, the last thing that a rank does may be a W, which nothing waits for: the tail then counts
    from the last I.

    Raises:
      PlanError: the stages form a cycle.
    """
    ways = _Ways(plan)
    bound = max(ways.bound_ranks(), ways.bound_memory())
    return bound + sum(reduce_and_update(plan))


class _Ways:
    """Longest ways of one micro-batch through the stages, with transfers, which need no timetable."""

    def __init__(self, plan: PipelinePlan):
        self.plan, costs, dag = plan, plan.costs, plan.dag
        self.split = plan.may_split_backward
        self.forward = costs.forward
        whole = costs.backward or (0.0,) * dag.num_stages
        # I in place of B where backwards may be split: nothing waits for W.
        self.back = costs.input_backward if self.split and costs.input_backward else whole
        self.transfer = {edge: costs.transfer_of(dag, *edge) for edge in dag.forward + dag.backward}
        self.work = [f + b for f, b in zip(self.forward, whole, strict=True)]
        self.head = [0.0] * dag.num_stages
        for s in dag.forward_order:
            arrivals = [self.head[p] + self.forward[p] + self.transfer[p, s] for p in dag.forward_sources[s]]
            self.head[s] = max(arrivals, default=0.0)
        self.tail = [0.0] * dag.num_stages
        for s in reversed(dag.backward_order):
            for p in dag.backward_sources[s]:
                self.tail[p] = max(self.tail[p], self.tail[s] + self.back[s] + self.transfer[p, s])

    def bound_ranks(self) -> float:
        plan = self.plan
        count, bound = plan.num_microbatches, 0.0
        for rank in range(len(plan.rank_devices)):
            stages = [s for s, r in enumerate(plan.rank_of) if r == rank]
            head, tail = (min(ways[s] for s in stages) for ways in (self.head, self.tail))
            until_i = sum(self.forward[s] + self.back[s] for s in stages) if plan.graph.has_backward else 0.0
            work = sum(self.work[s] for s in stages)
            bound = max(bound, head + count * work + (0.0 if self.split else tail), head + count * until_i + tail)
        return bound

    def bound_memory(self) -> float:
        bound = 0.0
        if not self.plan.graph.has_backward:
            return bound
        count, limits = self.plan.num_microbatches, self.plan.in_flight_limit
        for s, limit in enumerate(limits):
            trip, rounds = self.trip(s), (count - 1) // limit
            rest = (count - rounds * limit) * (self.forward[s] + self.back[s])
            bound = max(bound, self.head[s] + rounds * trip + max(trip, rest) + self.tail[s])
        return bound

    def trip(self, stage: int) -> float:
        """Seconds from the start of F(stage) to the end of its B, for a micro-batch that waits for no other."""
        dag = self.plan.dag
        # Both count from the start of F(stage): to the end of the F, and of the B, of each stage on the way.
        ready: dict[int, float] = {stage: self.forward[stage]}
        for s in dag.forward_order:
            arrivals = [ready[p] + self.transfer[p, s] for p in dag.forward_sources[s] if p in ready]
            if arrivals and s != stage:
                ready[s] = max(arrivals) + self.forward[s]
        done: dict[int, float] = {}
        for s in dag.backward_order:
            if s in ready:
                arrivals = [done[p] + self.transfer[p, s] for p in dag.backward_sources[s] if p in done]
                done[s] = max([ready[s], *arrivals]) + self.back[s]
        return done[stage]
