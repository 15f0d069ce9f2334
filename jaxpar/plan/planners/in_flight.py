"""How many examples each stage of a stage graph keeps between forward and backward.

Jeon et al. 2025, https://arxiv.org/abs/2406.17145: a stage must be able to work forwards until the first backward has
come up to it, whatever it feeds.
"""

from collections.abc import Sequence

from jaxpar.errors import PlanError


def count_in_flight(successors: Sequence[Sequence[int]], microbatches: Sequence[int]) -> tuple[int, ...]:
    """Examples in flight at each stage, for stages with micro-batches of their own sizes.

    A last stage holds one micro-batch. Another stage x, with micro-batches of b_x examples, holds the most that any y
    that it feeds asks for:

        i_x = i_y + b_y                                                 b_x <= b_y
        i_x = (i_y - b_y, rounded up to a multiple of b_x) + 2 b_x      b_x > b_y

    With one size b that is b times the stages on the longest path to a last stage.

    Args:
      successors: for each stage, those that it feeds.
      microbatches: for each stage, its examples in a micro-batch; at least 1.

    Raises:
      PlanError: a size is less than 1, the lengths differ, or the stages form a cycle.

    >>> count_in_flight([[1, 2], [3], [3], []], [4, 4, 4, 4])
    (12, 8, 8, 4)
    >>> count_in_flight([[1], [2], []], [4, 2, 1])
    (12, 4, 1)
    """
    if len(successors) != len(microbatches):
        raise PlanError(f"{len(successors)} stages, but micro-batches for {len(microbatches)}")
    if small := [f"stage {s}: {b}" for s, b in enumerate(microbatches) if b < 1]:
        raise PlanError(f"a micro-batch has at least one example, got {', '.join(small)}")
    found: dict[int, int] = {}
    unfinished: set[int] = set()

    def count(stage: int) -> int:
        if stage not in found:
            if stage in unfinished:
                raise PlanError(f"stage {stage} is on a cycle of stages, so that no order of them is possible")
            unfinished.add(stage)
            mine = microbatches[stage]
            found[stage] = max((_feed(mine, microbatches[y], count(y)) for y in successors[stage]), default=mine)
        return found[stage]

    return tuple(count(stage) for stage in range(len(successors)))


def _feed(mine: int, theirs: int, in_flight: int) -> int:
    if mine <= theirs:
        return in_flight + theirs
    return -(-(in_flight - theirs) // mine) * mine + 2 * mine
