"""A quick estimate of a step's seconds from stages alone, for searches that look at tens of thousands of plans.

Of `jaxpar.plan.predict.estimate_step` it is the part that needs no timetable and no device ids: fill, work and drain of
the stage that makes most of it, with transfers as over the slowest link, and the reduction and update. Memory is that
of 1F1B with as many micro-batches in flight as the depth.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.down_sets import members_of
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.base import Stage
from jaxpar.plan.planners.chain_stages import Variant
from jaxpar.schedule.costs import Link

Part = tuple[int, int, bool]  # operators, as bits; devices; whether it recomputes


class Sketch(NamedTuple):
    """A plan without devices and timetable: `parts` are sorted, so that equal plans are equal.

    A tuple and not a dataclass, as searches keep tens of thousands of them in a dictionary.
    """

    microbatch: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, microbatch: int, parts: Iterable[Part]) -> "Sketch":
        """With its parts sorted."""
        return cls(microbatch, tuple(sorted(parts, key=_first_bit)))

    @classmethod
    def of_stages(cls, microbatch: int, stages: Iterable[Stage]) -> "Sketch":
        """From what a search gives."""
        return cls.of(microbatch, [(sum(1 << op for op in ops), way.devices, way.recompute) for ops, way in stages])

    def stages(self) -> list[Stage]:
        """As a search gives them."""
        return [(members_of(members), Variant(devices, recompute)) for members, devices, recompute in self.parts]

    @property
    def devices(self) -> int:
        """How many it uses."""
        return sum(devices for _, devices, _ in self.parts)


def _first_bit(part: Part) -> int:
    return part[0] & -part[0]


class Cost(NamedTuple):
    """Of one stage: seconds of F and B of a micro-batch and after the last; how many micro-batches fit into memory."""

    forward: float
    backward: float
    after: float
    fit: float


@dataclass
class StepModel:
    """Costs of stages of one graph on one cluster, kept as they are asked for.

    Args:
      graph, cluster, batch_size: what is planned.
      num_devices: how many may be used; transfers take the link between the first and the last of them.
    """

    graph: OpGraph
    cluster: ClusterSpec
    batch_size: int
    num_devices: int
    _costs: dict[tuple[int, Part], Cost] = field(default_factory=dict)
    _reductions: dict[int, tuple[float, float]] = field(default_factory=dict)
    _sent: dict[tuple[int, int], float] = field(default_factory=dict)
    _readers: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = self.cluster.link(0, self.num_devices - 1) if self.num_devices > 1 else Link()
        self.successors = [sum(1 << t for t in targets) for targets in self.graph.successors]
        self.slowdown = self.cluster.slowdown(range(self.cluster.num_devices), self.graph.device)
        self.memory = min(device.memory_bytes for device in self.cluster.devices)
        self.bandwidth = min(device.memory_bandwidth for device in self.cluster.devices)

    def cost(self, microbatch: int, part: Part) -> Cost:
        """Of one stage."""
        key = microbatch, part
        if key not in self._costs:
            self._costs[key] = self._price(microbatch, *part)
        return self._costs[key]

    def _price(self, microbatch: int, members: int, devices: int, recompute: bool) -> Cost:
        graph, ops, rows = self.graph, list(members_of(members)), microbatch / devices
        forward = self.slowdown * float(graph.forward_seconds(rows)[ops].sum())
        backward = self.slowdown * float(graph.backward_seconds(rows)[ops].sum()) + recompute * forward
        state, gradient = float(graph.state_bytes[ops].sum()), float(graph.gradient_bytes[ops].sum())
        after = 0.0
        if graph.has_backward:
            fixed, slope = self._reduction(devices)
            after = fixed + slope * gradient + (2 * state + gradient) / self.bandwidth
        room, kept = self.memory - state - gradient, float(graph.residual_bytes[ops].sum()) * rows
        if recompute:
            room, kept = room - kept, self._received(members) * rows
        fit = -1.0 if room < 0 else math.inf if not kept else room * (1 + 1e-12) / kept
        return Cost(forward, backward, after, fit)

    def _reduction(self, devices: int) -> tuple[float, float]:
        """Seconds of an all-reduce of neighbouring devices, and seconds per byte."""
        if devices not in self._reductions:
            fixed, unit = (self.cluster.all_reduce_seconds(range(devices), size) for size in (0.0, 2.0**30))
            self._reductions[devices] = fixed, (unit - fixed) / 2.0**30
        return self._reductions[devices]

    def _received(self, members: int) -> float:
        largest: dict[int, float] = {}
        for edge in self.graph.edges:
            if members >> edge.target & 1 and not members >> edge.source & 1:
                largest[edge.source] = max(largest.get(edge.source, 0.0), edge.bytes)
        return sum(largest.values())

    def readers(self, members: int) -> int:
        """The operators that read something of a stage, its own among them."""
        if members not in self._readers:
            found = 0
            for op in members_of(members):
                found |= self.successors[op]
            self._readers[members] = found
        return self._readers[members]

    def sent(self, source: int, target: int) -> float:
        """Bytes per example from one stage to another, each value once."""
        key = (source, target)
        if key not in self._sent:
            total = 0.0
            for op in members_of(source):
                read = self.successors[op] & target
                if read:
                    total += max(self.graph.edge_bytes[op, t] for t in members_of(read))
            self._sent[key] = total
        return self._sent[key]

    def estimate(self, sketch: Sketch) -> float:
        """Seconds of a step; infinite for stages in a cycle, too many devices, or too little memory."""
        parts, b = sketch.parts, sketch.microbatch
        if sketch.devices > self.num_devices:
            return math.inf
        count = self.batch_size // b
        costs = [self.cost(b, part) for part in parts]
        readers = [self.readers(part[0]) & ~part[0] for part in parts]
        feeds = [[t for t, part in enumerate(parts) if read & part[0]] for read in readers]
        order = _sort(feeds)
        if order is None:
            return math.inf
        head, tail, depth = [0.0] * len(parts), [0.0] * len(parts), [1] * len(parts)
        ways: list[tuple[int, int]] = []
        busiest = 0.0
        for s in order:
            for t in feeds[s]:
                width = min(parts[s][1], parts[t][1])
                occupancy = self.sent(parts[s][0], parts[t][0]) * b / (self.link.bandwidth * width)
                seconds = occupancy + self.link.latency
                busiest = max(busiest, count * occupancy)
                head[t] = max(head[t], head[s] + costs[s].forward + seconds)
                tail[t] = max(tail[t], tail[s] + costs[s].backward + seconds)
                ways.append((s, t))
        for s, t in reversed(ways):
            depth[s] = max(depth[s], depth[t] + 1)
        most = count if self.graph.has_backward else 1  # in flight: a forward alone keeps nothing for later
        if any(cost.fit < min(most, depth[s]) for s, cost in enumerate(costs)):
            return math.inf
        work = [head[s] + count * (cost.forward + cost.backward) + tail[s] for s, cost in enumerate(costs)]
        return max(max(work), busiest) + max(cost.after for cost in costs)


@dataclass
class BottleneckModel:
    """As a `StepModel`, but of the slowest stage's seconds per example."""

    steps: StepModel

    def estimate(self, sketch: Sketch) -> float:
        """Seconds per example of the slowest stage, and a thousandth of what the others take: of equals the lighter."""
        if self.steps.estimate(sketch) == math.inf:
            return math.inf
        costs = [self.steps.cost(sketch.microbatch, part) for part in sketch.parts]
        seconds = [cost.forward + cost.backward for cost in costs]
        return (max(seconds) + 1e-3 * sum(seconds) / len(seconds)) / sketch.microbatch


def _sort(feeds: list[list[int]]) -> list[int] | None:
    """A topological order; None if there is a cycle."""
    waits_for = [0] * len(feeds)
    for targets in feeds:
        for t in targets:
            waits_for[t] += 1
    order = [s for s, count in enumerate(waits_for) if not count]
    for s in order:
        for t in feeds[s]:
            waits_for[t] -= 1
            if not waits_for[t]:
                order.append(t)
    return order if len(order) == len(feeds) else None
