from itertools import pairwise

import pytest
from hypothesis import given

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageDag, place_stages

from .strategies import dags


def test_chain():
    dag = StageDag.chain(4)
    assert dag.forward == ((0, 1), (1, 2), (2, 3))
    assert set(dag.backward) == {(3, 2), (2, 1), (1, 0)}
    assert dag.depth == (4, 3, 2, 1)
    assert [dag.neighbours(rank) for rank in range(4)] == [(1,), (0, 2), (1, 3), (2,)]


@pytest.mark.parametrize(
    ("num_ranks", "placement", "rank_of"),
    [
        (None, "round_robin", (0, 1, 2, 3, 4, 5)),
        (3, "round_robin", (0, 1, 2, 0, 1, 2)),
        (4, "round_robin", (0, 1, 2, 3, 0, 1)),
        (3, "v", (0, 1, 2, 2, 1, 0)),
        (2, "v", (0, 1, 1, 0, 0, 1)),
        (1, "v", (0,) * 6),
    ],
)
def test_chain_with_several_stages_on_a_rank(num_ranks, placement, rank_of):
    dag = StageDag.chain(6, num_ranks=num_ranks, placement=placement)
    assert dag.rank_of == rank_of == place_stages(6, dag.num_ranks, placement)
    assert (dag.forward, dag.backward) == (StageDag.chain(6).forward, StageDag.chain(6).backward)


def test_placement_errors():
    with pytest.raises(ScheduleError, match="no placement 'w'; known: round_robin, v"):
        StageDag.chain(4, num_ranks=2, placement="w")
    with pytest.raises(ScheduleError, match="at least one rank, got 0"):
        StageDag.chain(4, num_ranks=0)


@given(dags())
def test_orders_of_the_stages_follow_the_edges(dag):
    for order, edges in ((dag.forward_order, dag.forward), (dag.backward_order, dag.backward)):
        assert sorted(order) == list(range(dag.num_stages))
        assert all(order.index(src) < order.index(dst) for src, dst in edges)


def test_depth_is_the_longest_path_not_the_number_of_stages():
    towers = StageDag(5, ((0, 1), (1, 4), (2, 3), (3, 4)), (), (0, 1, 2, 3, 4), 5, has_backward=False)
    assert towers.depth == (3, 2, 3, 2, 1)
    skip = StageDag(3, ((0, 1), (1, 2), (0, 2)), (), (0, 1, 2), 3, has_backward=False)
    assert skip.depth == (3, 2, 1)


def test_neighbours_know_backward_edges_and_shared_ranks():
    dag = StageDag(4, ((0, 1), (1, 2)), ((3, 0), (2, 1)), (0, 1, 0, 2), 3)
    assert dag.neighbours(0) == (1, 2)
    assert dag.neighbours(2) == (0,)
    assert dag.stages_on(0) == (0, 2)
    assert (dag.lag(0, 2, 2), dag.lag(0, 1, 2)) == (1, 2)


@given(dags())
def test_depth_falls_along_each_edge(dag):
    assert all(dag.depth[src] >= dag.depth[dst] + 1 for src, dst in dag.forward)
    sources = {src for src, _ in dag.forward}
    for stage in range(dag.num_stages):
        assert (dag.depth[stage] == 1) == (stage not in sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": ((0, 3),)}, r"forward edge \(0, 3\) leaves the graph: stages are 0 \.\.\. 2"),
        ({"backward": ((1, 1),)}, r"backward edge \(1, 1\) joins stage 1 to itself"),
        ({"forward": ((0, 1), (0, 1))}, r"forward edge \(0, 1\) is given 2 times"),
        ({"forward": ((0, 1), (1, 2), (2, 0))}, r"forward edges form a cycle: \d -> \d -> \d -> \d"),
        ({"backward": ((1, 2), (2, 1))}, r"backward edges form a cycle: 1 -> 2 -> 1|2 -> 1 -> 2"),
        ({"rank_of": (0, 1, 5)}, r"stage 2 is on rank 5, but ranks are 0 \.\.\. 2"),
        ({"rank_of": (0, 1)}, r"rank_of gives the rank of 2 stages, but there are 3"),
        ({"has_backward": False}, r"backward edge \(1, 0\) in a forward-only graph"),
        (
            {"num_stages": 0, "forward": (), "backward": (), "rank_of": ()},
            "at least one stage and one rank, got 0 and 3",
        ),
    ],
)
def test_errors_name_the_edge(change, message):
    good = {"num_stages": 3, "forward": ((0, 1),), "backward": ((1, 0),), "rank_of": (0, 1, 2), "num_ranks": 3}
    with pytest.raises(ScheduleError, match=message):
        StageDag(**(good | change))


def test_cycle_follows_the_edges():
    with pytest.raises(ScheduleError) as error:
        StageDag(4, ((0, 1), (1, 2), (2, 3), (3, 1)), (), (0,) * 4, 1, has_backward=False)
    cycle = [int(stage) for stage in str(error.value).split("cycle: ")[1].split(" -> ")]
    assert all(edge in {(1, 2), (2, 3), (3, 1)} for edge in pairwise(cycle))


def test_all_problems_come_at_once():
    with pytest.raises(ScheduleError) as error:
        StageDag(2, ((0, 7), (1, 1)), (), (0, 9), 2)
    assert len(str(error.value).splitlines()) == 4
