"""The schedule of a step with no backward (evaluation, inference): micro-batches stream through the stages."""

from jaxpar.errors import ScheduleError
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def forward_only(dag: StageDag, num_microbatches: int, *, exchange: int = 2) -> Timetable:
    """Each rank does a forward as soon as one is ready, micro-batches in order.

    On a chain of S stages, one a rank: `M + exchange (S - 1)` ticks.

    Args:
      dag: a forward-only stage graph.
      num_microbatches: M.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: the graph has backwards.

    >>> print(forward_only(StageDag.chain(2, has_backward=False), 3))
    forward_only  microbatches=3 exchange=2
    rank 0 | 0F0 0F1 0F2  .   .
    rank 1 |  .   .  1F0 1F1 1F2
    """
    if dag.has_backward:
        raise ScheduleError("forward_only: this step has backwards; use 'gpipe' or '1f1b'")
    return fill_greedily(dag, num_microbatches, exchange=exchange, name="forward_only")
