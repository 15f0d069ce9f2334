"""Down-sets of a graph of operators: what can be done first, with nothing else done.

A down-set (an ideal) holds with an operator all that it needs. A chain of stages is a chain of down-sets, each stage
the difference of two neighbours, so planners for chains search over them: those of PipeDream's released planner are
the antichains of its graph, which stand one for one for the down-sets that they close; those of Piper (Tarnawski et
al., NeurIPS 2021) are the down-sets themselves. A chain of n operators has n + 1, but k branches of n operators side by
side have (n + 1)^k.

A set of operators is an integer here, whose bit i says whether operator i is in it.
"""

from collections.abc import Iterator, Sequence

from jaxpar.errors import PlanError


def iterate_down_sets(predecessors: Sequence[Sequence[int]], order: Sequence[int]) -> Iterator[int]:
    """Every down-set once, the empty one first.

    Args:
      predecessors: for each operator, those that it needs directly.
      order: the operators, each after all that it needs.

    >>> sorted(iterate_down_sets([(), (), (0, 1)], [0, 1, 2]))
    [0, 1, 2, 3, 7]
    """
    needs = [sum(1 << p for p in predecessors[op]) for op in order]
    stack = [(0, 0)]
    while stack:
        done, begin = stack.pop()
        yield done
        # Only what comes later in the order is added, so that each set is reached in one way: by that order.
        stack.extend(
            (done | 1 << order[place], place + 1)
            for place in range(begin, len(order))
            if needs[place] & done == needs[place]
        )


def count_down_sets(predecessors: Sequence[Sequence[int]], order: Sequence[int], limit: int) -> int:
    """How many down-sets there are, or `limit + 1` if there are more than `limit`.

    >>> count_down_sets([()] * 20, range(20), limit=1000)
    1001
    """
    count = 0
    for _ in iterate_down_sets(predecessors, order):
        count += 1
        if count > limit:
            break
    return count


def list_down_sets(predecessors: Sequence[Sequence[int]], order: Sequence[int], limit: int) -> list[int]:
    """All down-sets, the smaller ones first.

    Raises:
      PlanError: there are more than `limit`.

    >>> list_down_sets([(), (0,), (0,)], [0, 1, 2], limit=10)
    [0, 1, 3, 5, 7]
    """
    found = []
    for down_set in iterate_down_sets(predecessors, order):
        found.append(down_set)
        if len(found) > limit:
            raise PlanError(
                f"a graph of {len(order)} operators has more than {limit:,} down-sets, where this search gives up: "
                "raise the limit, coarsen the graph, or plan with 'graphpipe' or 'auto', which don't list them"
            )
    return sorted(found, key=lambda members: (members.bit_count(), members))


def list_prefixes(order: Sequence[int]) -> list[int]:
    """The down-sets that an order of the operators passes through: its prefixes.

    >>> list_prefixes([2, 0, 1])
    [0, 4, 5, 7]
    """
    prefixes = [0]
    for op in order:
        prefixes.append(prefixes[-1] | 1 << op)
    return prefixes


def members_of(members: int) -> tuple[int, ...]:
    """The operators in a set, in order.

    >>> members_of(0b1101)
    (0, 2, 3)
    """
    return tuple(i for i in range(members.bit_length()) if members >> i & 1)
