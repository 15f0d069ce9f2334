"""The stages that a chain can be made of: each pair of down-sets, one within the other, and what lies between them.

The chain planners differ in the down-sets that they look at (the prefixes of one order; all of them) and in what a
stage may be (recomputed or not; transfers beside work or after it). All of them choose from a table like this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.schedule.costs import Link

NEVER = 1 << 13  # more stages, or devices, than any chain has; an int16, doubled too
_COUNT = np.int16


@dataclass(frozen=True)
class StageSpans:
    """Stage p is `cuts[end[p]]` without `cuts[start[p]]`; sorted by start.

    Args:
      graph: the operators.
      cuts: down-sets, as integers; the first is empty, the last is everything.
      start, end: int[P], indices into `cuts`.
    """

    graph: OpGraph
    cuts: tuple[int, ...]
    start: np.ndarray
    end: np.ndarray

    @cached_property
    def members(self) -> np.ndarray:
        """float[cuts, ops]: 1 for the operators in each cut."""
        size = len(self.graph.ops)
        rows = [np.frombuffer(cut.to_bytes(size // 8 + 1, "little"), np.uint8) for cut in self.cuts]
        return np.unpackbits(np.stack(rows), axis=1, count=size, bitorder="little").astype(float)

    def sum(self, of_ops: np.ndarray) -> np.ndarray:
        """float[P]: the sum of numbers of operators, float[ops], over each stage's."""
        totals = self.members @ of_ops
        return totals[self.end] - totals[self.start]

    @cached_property
    def traffic(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes per example that each stage gets from earlier ones, and that it gives later ones; each value once."""
        has = self.members.astype(bool).T  # [ops, cuts]
        received, sent = np.zeros(len(self.start)), np.zeros(len(self.start))
        by_source: dict[int, list[tuple[int, float]]] = {}
        for edge in self.graph.edges:
            by_source.setdefault(edge.source, []).append((edge.target, edge.bytes))
        for source, targets in by_source.items():
            before = has[source][self.start]
            inside = has[source][self.end] & ~before
            here, later = np.zeros(len(self.start)), np.zeros(len(self.start))
            for target, size in targets:
                done = has[target][self.end]
                np.maximum(here, size * (done & ~has[target][self.start]), out=here)
                np.maximum(later, size * ~done, out=later)
            received += here * before
            sent += later * inside
        return received, sent


def span_prefixes(graph: OpGraph, prefixes: Sequence[int]) -> StageSpans:
    """Every interval of one order of the operators, given its prefixes."""
    start, end = np.triu_indices(len(prefixes), k=1)
    return StageSpans(graph, tuple(prefixes), start.astype(np.int32), end.astype(np.int32))


def span_down_sets(graph: OpGraph, down_sets: Sequence[int], limit: int) -> StageSpans:
    """Every pair of down-sets, one within the other, given the smaller ones first.

    Raises:
      PlanError: there are more than `limit` pairs.
    """
    words = _words_of(down_sets, len(graph.ops))
    starts, ends, found = [], [], 0
    for i, row in enumerate(words):
        inside = (words[i + 1 :] & row) == row
        over = np.flatnonzero(inside.all(axis=1)) + i + 1
        found += len(over)
        if found > limit:
            raise PlanError(
                f"a graph of {len(graph.ops)} operators has {len(down_sets):,} down-sets and more than {limit:,} pairs "
                f"of them, one within the other (the first {i + 1:,} have {found:,}), which is where this search gives "
                "up: coarsen the graph, or plan with 'graphpipe' or 'auto', which don't list them"
            )
        starts.append(np.full(len(over), i, np.int32))
        ends.append(over.astype(np.int32))
    return StageSpans(graph, tuple(down_sets), np.concatenate(starts), np.concatenate(ends))


def _words_of(masks: Sequence[int], bits: int) -> np.ndarray:
    """uint64[masks, words]"""
    size = -(-bits // 64) * 8
    return np.stack([np.frombuffer(mask.to_bytes(size, "little"), np.uint64) for mask in masks])


@dataclass(frozen=True)
class Variant:
    """How a stage may be run: on how many devices, and whether its backward computes its forward again."""

    devices: int
    recompute: bool = False


@dataclass(frozen=True)
class StageChoices:
    """What each stage costs in each variant, for one micro-batch size.

    Args:
      spans: the stages.
      variants: V of them, those with fewer devices first.
      seconds: float[V, P]: of one micro-batch, by the planner's own measure.
      max_depth: int[V, P]: how many stages there can be from this one to the last for it to fit into memory; 0 if it
        never does, `NEVER` if it always does.
      work: float[cuts]: device-seconds that the operators in each cut need at least.
    """

    spans: StageSpans
    variants: tuple[Variant, ...]
    seconds: np.ndarray
    max_depth: np.ndarray
    work: np.ndarray


def price_stages(
    spans: StageSpans,
    cluster: ClusterSpec,
    microbatch: int,
    num_microbatches: int,
    variants: Sequence[Variant],
    *,
    link: Link,
    overlap: bool,
) -> StageChoices:
    """Make the table for one micro-batch size.

        compute = F + B on b / d examples
        seconds = max(compute, transfer) + reduce / M       when transfers overlap with work (PipeDream)
        seconds = compute + 2 transfers + reduce / M        when they don't (Piper)

    Args:
      spans: the stages.
      cluster: its slowest device and its smallest memory count.
      microbatch: b, over all replicas.
      num_microbatches: M.
      variants: those to consider; b must be divisible by their devices.
      link: between two stages; it is taken to be as good for replicas, each with its part.
      overlap: whether transfers take place beside work.
    """
    graph = spans.graph
    slowdown = cluster.slowdown(range(cluster.num_devices), graph.device)
    memory = min(device.memory_bytes for device in cluster.devices)
    received, sent = spans.traffic
    gradient, residual = spans.sum(graph.gradient_bytes), spans.sum(graph.residual_bytes)
    static = spans.sum(graph.state_bytes) + gradient
    seconds, max_depth, work = [], [], []
    for variant in variants:
        rows = microbatch / variant.devices
        forward, backward = (slowdown * x for x in (graph.forward_seconds(rows), graph.backward_seconds(rows)))
        of_ops = 2 * forward + backward if variant.recompute else forward + backward
        compute = spans.sum(of_ops)
        transfer = np.maximum(received, sent) * rows / link.bandwidth
        reduce = _reduce_seconds(cluster, variant.devices, gradient) / num_microbatches
        seconds.append((np.maximum(compute, transfer) if overlap else compute + 2 * (transfer + link.latency)) + reduce)
        kept = received * rows if variant.recompute else residual * rows
        once = residual * rows if variant.recompute else 0.0
        max_depth.append(_count_depth(memory - static - once, kept, num_microbatches))
        work.append(variant.devices * (forward + backward))
    return StageChoices(
        spans, tuple(variants), np.stack(seconds), np.stack(max_depth), spans.members @ np.min(work, axis=0)
    )


def _count_depth(room: np.ndarray, kept: np.ndarray, num_microbatches: int) -> np.ndarray:
    """The greatest depth at which `min(M, depth)` micro-batches of `kept` bytes have room."""
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = np.where(kept > 0, np.floor(room / kept * (1 + 1e-12)), np.inf)
    fit = np.where(room >= 0, fit, 0)
    depth = np.where(fit >= num_microbatches, NEVER, np.clip(fit, 0, NEVER))
    return depth.astype(_COUNT)


def _reduce_seconds(cluster: ClusterSpec, devices: int, gradient: np.ndarray) -> np.ndarray:
    """The all-reduce of neighbouring replicas; linear in the bytes, so that two sizes tell it."""
    if devices == 1:
        return np.zeros_like(gradient)
    ids = range(devices)
    fixed, unit = cluster.all_reduce_seconds(ids, 0.0), 2.0**30
    slope = (cluster.all_reduce_seconds(ids, unit) - fixed) / unit
    return np.where(gradient > 0, fixed + slope * gradient, 0.0)
