"""ZB-H1: the memory of 1F1B, a third of its bubble.

Qi et al. 2024, Zero Bubble Pipeline Parallelism, https://arxiv.org/abs/2401.10241, section 2, figure 3 (top).
"""

from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def zb_h1(dag: StageDag, num_microbatches: int, *, exchange: int = 1) -> Timetable:
    """1F1B with split backwards: each rank does one F, one I and one W in turn, within 1F1B's memory.

        forwards done without their I <= depth(s)           on a chain of S stages depth(s) = S - s
        in_flight(s)                  <= min(M, max(depth))

    On any stage graph. On a chain of S stages, with F = I = W = 1 and M >= S, it takes `3 M + S - 1`, where 1F1B takes
    `3 (M + S - 1)`. A tick is then the same time for all, so that lockstep costs nothing at `exchange=1`. With
    `exchange=2` each of the S - 1 hops takes a tick more, for which this memory has no room.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    >>> zb_h1(StageDag.chain(4), 16).peak_in_flight
    (4, 4, 4, 4)
    >>> print(zb_h1(StageDag.chain(2), 3))
    zb_h1  microbatches=3 exchange=1
    rank 0 | 0F0 0F1  .  0I0 0W0 0F2 0I1 0W1 0I2 0W2
    rank 1 |  .  1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    hold = [max(dag.depth)] * dag.num_stages
    return fill_greedily(dag, num_microbatches, limit=dag.depth, hold=hold, exchange=exchange, name="zb_h1")
