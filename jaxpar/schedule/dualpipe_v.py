"""DualPipeV: forwards in pairs with backwards on stages laid out in a V.

The pairs are from DualPipe: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 3.2.1. The V, which cuts it in
half and needs the parameters only once, is from Qi et al. 2025, https://huggingface.co/blog/ufotalent/cut-in-half.
Bubble and memory are published in https://github.com/deepseek-ai/DualPipe.
"""

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.orders import RankOrder, keep_real
from jaxpar.schedule.placement import require_v
from jaxpar.schedule.timetable import Timetable


def dualpipe_v(dag: StageDag, num_microbatches: int, *, exchange: int = 1) -> Timetable:
    """Backwards are whole in the steady phase, each paired with a forward of the rank's other stage; split at the ends.

    DeepSeek runs a pair as one action, whose time F&B is less than F + B since the communication of one hides behind
    the work of the other. Here a rank does one action a tick, so a pair is the B and then the F. On R ranks that run
    freely, with M >= 2 R and the times F, B and W of a stage (B whole, with its W),

        published    bubble = (R - 1)(F&B + B - 3 W)         a pair is one action
        here         bubble = (R - 1)(2 B - 3 W)             what the pair's B makes is sent before its F

    and each rank holds at most `2 R` micro-batches over its two stages (published: 2 R + 1). For fewer micro-batches it
    is the order of 2 R without those that don't exist.

    Args:
      dag: a chain of 2 R stages on the ranks 0 ... R-1, R-1 ... 0, or a graph whose edges follow the numbers of such
        stages.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: the stages are laid out in another way.

    >>> print(dualpipe_v(StageDag.chain(4, num_ranks=2, placement="v"), 4))
    dualpipe_v  microbatches=4 exchange=1
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3B1 0F3 0B0 3F2 3B2 0B1 3F3 3B3 0I2 0W2 0I3 0W3
    rank 1 |  .  1F0 2F0 1F1 2F1 2B0 1F2 1B0 2F2 2B1 1F3 1B1 2F3 2B2 1B2 2I3 1I3 2W3 1W3
    """
    require_v(dag, "dualpipe_v")
    count = max(num_microbatches, 2 * dag.num_ranks)
    orders = [_order_rank(rank, dag.num_ranks, count) for rank in range(dag.num_ranks)]
    real = keep_real(dag, num_microbatches, orders)
    return Timetable.from_orders("dualpipe_v", dag, num_microbatches, real, exchange=exchange)


def _order_rank(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """The eight phases of a row; `ahead` and `behind` count the ranks to the turn of the V and to its ends."""
    down, up = rank, 2 * num_ranks - 1 - rank
    ahead, behind = num_ranks - 1 - rank, rank + 1
    order = RankOrder()
    order.do("F", down, times=2 * ahead)
    for _ in range(behind):
        order.do("F", down).do("F", up)
    order.do("IWF", up, times=ahead)
    for _ in range(num_microbatches - 2 * num_ranks + behind):
        order.do("B", up).do("F", down)  # a pair
        order.do("B", down).do("F", up)  # a pair
    for _ in range(ahead):
        order.do("B", up)
        order.do("B", down).do("F", up)  # a pair
    backwards = [up, down] * behind
    for stage in backwards[:behind]:
        order.do("B", stage)
    for stage in backwards[behind:]:
        order.do("I", stage)
    weights = backwards[behind:] + [down] * ahead  # in the order of their I's
    for stage in weights[:ahead]:
        order.do("W", stage).do("I", down)
    for stage in weights[ahead:]:
        order.do("W", stage)
    return order.actions
