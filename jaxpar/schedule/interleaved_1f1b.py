"""Interleaved 1F1B: several stages on each rank make the bubble smaller by as much.

Narayanan et al. 2021 (Megatron-LM), https://arxiv.org/abs/2104.04473, section 2.2.2, figure 4 (bottom), where M is a
multiple of R. Rounds of more than R micro-batches, for other M, are from PyTorch's `ScheduleInterleaved1F1B`, where
they are equal; here they need not be.
"""

from itertools import accumulate, pairwise

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.placement import require_rounds
from jaxpar.schedule.timetable import Timetable


def interleaved_1f1b(dag: StageDag, num_microbatches: int, *, exchange: int = 2) -> Timetable:
    """Each rank takes a round of micro-batches through one stage, then through its next; after a warm-up, one F, one B.

    Micro-batches go in `max(1, M // R)` rounds of nearly one size, the largest g (R if M is a multiple of it). With v
    stages on each rank, rank r does `(v - 1) g + 2 (R - 1 - r)` forwards before it starts to alternate, and

        in_flight <= (v - 1) g + 2 R - 1 - 2 r           over its stages; each holds 1 / v of the rank's activations

    When M >= R and ranks run freely it takes `(v M + R - 1)(f + b)` for a stage's f and b: a bubble of
    `(R - 1) / (v M + R - 1)`. With one stage a rank it is eager 1F1B.

    Args:
      dag: a chain with stage s on rank `s % R`, or a graph whose edges follow the numbers of such stages.
      num_microbatches: M; may be fewer than the stages or the ranks.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: the stages are laid out in another way.

    >>> print(interleaved_1f1b(StageDag.chain(4, num_ranks=2), 4, exchange=1))
    interleaved_1f1b  microbatches=4 exchange=1
    rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1  .  2B2  .  2B3 0B2 0B3
    rank 1 |  .  1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3  .
    """
    require_rounds(dag, "interleaved_1f1b")
    rounds = _make_rounds(num_microbatches, dag.num_ranks)
    orders = [_order_rank(dag, rounds, rank) for rank in range(dag.num_ranks)]
    return Timetable.from_orders("interleaved_1f1b", dag, num_microbatches, orders, exchange=exchange)


def _make_rounds(num_microbatches: int, num_ranks: int) -> list[range]:
    count = max(1, num_microbatches // num_ranks)
    sizes = [num_microbatches // count + (index < num_microbatches % count) for index in range(count)]
    return [range(first, last) for first, last in pairwise(accumulate(sizes, initial=0))]


def _order_rank(dag: StageDag, rounds: list[range], rank: int) -> list[Action]:
    stages = dag.stages_on(rank)
    forwards = [Action("F", s, m) for ms in rounds for s in stages for m in ms]
    if not dag.has_backward:
        return forwards
    backwards = [Action("B", s, m) for ms in rounds for s in reversed(stages) for m in ms]
    warm_up = (len(stages) - 1) * len(rounds[0]) + 2 * (dag.num_ranks - 1 - rank)
    pairs = zip(forwards[warm_up:], backwards, strict=False)
    alternating = [action for pair in pairs for action in pair]
    return forwards[:warm_up] + alternating + backwards[len(alternating) // 2 :]
