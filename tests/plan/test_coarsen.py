from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import Op, OpGraph
from jaxpar.plan.coarsen import coarsen
from tests.plan.planners.models import join_branches
from tests.plan.random_graphs import random_dag, random_series_parallel


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_blocks_partition_the_operators_without_a_cycle(seed, size, most, series_parallel):
    graph = (random_series_parallel if series_parallel else random_dag)(seed, size)
    coarse = coarsen(graph, most)  # a cycle would be an error of OpGraph
    assert coarse.graph.num_ops <= most
    assert sorted(op for ops in coarse.members for op in ops) == list(range(size))
    for what in ("state_bytes", "gradient_bytes", "residual_bytes"):
        assert getattr(coarse.graph, what).sum() == pytest.approx(getattr(graph, what).sum())
    for n in (0.5, 1, 3, 100):
        assert coarse.graph.forward_seconds(n).sum() == pytest.approx(graph.forward_seconds(n).sum())
        assert coarse.graph.backward_seconds(n).sum() == pytest.approx(graph.backward_seconds(n).sum())


def test_small_graphs_stay_as_they_are():
    graph = random_dag(1, 9)
    assert coarsen(graph, 9).graph == graph


def test_equal_branches_are_cut_alike():
    coarse = coarsen(join_branches(4, 24, 0), 40)
    lengths = [len(ops) for ops in coarse.members if len(ops) > 1]
    assert len(lengths) % 4 == 0
    assert all(lengths.count(length) % 4 == 0 for length in set(lengths))


def test_blocks_are_even():
    names = [f"op{i}" for i in range(1000)]
    graph = OpGraph.build([Op(name, 1.0) for name in names], list(pairwise(names)))
    seconds = coarsen(graph, 50).graph.forward_seconds(1)
    assert seconds.max() <= 1.1 * np.median(seconds)


def test_ten_thousand_operators():
    graph = join_branches(4, 2000, 2000)
    coarse = coarsen(graph, 100)
    assert coarse.graph.num_ops <= 100
    assert sorted(op for ops in coarse.members for op in ops) == list(range(graph.num_ops))


def test_bytes_between_blocks_count_each_value_once():
    ops = [Op("a", 1.0, output_bytes=8.0), Op("b", 1.0), Op("c", 1.0), Op("d", 1.0)]
    graph = OpGraph.build(ops, [("a", "b"), ("b", "c"), ("a", "c", 4.0), ("c", "d", 2.0), ("b", "d", 1.0)])
    coarse = coarsen(graph, 2)
    assert sum(len(ops) for ops in coarse.members) == 4
    (edge,) = coarse.graph.edges
    into = set(coarse.members[edge.target])
    values = {}
    for e in graph.edges:
        if e.target in into and e.source not in into:
            values[e.source] = max(values.get(e.source, 0.0), e.bytes)
    assert edge.bytes == sum(values.values())


def test_no_blocks_is_an_error():
    with pytest.raises(PlanError, match="max_ops=0"):
        coarsen(random_dag(1, 3), 0)
