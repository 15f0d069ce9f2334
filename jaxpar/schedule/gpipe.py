"""GPipe: all forwards, then all backwards.

Huang et al. 2018, https://arxiv.org/abs/1811.06965, section 2.2, figure 2c.
"""

from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def gpipe(dag: StageDag, num_microbatches: int, *, exchange: int = 2) -> Timetable:
    """Each rank does all its forwards before its first backward; backwards take micro-batches in the forwards' order.

    On any stage graph. Each stage holds all M micro-batches at its peak. On a chain of S stages with a forward of f
    and a backward of b seconds it takes `(M + S - 1)(f + b)` when ranks run freely, the least for an unsplit backward.
    The paper's figure takes the backwards in the reverse order; time and memory are the same.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M.
      exchange: ticks that a value takes to another rank, 1 or 2.

    >>> print(gpipe(StageDag.chain(2), 2, exchange=1))
    gpipe  microbatches=2 exchange=1
    rank 0 | 0F0 0F1  .   .  0B0 0B1
    rank 1 |  .  1F0 1F1 1B0 1B1  .
    """
    return fill_greedily(dag, num_microbatches, exchange=exchange, forwards_first=True, name="gpipe")
