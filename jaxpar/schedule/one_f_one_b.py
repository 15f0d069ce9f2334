"""1F1B: one forward, one backward, with the number of micro-batches in flight bounded by the stages downstream.

Also PipeDream-Flush, DAPPLE, Megatron's default; with extra micro-batches in flight, eager 1F1B. The form for a chain
is Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, section 2.2.1, figure 4 (top). The form for a graph, whose
bound is the depth and not the number of stages, is GraphPipe: Jeon et al. 2024, https://arxiv.org/abs/2406.17145, in
its static micro-batch scheduler.
"""

from jaxpar.errors import ScheduleError
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def one_f_one_b(dag: StageDag, num_microbatches: int, *, extra: int | None = None, exchange: int = 2) -> Timetable:
    """Each rank does a backward as soon as one is ready; stage `s` holds at most `depth(s) + extra` micro-batches.

        in_flight(s) <= min(M, depth(s) + extra)         on a chain of S stages depth(s) = S - s

    `extra=0` is textbook memory. When ranks run freely it costs nothing, but in lockstep, where a rank can't start a
    tick before its neighbours have finished the one `exchange` ticks before, a forward beside a backward waits for it:
    with backwards twice as long, a fifth to a quarter of the time. Each extra micro-batch gives slack back. The
    default, half the longest path, comes to within 6 % of the free-running time on chains of 4 and 8 stages.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M; may be fewer than the stages.
      extra: micro-batches in flight beyond the depth, at least 0; None for `max(dag.depth) // 2`.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: `extra` is negative.

    >>> one_f_one_b(StageDag.chain(4), 16, extra=0).peak_in_flight
    (4, 3, 2, 1)
    >>> print(one_f_one_b(StageDag.chain(2), 3))
    1f1b  microbatches=3 exchange=2
    rank 0 | 0F0 0F1 0F2  .   .  0B0  .  0B1 . 0B2
    rank 1 |  .   .  1F0 1B0 1F1 1B1 1F2 1B2 .  .
    """
    if extra is None:
        extra = max(dag.depth) // 2
    if extra < 0:
        raise ScheduleError(f"1f1b: extra (micro-batches in flight beyond a stage's depth) is at least 0, got {extra}")
    limit = [depth + extra for depth in dag.depth]
    return fill_greedily(dag, num_microbatches, limit=limit, exchange=exchange, name="1f1b")
