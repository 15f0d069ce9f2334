"""Cut a sequence of blocks into stages: an exact dynamic programme.

First the least possible bottleneck: best[k, j] = min over i of max(best[k-1, i], time(i..j)), the classic chain
partition (Bokhari, IEEE Trans. Computers 1988; PipeDream, SOSP 2019, section 3.1). Then, among all partitions whose
bottleneck is within a tolerance of it, the one with the least total cost of its cuts (bytes sent, modules cut
through).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def partition_sequence(
    times: Sequence[float],
    cut_costs: Sequence[float],
    num_stages: int,
    tolerance: float = 0.05,
    speeds: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The starts of the stages in an optimal partition.

    Args:
        times: of each block, in order; n of them.
        cut_costs: `cut_costs[i]`, of a cut just before block i (entry 0 isn't used).
        num_stages: S <= n; every stage gets at least one block.
        tolerance: how far above the least bottleneck a partition with cheaper cuts may lie, as a fraction.
        speeds: of each stage, by which its blocks' times are divided (its number of replicas, say); 1 by default.

    Returns: S increasing indices, the first 0: stage s holds the blocks starts[s] ... starts[s+1] - 1.

    >>> partition_sequence([1, 1, 4, 1, 1], [0, 0, 0, 0, 0], 3)
    (0, 2, 3)
    >>> partition_sequence([1, 1, 1, 1], [0, 0, 0, 0], 2, speeds=[1, 3])
    (0, 1)
    """
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(times, float))])
    span = prefix[None, :] - prefix[:, None]  # span[i, j]: blocks i..j-1
    span[np.tril_indices(len(prefix))] = np.inf
    spans = [span / speed for speed in speeds or (1.0,) * num_stages]
    limit = _least_bottleneck(spans) * (1 + tolerance) + 1e-30
    return _cheapest_cuts(spans, np.asarray(cut_costs, float), limit)


def _least_bottleneck(spans: Sequence[np.ndarray]) -> float:
    best = spans[0][0]  # best[j]: blocks 0..j-1 in one stage
    for span in spans[1:]:
        best = np.min(np.maximum(best[:, None], span), axis=0)
    return float(best[-1])


def _cheapest_cuts(spans: Sequence[np.ndarray], cuts: np.ndarray, limit: float) -> tuple[int, ...]:
    cost_at = np.append(cuts, 0.0)
    cost = np.where(spans[0][0] <= limit, 0.0, np.inf)
    back = []
    for span in spans[1:]:
        total = np.where(span <= limit, (cost + cost_at)[:, None], np.inf)
        back.append(np.argmin(total, axis=0))
        cost = np.min(total, axis=0)
    starts, j = [], len(cuts)
    for choice in reversed(back):
        j = int(choice[j])
        starts.append(j)
    return (0, *reversed(starts))
