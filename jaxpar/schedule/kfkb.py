"""kFkB: k forwards, then k backwards.

Wang et al. 2023, Ada-Grouper, https://arxiv.org/abs/2303.01675. Groups that differ from stage to stage are from
GraphPipe: Jeon et al. 2024, https://arxiv.org/abs/2406.17145, in its static micro-batch scheduler.
"""

from collections.abc import Sequence

from jaxpar.errors import ScheduleError
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.greedy import fill_greedily
from jaxpar.schedule.timetable import Timetable


def kfkb(dag: StageDag, num_microbatches: int, *, k: int | Sequence[int] = 2, exchange: int = 2) -> Timetable:
    """Each stage does `k` forwards, then their `k` backwards; between 1F1B (k = 1) and GPipe (k = M).

        in_flight(s) <= min(M, k depth(s))         on a chain of S stages depth(s) = S - s

    The bound is reached while `k <= 2 exchange`; beyond that backwards come before a stage needs so many forwards.
    With `k` for each stage, a stage's bound is the largest bound among those that it feeds, rounded up to whole groups,
    and one group more. A group stands for GraphPipe's larger micro-batch of a stage: it covers the same examples, but
    all stages still work in micro-batches of one size.

    Args:
      dag: the stage graph; F only if it is forward-only.
      num_microbatches: M; need not be a multiple of k.
      k: micro-batches in a group, one number or one for each stage.
      exchange: ticks that a value takes to another rank, 1 or 2.

    Raises:
      ScheduleError: `k` is less than 1, or is not for as many stages as there are.

    >>> kfkb(StageDag.chain(4), 16, k=2).peak_in_flight
    (8, 6, 4, 2)
    >>> kfkb(StageDag.chain(4), 16, k=(1, 1, 4, 2)).peak_in_flight
    (10, 9, 6, 2)
    >>> print(kfkb(StageDag.chain(2), 4, exchange=1))
    kfkb  microbatches=4 exchange=1
    rank 0 | 0F0 0F1 0F2 0F3 0B0 0B1  .   .  0B2 0B3
    rank 1 |  .  1F0 1F1 1B0 1B1 1F2 1F3 1B2 1B3  .
    """
    group = tuple(k) if isinstance(k, Sequence) else (k,) * dag.num_stages
    if len(group) != dag.num_stages or not all(isinstance(size, int) and size >= 1 for size in group):
        raise ScheduleError(f"kfkb: k is at least 1, one number or one for each of {dag.num_stages} stages, got {k}")
    limit = [0] * dag.num_stages
    for stage in reversed(dag.forward_order):
        limit[stage] = -(-limit[stage] // group[stage]) * group[stage] + group[stage]
        for source in dag.forward_sources[stage]:
            limit[source] = max(limit[source], limit[stage])
    return fill_greedily(dag, num_microbatches, limit=limit, group=group, exchange=exchange, name="kfkb")
