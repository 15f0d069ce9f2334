"""ZB-V: the memory of 1F1B, and no bubble.

Qi et al. 2024, Zero Bubble Pipeline Parallelism, https://arxiv.org/abs/2401.10241, section 6.
"""

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.orders import RankOrder, keep_real
from jaxpar.schedule.placement import require_v
from jaxpar.schedule.timetable import Timetable


def zb_v(dag: StageDag, num_microbatches: int, *, exchange: int = 1) -> Timetable:
    """Split backwards on stages laid out in a V: the last stage is beside the first, so backwards start early.

    On R ranks, with F = I = W = 1 and M >= 2 R - 1, no rank idles between its first and its last action, and each holds
    at most `2 R` micro-batches over its two stages: the activations of R micro-batches, since a stage is half of what
    the rank has. It takes `6 M + R - 1`. For fewer micro-batches it is the order of 2 R - 1 without those that don't
    exist.

    Args:
      dag: a chain of 2 R stages on the ranks 0 ... R-1, R-1 ... 0, or a graph whose edges follow the numbers of such
        stages.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: the stages are laid out in another way.

    >>> print(zb_v(StageDag.chain(4, num_ranks=2, placement="v"), 3))
    zb_v  microbatches=3 exchange=1
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2  .
    rank 1 |  .  1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    require_v(dag, "zb_v")
    count = max(num_microbatches, 2 * dag.num_ranks - 1)
    orders = [_order_rank(rank, dag.num_ranks, count) for rank in range(dag.num_ranks)]
    real = keep_real(dag, num_microbatches, orders)
    return Timetable.from_orders("zb_v", dag, num_microbatches, real, exchange=exchange)


def _order_rank(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """The figure's row: warm up, then F I W of either stage in turn, then I's before the W's that are left."""
    down, up = rank, 2 * num_ranks - 1 - rank
    before, behind = num_ranks - rank, rank  # the hops from here to the turn of the V, and from its ends
    order = RankOrder().do("F", down, times=2 * before - 1)
    for _ in range(behind):
        order.do("F", up).do("F", down)
    order.do("FIW", up, times=before)
    while order.count("F", up) < num_microbatches:
        if order.count("F", down) < num_microbatches:
            order.do("F", down)
        order.do("IW", down).do("FIW", up)
    for _ in range(behind):
        order.do("I", down).do("I", up)
    order.do("IW", down, times=before)
    for stage in (up, down):
        order.do("W", stage, times=num_microbatches - order.count("W", stage))
    return order.actions
