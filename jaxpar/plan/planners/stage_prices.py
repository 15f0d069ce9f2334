"""What many stages cost at once: seconds and the depth that their memory allows, for each way to run them.

A planner lists the sets of operators that it may make stages of; this file tells, for each bottleneck that it tries,
with how few devices each of them will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.planners.options import Replicas, list_replicas

FAR = np.int32(1 << 20)  # more devices, or stages in a row, than there ever are; 64 of them still fit the type
ROUNDING = 1 + 1e-12

Counts = NDArray[np.int32]


@dataclass(frozen=True)
class StageSets:
    """Sets of operators that may become stages, with what doesn't depend on the micro-batch; bytes are per example.

    Args:
      graph: the operators.
      members: `bool[S, ops]`.
    """

    graph: OpGraph
    members: NDArray[np.bool_]

    @classmethod
    def of(cls, graph: OpGraph, sets: Sequence[Sequence[int]]) -> "StageSets":
        """From the operators of each."""
        members = np.zeros((len(sets), graph.num_ops), dtype=bool)
        for row, ops in zip(members, sets, strict=True):
            row[list(ops)] = True
        return cls(graph, members)

    def sum(self, of_ops: NDArray[np.float64]) -> NDArray[np.float64]:
        """`float[S]`, or `float[S, k]` for `float[ops, k]`: sums over the operators of each set."""
        return self._weights @ of_ops

    @cached_property
    def _weights(self) -> NDArray[np.float64]:
        return self.members.astype(np.float64)

    @cached_property
    def fixed_bytes(self) -> NDArray[np.float64]:
        """State and gradients."""
        return self.sum(self.graph.state_bytes + self.graph.gradient_bytes)

    @cached_property
    def gradient_bytes(self) -> NDArray[np.float64]:
        """What replicas reduce."""
        return self.sum(self.graph.gradient_bytes)

    @cached_property
    def state_bytes(self) -> NDArray[np.float64]:
        """Weights and optimizer state."""
        return self.sum(self.graph.state_bytes)

    @cached_property
    def residual_bytes(self) -> NDArray[np.float64]:
        """Kept from F to B."""
        return self.sum(self.graph.residual_bytes)

    @cached_property
    def traffic(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What each set receives and sends, each value once."""
        received, sent = np.zeros(len(self.members)), np.zeros(len(self.members))
        columns = np.ascontiguousarray(self.members.T)
        for source, targets in enumerate(self.graph.successors):
            if targets:
                inside, outside = np.zeros(len(received)), np.zeros(len(received))
                for target in targets:
                    size = self.graph.edge_bytes[source, target]
                    np.maximum(inside, size * columns[target], out=inside)
                    np.maximum(outside, size * ~columns[target], out=outside)
                received += inside * ~columns[source]
                sent += outside * columns[source]
        return received, sent


