import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.plan import Op, OpGraph
from jaxpar.plan.series_parallel import Block, decompose
from tests.plan.planners.models import join_branches
from tests.plan.random_graphs import random_dag, random_series_parallel


def pairs_in_order(block: Block) -> set[tuple[int, int]]:
    """What the tree says comes before what."""
    found = set().union(*(pairs_in_order(part) for part in block.parts))
    if block.form == "series":
        for i, first in enumerate(block.parts):
            found |= {(a, b) for later in block.parts[i + 1 :] for a in first.ops for b in later.ops}
    return found


def order_of(graph: OpGraph) -> set[tuple[int, int]]:
    before: list[set[int]] = [set() for _ in graph.ops]
    for op in graph.order:
        for source in graph.predecessors[op]:
            before[op] |= before[source] | {source}
    return {(a, b) for b, sources in enumerate(before) for a in sources}


@given(st.integers(0, 10_000), st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_series_parallel_graphs_are_recognised_with_their_order(seed, size):
    graph = random_series_parallel(seed, size)
    tree, _, faithful = decompose(graph)
    assert faithful
    assert sorted(tree.ops) == list(range(size))
    assert pairs_in_order(tree) == order_of(graph)


@given(st.integers(0, 10_000), st.integers(1, 14))
@settings(max_examples=60, deadline=None)
def test_any_graph_gets_a_tree_that_keeps_its_order(seed, size):
    graph = random_dag(seed, size)
    tree, _, faithful = decompose(graph)
    assert sorted(tree.ops) == list(range(size))
    assert pairs_in_order(tree) >= order_of(graph)
    assert faithful == (pairs_in_order(tree) == order_of(graph))


def test_the_smallest_graph_that_is_not_series_parallel_is_completed_with_one_pair():
    ops = [Op(name, 1.0) for name in "abcd"]
    graph = OpGraph.build(ops, [("a", "c"), ("b", "c"), ("b", "d")])
    tree, _, faithful = decompose(graph)
    assert not faithful
    assert len(pairs_in_order(tree) - order_of(graph)) == 1


def test_equal_branches_have_one_key_and_unequal_ones_have_not():
    graph = join_branches(5, 3, 1)
    tree, _, _ = decompose(graph)
    branches = tree.parts[0]
    assert branches.form == "parallel"
    assert [len(group) for group in branches.groups()] == [5]
    changed = list(graph.ops)
    changed[0] = Op("branch0.0", 1.0, kind="layer")
    tree, _, _ = decompose(OpGraph(tuple(changed), graph.edges))
    assert sorted(len(group) for group in tree.parts[0].groups()) == [1, 4]


def test_parts_of_a_form_are_never_of_that_form():
    for seed in range(30):
        stack = [decompose(random_series_parallel(seed, 12))[0]]
        while stack:
            block = stack.pop()
            assert all(part.form != block.form for part in block.parts)
            assert block.form == "leaf" or len(block.parts) > 1
            stack += block.parts


@pytest.mark.parametrize("count", [2, 3])
def test_lockstep_joins_equal_steps(count):
    tree, factory, _ = decompose(join_branches(count, 4, 1))
    joint = factory.lockstep(tree.parts[0].parts)
    assert [len(part.ops) for part in joint.parts] == [count] * 4
    assert sorted(joint.ops) == sorted(tree.parts[0].ops)
