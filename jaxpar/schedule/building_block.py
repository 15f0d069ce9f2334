"""Schedules on a V from a building block: where one micro-batch's actions lie, repeated every six ticks.

Qi et al. 2024, Pipeline Parallelism with Controllable Memory, https://arxiv.org/abs/2405.15362. In the steady phase
each rank does two F, two I and two W for each micro-batch, one action a tick, so the block repeats every six. The
longer a micro-batch stays on a rank, from its F's to its W's, the more of them are there at once.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.orders import keep_real
from jaxpar.schedule.placement import require_v
from jaxpar.schedule.reorder import fill_in_order, find_peak
from jaxpar.schedule.timetable import Timetable

_PERIOD = 6

Hops = tuple[int, int, int, int]  # ticks from rank to rank: F down, F up, I down again, I up again
Block = tuple[tuple[int, int, int, int], ...]  # for each rank, the ticks of its F F I I of micro-batch 0


def repeat_block(dag: StageDag, num_microbatches: int, hops: Hops, *, exchange: int, name: str) -> Timetable:
    """Repeat a building block for each micro-batch, then let each rank start what it can earlier, in the same memory.

    Args:
      dag: a graph of 2 R stages on the ranks 0 ... R-1, R-1 ... 0, with edges that follow the stages' numbers.
      num_microbatches: M.
      hops: the ticks between a rank's action and the next rank's, for the block's four ways along the ranks: the F's
        from rank 0 to R-1, the F's back to 0, the I's to R-1, the I's back to 0.
      exchange: ticks that a value takes to another rank, 1 or 2.
      name: the timetable's name.

    Raises:
      ScheduleError: the stages are laid out in another way.
    """
    require_v(dag, name)
    block = _choose_block(dag.num_ranks, hops)
    orders = [_repeat(ticks, rank, dag.num_ranks, num_microbatches) for rank, ticks in enumerate(block)]
    return fill_in_order(dag, num_microbatches, keep_real(dag, num_microbatches, orders), exchange=exchange, name=name)


def _choose_block(num_ranks: int, hops: Hops) -> Block:
    """The block with the least peak, and then the shortest, of all ways to turn at the ends of the V."""

    def judge(block: Block) -> tuple[int, int]:
        length = max(map(max, block))
        count = length // _PERIOD + 2  # enough to reach the steady phase
        peaks = (find_peak(_repeat(ticks, rank, num_ranks, count)) for rank, ticks in enumerate(block))
        return max(peaks), length

    return min(_list_blocks(num_ranks, hops), key=judge)


def _list_blocks(num_ranks: int, hops: Hops) -> Iterator[Block]:
    """All blocks in which no rank has two actions at once, when it is repeated."""
    far = num_ranks - 1
    for turns in itertools.product(range(1, _PERIOD + 1), repeat=3):
        f_up = far * hops[0] + turns[0]
        i_down = f_up + far * hops[1] + turns[1]
        i_up = i_down + far * hops[2] + turns[2]
        block = tuple(
            (hops[0] * r, f_up + hops[1] * (far - r), i_down + hops[2] * r, i_up + hops[3] * (far - r))
            for r in range(num_ranks)
        )
        if all(len({tick % _PERIOD for tick in ticks}) == 4 for ticks in block):
            yield block


def _repeat(ticks: Sequence[int], rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    """One rank's order: the block's F's and I's in their ticks, and W's in ticks that are left, as early as can be."""
    down, up = rank, 2 * num_ranks - 1 - rank
    timed: dict[int, Action] = {}
    for m in range(num_microbatches):
        f_down, f_up, i_down, i_up = (tick + _PERIOD * m for tick in ticks)
        timed |= {f_down: Action("F", down, m), f_up: Action("F", up, m)}
        timed |= {i_down: Action("I", up, m), i_up: Action("I", down, m)}
    order: list[Action] = []
    waiting: deque[Action] = deque()
    for tick in range(max(timed, default=-1) + 1):
        if action := timed.get(tick):
            order.append(action)
            if action.kind == "I":
                waiting.append(Action("W", action.stage, action.microbatch))
        elif waiting:
            order.append(waiting.popleft())
    return [*order, *waiting]
