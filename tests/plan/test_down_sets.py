"""Down-sets against their definition, and the counts that are known."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan.down_sets import count_down_sets, iterate_down_sets, list_down_sets, list_prefixes, members_of


@st.composite
def dags(draw):
    size = draw(st.integers(1, 8))
    return [draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(size)]


@settings(max_examples=60, deadline=None)
@given(dags())
def test_they_are_the_sets_closed_under_predecessors(predecessors):
    size = len(predecessors)
    closed = [
        members
        for members in range(1 << size)
        if all(members >> p & 1 for v in range(size) if members >> v & 1 for p in predecessors[v])
    ]
    found = list(iterate_down_sets(predecessors, range(size)))
    assert len(found) == len(set(found))
    assert sorted(found) == closed


@pytest.mark.parametrize(("branches", "length"), [(2, 3), (3, 4), (4, 8)])
def test_branches_side_by_side(branches, length):
    predecessors = []
    for b, i in itertools.product(range(branches), range(length)):
        predecessors.append((b * length + i - 1,) if i else ())
    size = branches * length
    assert count_down_sets(predecessors, range(size), 10**6) == (length + 1) ** branches


def test_a_limit_is_kept():
    with pytest.raises(PlanError, match=r"20 operators has more than 500 down-sets"):
        list_down_sets([()] * 20, range(20), 500)
    assert len(list_down_sets([()] * 5, range(5), 32)) == 32


def test_prefixes_and_members():
    assert [members_of(p) for p in list_prefixes([1, 0])] == [(), (1,), (0, 1)]
