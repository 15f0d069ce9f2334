"""Breadth-first looped pipeline: GPipe with several stages on each rank.

Lamy-Poirier 2022, Breadth-First Pipeline Parallelism, https://arxiv.org/abs/2211.05953.
"""

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.timetable import Timetable


def looped_bfs(dag: StageDag, num_microbatches: int, *, exchange: int = 2) -> Timetable:
    """Each rank takes all micro-batches through one stage before its next; all forwards come before all backwards.

    On any stage graph; one stage a rank is GPipe. On a chain of v R stages, stage s on rank `s % R`, with M >= R, it
    takes `(v M + R - 1)(f + b)` for a stage's f and b when ranks run freely: interleaved 1F1B's bubble, with the memory
    of GPipe. A stage's weights are needed in one stretch forward and one backward, which saves traffic when they are
    sharded.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M.
      exchange: ticks that a value takes to another rank, 1 or 2.

    >>> print(looped_bfs(StageDag.chain(4, num_ranks=2), 2, exchange=1))
    looped_bfs  microbatches=2 exchange=1
    rank 0 | 0F0 0F1 2F0 2F1  .   .  2B0 2B1 0B0 0B1
    rank 1 |  .  1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1  .
    """
    microbatches = range(num_microbatches)
    work = [Action("F", s, m) for s in dag.forward_order for m in microbatches]
    if dag.has_backward:
        work += [Action("B", s, m) for s in dag.backward_order for m in microbatches]
    orders = [[action for action in work if dag.rank_of[action.stage] == rank] for rank in range(dag.num_ranks)]
    return Timetable.from_orders("looped_bfs", dag, num_microbatches, orders, exchange=exchange)
