"""Plans with several stages on each device, as interleaved 1F1B and its kin have it: less to fill and drain.

The stages are intervals of one order of the operators, even in their seconds, all with the same number of replicas;
stage s is on rank s % R (or down the ranks and up again, for the schedules of that form). Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.planners.options import Replicas, list_replicas
from jaxpar.plan.planners.pipedream import iterate_orders
from jaxpar.schedule.dag import place_stages

CHUNKS = (2, 3, 4)  # stages on a rank
SCHEDULES = (("interleaved_1f1b", "round_robin"), ("zb_v", "v"))


def list_interleaved(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    sizes: Sequence[int],
    replicas: Replicas,
    num_devices: int,
) -> Iterator[PipelinePlan]:
    """Plans of 2, 3 and 4 stages a rank; whether they fit into memory is for their check to say."""
    order = next(iter(dict.fromkeys(iterate_orders(graph))))
    for width in list_replicas(num_devices, replicas):
        ranks = num_devices // width
        for chunks in CHUNKS:
            if ranks < 2 or ranks * chunks > graph.num_ops:
                continue
            for size in sizes:
                if size % width == 0 and batch_size // size >= ranks:
                    seconds = graph.forward_seconds(size / width) + graph.backward_seconds(size / width)
                    groups = divide_evenly([order[i] for i in range(len(order))], seconds, ranks * chunks)
                    yield from _make_plans(graph, cluster, groups, ranks, width, size, batch_size // size)


def _make_plans(
    graph: OpGraph,
    cluster: ClusterSpec,
    groups: Sequence[Sequence[int]],
    ranks: int,
    width: int,
    microbatch: int,
    num_microbatches: int,
) -> Iterator[PipelinePlan]:
    for schedule, placement in SCHEDULES:
        if placement == "v" and len(groups) != 2 * ranks:
            continue
        homes = place_stages(len(groups), ranks, placement)  # type: ignore[arg-type]
        stages = tuple(
            PlannedStage(tuple(ops), tuple(range(rank * width, (rank + 1) * width)))
            for ops, rank in zip(groups, homes, strict=True)
        )
        yield PipelinePlan(graph, cluster, stages, microbatch, num_microbatches, schedule, chain=True)


def divide_evenly(order: Sequence[int], seconds: NDArray[np.float64], count: int) -> list[list[int]]:
    """Cut an order into `count` intervals, none empty, with the least maximum of their sums.

    >>> divide_evenly([0, 1, 2, 3], np.array([1.0, 1.0, 1.0, 3.0]), 2)
    [[0, 1, 2], [3]]
    """
    sums = np.concatenate([[0.0], np.cumsum(seconds[list(order)])])
    size = len(order)
    worst = np.full((count + 1, size + 1), np.inf)  # [intervals, operators in them]
    cut = np.zeros((count + 1, size + 1), dtype=int)
    worst[0, 0] = 0.0
    for k in range(1, count + 1):
        for end in range(k, size + 1):
            starts = np.arange(k - 1, end)
            values = np.maximum(worst[k - 1, starts], sums[end] - sums[starts])
            best = int(np.argmin(values))
            worst[k, end], cut[k, end] = values[best], starts[best]
    groups, end = [], size
    for k in range(count, 0, -1):
        start = int(cut[k, end])
        groups.append(list(order[start:end]))
        end = start
    return groups[::-1]
