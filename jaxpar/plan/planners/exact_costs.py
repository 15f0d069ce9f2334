"""What each stage of a small graph costs, for the exact search; a stage is a set of operators, as bits."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jaxpar.errors import PlanError
from jaxpar.plan.acyclic_partitions import Division, iterate_divisions
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import members_of
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.plan.predict import stage_seconds


@dataclass(frozen=True)
class StagePrice:
    """A stage in one variant.

    Args:
      variant: how many devices, and whether it recomputes.
      forward, backward: seconds of F and B of a micro-batch.
      after: seconds of the gradients' reduction and the update, once a step.
      room: how many micro-batches can be in flight; -1 if not even the state fits.
    """

    variant: Variant
    forward: float
    backward: float
    after: float
    room: float

    @property
    def seconds(self) -> float:
        """Of a micro-batch, forwards and backwards."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StagePrices:
    """Prices of stages for one micro-batch size; memory and links are those of equal devices on equal links."""

    graph: OpGraph
    cluster: ClusterSpec
    microbatch: int
    num_microbatches: int
    variants: tuple[Variant, ...]
    num_devices: int
    max_divisions: int
    _known: dict[int, tuple[StagePrice, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, stage: int) -> tuple[StagePrice, ...]:
        """In each variant, whether it fits or not."""
        if stage not in self._known:
            self._known[stage] = tuple(self._price(stage, variant) for variant in self.variants)
        return self._known[stage]

    def fitting(self, stage: int, depth: int) -> Iterator[StagePrice]:
        """In each variant that has room for what is in flight at a depth: `min(M, depth)`."""
        needed = min(self.num_microbatches, depth)
        return (price for price in self.of(stage) if price.room >= needed)

    def divisions(self, cheapest: Callable[[int, int], StagePrice | None]) -> Iterator[Division]:
        """The divisions for whose stages there are enough devices.

        Args:
          cheapest: `(stage, depth)` to the price with the fewest devices that will do; None if none will.

        Raises:
          PlanError: more than `max_divisions` were looked at, in parts or whole.
        """
        looked = itertools.count(1)

        def admits(division: Division) -> bool:
            if next(looked) > self.max_divisions:
                raise PlanError(
                    f"the exact search has looked at {self.max_divisions:,} partial divisions of {self.graph.num_ops} "
                    f"operators on {self.num_devices} devices with micro-batches of {self.microbatch}, and is not "
                    "done: raise max_divisions, coarsen the graph, or plan with 'graphpipe' or 'auto'"
                )
            left = self.num_devices
            for stage, depth in zip(division.stages, division.depth, strict=True):
                price = cheapest(stage, depth)
                if price is None or price.variant.devices > left:
                    return False
                left -= price.variant.devices
            return True

        return iterate_divisions(self.graph, self.num_devices, admits)

    def _price(self, stage: int, variant: Variant) -> StagePrice:
        graph, cluster = self.graph, self.cluster
        ops, devices = list(members_of(stage)), range(variant.devices)
        forward, *parts = stage_seconds(graph, cluster, ops, devices, self.microbatch, variant.recompute)
        gradient, state = (float(x[ops].sum()) for x in (graph.gradient_bytes, graph.state_bytes))
        after = 0.0
        if graph.has_backward:
            after = cluster.all_reduce_seconds(devices, gradient)
            after += (2 * state + gradient) / min(device.memory_bandwidth for device in cluster.devices)
        return StagePrice(variant, forward, sum(parts), after, self._count_room(stage, ops, variant, state + gradient))

    def _count_room(self, stage: int, ops: list[int], variant: Variant, fixed: float) -> float:
        rows = self.microbatch / variant.devices
        kept = float(self.graph.residual_bytes[ops].sum()) * rows
        room = min(device.memory_bytes for device in self.cluster.devices) - fixed
        if variant.recompute:
            room, kept = room - kept, self._received(stage) * rows
        if room < 0:
            return -1
        return float("inf") if not kept else room * (1 + 1e-12) / kept

    def _received(self, stage: int) -> float:
        """Bytes per example that a stage is given, each value once."""
        largest: dict[int, float] = {}
        for edge in self.graph.edges:
            if stage >> edge.target & 1 and not stage >> edge.source & 1:
                largest[edge.source] = max(largest.get(edge.source, 0.0), edge.bytes)
        return sum(largest.values())
