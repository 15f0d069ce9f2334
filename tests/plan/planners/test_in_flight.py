import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan.planners import count_in_flight


@st.composite
def stage_graphs(draw):
    count = draw(st.integers(1, 8))
    return [sorted(draw(st.sets(st.integers(s + 1, count - 1)))) if s + 1 < count else [] for s in range(count)]


@given(stage_graphs(), st.integers(1, 64))
def test_equal_sizes_are_the_depth_times_the_size(successors, size):
    depth = [0] * len(successors)
    for s in reversed(range(len(successors))):
        depth[s] = 1 + max((depth[t] for t in successors[s]), default=0)
    assert count_in_flight(successors, [size] * len(successors)) == tuple(size * d for d in depth)


@given(stage_graphs(), st.data())
def test_more_than_any_successor_and_at_least_what_each_asks_for(successors, data):
    sizes = [data.draw(st.sampled_from([1, 2, 3, 4, 8, 12])) for _ in successors]
    found = count_in_flight(successors, sizes)
    for x, targets in enumerate(successors):
        assert found[x] >= sizes[x]
        for y in targets:
            i, b, mine = found[y], sizes[y], sizes[x]
            asked = i + b if mine <= b else -(-(i - b) // mine) * mine + 2 * mine
            assert found[x] >= asked
            assert found[x] > i
        if targets:
            assert any(
                found[x]
                == (
                    found[y] + sizes[y]
                    if sizes[x] <= sizes[y]
                    else -(-(found[y] - sizes[y]) // sizes[x]) * sizes[x] + 2 * sizes[x]
                )
                for y in targets
            )


def test_by_hand():
    # 6 -> 4 -> 1: the last holds 1; 4 holds 0 rounded up to 0, and 2 * 4; 6 holds 4 rounded up to 6, and 2 * 6.
    assert count_in_flight([[1], [2], []], [6, 4, 1]) == (18, 8, 1)
    assert count_in_flight([[1], []], [2, 8]) == (16, 8)


def test_bad_input():
    with pytest.raises(PlanError, match="stage 1: 0"):
        count_in_flight([[1], []], [1, 0])
    with pytest.raises(PlanError, match="cycle"):
        count_in_flight([[1], [0]], [1, 1])
    with pytest.raises(PlanError, match="2 stages"):
        count_in_flight([[1], []], [1])
