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
    times: Sequence[float], cut_costs: Sequence[float], num_stages: int, tolerance: float = 0.05
) -> tuple[int, ...]:
    """The starts of the stages in an optimal partition.

    Args:
        times: of each block, in order; n of them.
        cut_costs: `cut_costs[i]`, of a cut just before block i (entry 0 isn't used).
        num_stages: S <= n; every stage gets at least one block.
        tolerance: how far above the least bottleneck a partition with cheaper cuts may lie, as a fraction.

    Returns: S increasing indices, the first 0: stage s holds the blocks starts[s] ... starts[s+1] - 1.

    >>> partition_sequence([1, 1, 4, 1, 1], [0, 0, 0, 0, 0], 3)
    (0, 2, 3)
    """
    prefix = np.concatenate([[0.0], np.cumsum(np.asarray(times, float))])
    limit = _least_bottleneck(prefix, num_stages) * (1 + tolerance) + 1e-30
    return _cheapest_cuts(prefix, np.asarray(cut_costs, float), num_stages, limit)


def _least_bottleneck(prefix: np.ndarray, num_stages: int) -> float:
    best = prefix.copy()  # best[j]: blocks 0..j-1 in one stage
    span = prefix[None, :] - prefix[:, None]  # span[i, j]: blocks i..j-1
    span[np.tril_indices(len(prefix))] = np.inf
    best[0] = np.inf
    for _ in range(num_stages - 1):
        best = np.min(np.maximum(best[:, None], span), axis=0)
    return float(best[-1])


def _cheapest_cuts(prefix: np.ndarray, cuts: np.ndarray, num_stages: int, limit: float) -> tuple[int, ...]:
    n = len(prefix) - 1
    span = prefix[None, :] - prefix[:, None]
    allowed = span <= limit
    allowed[np.tril_indices(n + 1)] = False
    cost_at = np.append(cuts, 0.0)
    cost = np.where(allowed[0], 0.0, np.inf)
    back = []
    for _ in range(num_stages - 1):
        total = np.where(allowed, (cost + cost_at)[:, None], np.inf)
        back.append(np.argmin(total, axis=0))
        cost = np.min(total, axis=0)
    starts, j = [], n
    for choice in reversed(back):
        j = int(choice[j])
        starts.append(j)
    return (0, *reversed(starts))
