"""ZB-H2: twice the memory of 1F1B, and no bubble.

Qi et al. 2024, Zero Bubble Pipeline Parallelism, https://arxiv.org/abs/2401.10241, section 2, figure 3 (bottom).
"""

from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def zb_h2(dag: StageDag, num_microbatches: int, *, exchange: int = 1) -> Timetable:
    """Eager 1F1B with split backwards: each rank does one F, one I and one W in turn.

        forwards done without their I <= 2 depth(s) - 1     on a chain of S stages depth(s) = S - s
        in_flight(s)                  <= min(M, 2 max(depth) - 1)

    On any stage graph. On a chain of S stages, with F = I = W = 1 and M >= 2 S - 1, no rank idles between its first and
    its last action. The makespan is still `3 M + S - 1`, since rank r starts and ends r later: to gain that too, each
    rank would have to begin the next step by itself (the paper's section 4), but a jitted step ends on all together.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    >>> zb_h2(StageDag.chain(4), 16).peak_in_flight
    (7, 7, 7, 7)
    >>> print(zb_h2(StageDag.chain(2), 3))
    zb_h2  microbatches=3 exchange=1
    rank 0 | 0F0 0F1 0F2 0I0 0W0 0I1 0W1 0I2 0W2  .
    rank 1 |  .  1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2
    """
    limit = [2 * depth - 1 for depth in dag.depth]
    hold = [max(limit)] * dag.num_stages
    return fill_greedily(dag, num_microbatches, limit=limit, hold=hold, exchange=exchange, name="zb_h2")
