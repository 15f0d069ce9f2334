"""V-Half: half the memory of 1F1B, and half its bubble.

Qi et al. 2024, Pipeline Parallelism with Controllable Memory, https://arxiv.org/abs/2405.15362.
"""

from jaxpar.schedule.building_block import repeat_block
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.timetable import Timetable


def v_half(dag: StageDag, num_microbatches: int, *, exchange: int = 1) -> Timetable:
    """Split backwards on stages in a V: down the ranks a micro-batch takes two ticks a hop, up again one.

    On R ranks, each with two stages, a rank holds at most

        in_flight <= 2 ((R + 2) // 2)          over its two stages: the activations of (R + 2) // 2 micro-batches

    With F = I = W = 1 and M >= R it takes at most `6 M + 3 R`, where 1F1B on these ranks takes `6 (M + R - 1)`.

    Args:
      dag: a chain of 2 R stages on the ranks 0 ... R-1, R-1 ... 0, or a graph whose edges follow the numbers of such
        stages.
      num_microbatches: M; may be fewer than the stages.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: the stages are laid out in another way.

    >>> print(v_half(StageDag.chain(4, num_ranks=2, placement="v"), 3))
    v_half  microbatches=3 exchange=1
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0I0 3I1 0W0 3W1 0I1 0W1 3F2 3I2 3W2  .  0I2 0W2
    rank 1 |  .  1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 2I1 1I1 1W0 2F2 2W1 1W1 2I2 1I2 2W2 1W2
    """
    return repeat_block(dag, num_microbatches, (2, 1, 2, 1), exchange=exchange, name="v_half")
