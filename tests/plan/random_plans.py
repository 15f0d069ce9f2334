"""Plans at random: any division of a graph of operators into stages without cycles, on any groups of devices."""

from __future__ import annotations

import random

from jaxpar.plan import ClusterSpec, OpGraph, PipelinePlan, PlannedStage


def draw_order(graph: OpGraph, rng: random.Random) -> list[int]:
    """A topological order; now deep into one branch, now broad. Every division without cycles cuts some such order."""
    waits = [len(sources) for sources in graph.predecessors]
    ready = [i for i, count in enumerate(waits) if not count]
    order = []
    while ready:
        order.append(ready.pop(rng.randrange(len(ready)) if rng.random() < 0.3 else -1))
        for target in graph.successors[order[-1]]:
            waits[target] -= 1
            if not waits[target]:
                ready.append(target)
    return order


def draw_plan(graph: OpGraph, num_devices: int, batch_size: int, seed: int) -> PipelinePlan:
    """A plan of up to `num_devices` stages, of which some recompute their forward; devices in no order."""
    rng = random.Random(seed)
    num_microbatches = rng.choice([m for m in (2, 4, 8) if batch_size % m == 0])
    microbatch = batch_size // num_microbatches
    widths: list[int] = []
    while sum(widths) < num_devices and len(widths) < graph.num_ops:
        allowed = [d for d in (1, 1, 2, 2, 3, 4) if d <= num_devices - sum(widths) and microbatch % d == 0]
        widths.append(rng.choice(allowed))
    order, devices = draw_order(graph, rng), rng.sample(range(num_devices), num_devices)
    bounds = [0, *sorted(rng.sample(range(1, graph.num_ops), len(widths) - 1)), graph.num_ops]
    stages = []
    for first, end, width in zip(bounds, bounds[1:], widths, strict=False):
        mine, devices = devices[:width], devices[width:]
        stages.append(PlannedStage(tuple(order[first:end]), tuple(mine), recompute=rng.random() < 0.3))
    schedule = rng.choice(["1f1b", "gpipe", "eager_1f1b", "zb_h1", "zb_h2"])
    cluster = ClusterSpec.preset("cpu", num_devices)
    return PipelinePlan(graph, cluster, tuple(stages), microbatch, num_microbatches, schedule)
