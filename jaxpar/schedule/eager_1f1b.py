"""Eager 1F1B: 1F1B with nearly twice as many micro-batches in flight, so that transfers hide behind work.

Zhuang et al. 2022, On Optimizing the Communication of Model Parallelism, https://arxiv.org/abs/2211.05322.
"""

from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def eager_1f1b(dag: StageDag, num_microbatches: int, *, exchange: int = 2) -> Timetable:
    """Each rank does a backward as soon as one is ready; stage `s` holds up to twice its depth, less one.

        in_flight(s) <= min(M, 2 depth(s) - 1)         on a chain of S stages depth(s) = S - s

    On any stage graph. On a chain it takes `(M + S - 1)(f + b)` when ranks run freely, like 1F1B; with transfers or in
    lockstep it is faster than 1F1B of the textbook's memory.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    >>> eager_1f1b(StageDag.chain(4), 16).peak_in_flight
    (7, 5, 3, 1)
    >>> print(eager_1f1b(StageDag.chain(2), 4))
    eager_1f1b  microbatches=4 exchange=2
    rank 0 | 0F0 0F1 0F2  .   .  0B0 0F3 0B1  .  0B2 . 0B3
    rank 1 |  .   .  1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3 .  .
    """
    limit = [2 * depth - 1 for depth in dag.depth]
    return fill_greedily(dag, num_microbatches, limit=limit, exchange=exchange, name="eager_1f1b")
