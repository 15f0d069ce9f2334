"""The partition of a chain, against all partitions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.plan import partition_sequence


def all_partitions(count, num_stages):
    for starts in itertools.combinations(range(1, count), num_stages - 1):
        yield (0, *starts)


def bottleneck(times, starts):
    bounds = [*starts, len(times)]
    return max(sum(times[a:b]) for a, b in itertools.pairwise(bounds))


def cost(cut_costs, starts):
    return sum(cut_costs[i] for i in starts[1:])


@st.composite
def chains(draw):
    """Times and costs of cuts, small integers so that there are ties, and a number of stages."""
    count = draw(st.integers(1, 8))
    integers = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    return draw(integers), draw(integers), draw(st.integers(1, count))


@given(chains(), st.sampled_from([0.0, 0.05, 0.5]))
def test_as_good_as_any(chain, tolerance):
    """The least bottleneck, and within the tolerance of it the cheapest cuts."""
    times, cut_costs, num_stages = chain
    starts = partition_sequence(times, cut_costs, num_stages, tolerance)
    everything = list(all_partitions(len(times), num_stages))
    assert starts in everything
    least = min(bottleneck(times, p) for p in everything)
    allowed = [p for p in everything if bottleneck(times, p) <= least * (1 + tolerance) + 1e-9]
    assert starts in allowed
    assert cost(cut_costs, starts) == min(cost(cut_costs, p) for p in allowed)


def test_as_many_stages_as_blocks():
    assert partition_sequence([3, 1, 2], [0, 9, 9], 3) == (0, 1, 2)


def test_one_stage():
    assert partition_sequence([3, 1, 2], [0, 9, 9], 1) == (0,)


@pytest.mark.parametrize("num_stages", [2, 3, 5, 8])
def test_equal_blocks_are_dealt_out_evenly(num_stages):
    starts = partition_sequence([1.0] * 40, [0.0] * 40, num_stages, tolerance=0.0)
    assert bottleneck([1.0] * 40, starts) == -(-40 // num_stages)


def test_a_cheap_cut_wins_only_within_the_tolerance():
    times, costs = [10.0, 1.0, 10.0, 1.0], [0, 5, 5, 1]
    assert partition_sequence(times, costs, 2, 0.05) in {(0, 1), (0, 2)}  # bottlenecks 12 and 11: the second is least
    assert partition_sequence(times, costs, 2, 0.0) == (0, 2)
    assert partition_sequence(times, costs, 2, 1.0) == (0, 3)