@dataclass(frozen=True)
class Pricing:
    """How stages are priced for one micro-batch size.

    Devices are taken to be as slow as the slowest and to have as little memory as the smallest.

    Args:
      graph, cluster: what is planned for what.
      microbatch: b, over all replicas.
      num_microbatches: M.
      num_devices: how many there are to use.
      variants: ways to run a stage, those with fewer devices first; each divides b.
      extra: micro-batches in flight beyond the depth.
      transfers: whether a stage takes at least as long as its values are on their way.
      reduction: whether a stage's share of the reduction of gradients and of the update counts to its seconds.
    """

    graph: OpGraph
    cluster: ClusterSpec
    microbatch: int
    num_microbatches: int
    num_devices: int
    variants: tuple[Variant, ...]
    extra: int = 0
    transfers: bool = True
    reduction: bool = False

    @classmethod
    def make(
        cls,
        graph: OpGraph,
        cluster: ClusterSpec,
        batch_size: int,
        microbatch: int,
        num_devices: int,
        replicas: Replicas = "powers_of_two",
        *,
        recompute: bool = False,
        extra: int = 0,
        transfers: bool = True,
        reduction: bool = False,
    ) -> "Pricing":
        """With all replica counts that divide the micro-batch."""
        counts = [d for d in list_replicas(num_devices, replicas) if microbatch % d == 0]
        variants = tuple(Variant(d, r) for d in counts for r in (False, True)[: 1 + recompute])
        count = batch_size // microbatch
        return cls(graph, cluster, microbatch, count, num_devices, variants, extra, transfers, reduction)

    @cached_property
    def op_seconds(self) -> NDArray[np.float64]:
        """`float[ops, V]`: F and B of one micro-batch."""
        slowdown = self.cluster.slowdown(range(self.cluster.num_devices), self.graph.device)
        columns = []
        for variant in self.variants:
            rows = self.microbatch / variant.devices
            forward = self.graph.forward_seconds(rows)
            columns.append(slowdown * ((1 + variant.recompute) * forward + self.graph.backward_seconds(rows)))
        return np.stack(columns, axis=1)

    @cached_property
    def least_work(self) -> float:
        """Device-seconds that a micro-batch needs at least."""
        devices = np.array([variant.devices for variant in self.variants])
        return float((self.op_seconds * devices).min(axis=1).sum())

    @cached_property
    def memory(self) -> float:
        """Bytes of the smallest device."""
        return min(device.memory_bytes for device in self.cluster.devices)

    def price(self, sets: StageSets) -> "StageTable":
        """The table of some stages."""
        seconds = sets.sum(self.op_seconds).T.copy()
        for row, variant in zip(seconds, self.variants, strict=True):
            if self.transfers and self.num_devices > 1:
                np.maximum(row, self._time_transfers(sets, variant), out=row)
            if self.reduction and self.graph.has_backward:
                row += self.time_after(sets, variant) / self.num_microbatches
        return StageTable(self, seconds, self._count_depths(sets))

    def _time_transfers(self, sets: StageSets, variant: Variant) -> NDArray[np.float64]:
        """Seconds for which the busier direction of a stage's links is busy, as if they were the slowest there are."""
        link = self.cluster.link(0, self.num_devices - 1)
        busiest = np.maximum(*sets.traffic)
        return busiest * (self.microbatch / variant.devices / link.bandwidth)

    def time_after(self, sets: StageSets, variant: Variant) -> NDArray[np.float64]:
        """Seconds of the reduction and the update, once a step."""
        unit, ids = 2.0**30, range(variant.devices)
        fixed = self.cluster.all_reduce_seconds(ids, 0.0)
        slope = (self.cluster.all_reduce_seconds(ids, unit) - fixed) / unit
        reduce = np.where(sets.gradient_bytes > 0, fixed, 0.0) + slope * sets.gradient_bytes
        bandwidth = min(device.memory_bandwidth for device in self.cluster.devices)
        return reduce + (2 * sets.state_bytes + sets.gradient_bytes) / bandwidth

    def _count_depths(self, sets: StageSets) -> Counts:
        depths = []
        for variant in self.variants:
            rows = self.microbatch / variant.devices
            room, kept = self.memory - sets.fixed_bytes, sets.residual_bytes * rows
            if variant.recompute:
                room, kept = room - kept, sets.traffic[0] * rows
            with np.errstate(divide="ignore", invalid="ignore"):
                fit = np.where(kept > 0, np.floor(room / kept * ROUNDING), np.inf)
            fit = np.where(room >= 0, fit, -1)
            most = self.num_microbatches if self.graph.has_backward else 1  # a forward alone keeps nothing for later
            depth = np.where(fit >= most, FAR, np.clip(fit - self.extra, 0, FAR))
            depths.append(depth.astype(np.int32))
        return np.stack(depths)


@dataclass(frozen=True)
class StageTable:
    """Prices of S stages in V variants.

    Args:
      pricing: by which rules.
      seconds: `float[V, S]`, of one micro-batch.
      max_depth: `int[V, S]`, how many stages in a row there can be from this one to a last one; 0 if it never fits.
    """

    pricing: Pricing
    seconds: NDArray[np.float64]
    max_depth: Counts

    def fewest_devices(self, limit: float, deepest: int) -> Counts:
        """`int[S, deepest + 1]`: for each depth, the fewest devices that take at most `limit`; `FAR` if none do."""
        found = np.full((self.seconds.shape[1], deepest + 1), FAR, dtype=np.int32)
        depths = np.arange(deepest + 1)
        for v in reversed(range(len(self.pricing.variants))):
            good = self.max_depth[v] * (self.seconds[v] <= limit)
            np.copyto(found, self.pricing.variants[v].devices, where=depths <= good[:, None])
        found[:, 0] = FAR
        return found

    def choose(self, stage: int, limit: float, depth: int) -> Variant:
        """The variant that `fewest_devices` counts."""
        good = (self.seconds[:, stage] <= limit) & (self.max_depth[:, stage] >= depth)
        return self.pricing.variants[int(np.argmax(good))]

    def is_free(self, deepest: int) -> bool:
        """Whether memory stops none of them up to a depth, without recomputation."""
        rows = [v for v, variant in enumerate(self.pricing.variants) if not variant.recompute]
        return bool((self.max_depth[rows] >= deepest).all())
