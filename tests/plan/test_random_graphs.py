"""The random graphs of other tests: as large as asked, the same for the same seed, and different for others."""

import pytest

from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel


@pytest.mark.parametrize("make", [random_series_parallel, random_dag])
def test_graphs_have_the_size_asked_for_and_depend_on_the_seed_alone(make):
    graphs = {(seed, size): make(seed, size) for seed in range(8) for size in range(1, 13)}
    assert all(graph.num_ops == size for (_, size), graph in graphs.items())
    assert all(make(*key) == graph for key, graph in graphs.items())
    assert len({tuple((e.source, e.target) for e in graphs[seed, 12].edges) for seed in range(8)}) == 8


def test_equal_branches_are_equal():
    """Copies of a branch have the same costs, so that fewer kinds than operators say that there are some."""
    copies = [random_series_parallel(seed, 12, equal_branches=1.0) for seed in range(10)]
    none = [random_series_parallel(seed, 12, equal_branches=0.0) for seed in range(10)]
    assert any(len({op.kind for op in graph.ops}) < 12 for graph in copies)
    assert all(len({op.kind for op in graph.ops}) == 12 for graph in none)


def test_every_operator_of_a_dag_but_the_first_has_an_input():
    for seed in range(10):
        graph = random_dag(seed, 9, density=0.0)
        assert sum(not sources for sources in graph.predecessors) == 1


def test_memory_is_as_tight_as_asked():
    graph = random_dag(3, 8)
    loose, tight = (random_cluster(3, 4, graph, tightness=x).devices[0].memory_bytes for x in (0.25, 0.5))
    assert loose == pytest.approx(2 * tight)
    assert random_cluster(3, 4).devices[0].memory_bytes == float("inf")
