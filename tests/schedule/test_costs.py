import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, Link, StageCosts, StageDag


def test_a_split_backward_costs_what_the_whole_does():
    costs = StageCosts((1.0,), (2.0,), input_backward=(1.5,))
    assert [costs.of(Action(kind, 0, 0)) for kind in "FBIWU"] == [1.0, 2.0, 1.5, 0.5, 0.0]
    assert costs.of(Action("I", 0, 3)) + costs.of(Action("W", 0, 3)) == costs.of(Action("B", 0, 3))


def test_transfers_by_edge_and_never_on_one_rank():
    dag = StageDag(3, ((0, 1), (1, 2)), ((2, 1), (1, 0)), (0, 1, 1), 2)
    costs = StageCosts.uniform(3, transfer=0.5)
    assert (costs.transfer_of(dag, 0, 1), costs.transfer_of(dag, 1, 2)) == (0.5, 0.0)
    by_edge = StageCosts((1,) * 3, (2,) * 3, {(1, 0): 0.25})
    assert (by_edge.transfer_of(dag, 0, 1), by_edge.transfer_of(dag, 1, 0)) == (0.0, 0.25)


def test_a_message_occupies_its_link_for_its_bytes_and_then_travels():
    dag = StageDag(3, ((0, 1), (1, 2)), ((2, 1), (1, 0)), (0, 1, 1), 2)
    costs = StageCosts((1,) * 3, (2,) * 3, sent_bytes={(0, 1): 10, (1, 2): 10, (1, 0): 30}, link=Link(0.5, 20))
    assert [costs.message(dag, *edge) for edge in ((0, 1), (1, 2), (1, 0))] == [(0.5, 0.5), (0, 0), (1.5, 0.5)]
    assert costs.transfer_of(dag, 1, 0) == 2.0


def test_links_by_pair_of_ranks_are_alike_in_both_directions_unless_given_for_each():
    dag = StageDag.chain(3)
    links = {(0, 1): Link(latency=1), (1, 2): Link(latency=2), (2, 1): Link(latency=3)}
    costs = StageCosts((1,) * 3, (2,) * 3, link=links)
    assert [costs.transfer_of(dag, *edge) for edge in ((0, 1), (1, 0), (1, 2), (2, 1))] == [1, 1, 2, 3]
    costs.check_for(dag)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCosts((1, -2), (2, 2)), r"forward\[1\] = -2 < 0"),
        (lambda: StageCosts((1,), (2,), transfer=-1.0), r"transfer = -1\.0 < 0"),
        (lambda: StageCosts((1, 1), (2,)), "backward is for 1 stages, forward for 2"),
        (lambda: StageCosts((1,), (2,), input_backward=(3,)), r"input_backward\[0\] = 3 is more than .* 2"),
        (
            lambda: StageCosts((1,), (2,), residual_bytes=(4,), weight_residual_bytes=(5,)),
            r"weight_residual_bytes\[0\] = 5 is more than the whole, residual_bytes\[0\] = 4",
        ),
        (lambda: StageCosts((1,), (2,), weight_residual_bytes=(5,)), "not the residual_bytes"),
        (lambda: StageCosts((1, 1), (2, 2), residual_bytes=(5,)), "residual_bytes is for 1 stages, forward for 2"),
        (lambda: StageCosts((1,), (2,), sent_bytes=-3), "sent_bytes = -3 < 0"),
        (lambda: StageCosts((1,), (2,), transfer=1.0, link=Link()), "both transfer and link"),
        (lambda: Link(latency=-1.0), r"got -1\.0 and inf"),
        (lambda: Link(bandwidth=0.0), r"got 0\.0 and 0\.0"),
        (
            lambda: StageCosts((1,) * 3, (2,) * 3, link={(0, 1): Link()}).check_for(StageDag.chain(3)),
            r"no link is given between the ranks \[\(1, 2\), \(2, 1\)\]",
        ),
        (
            lambda: StageCosts((1, 1), (1, 1), sent_bytes={(1, 1): 4.0}).check_for(StageDag.chain(2)),
            r"sent bytes are given for \[\(1, 1\)\]",
        ),
        (lambda: StageCosts.uniform(2).check_for(StageDag.chain(3)), "for 2 stages, but the stage graph has 3"),
        (lambda: StageCosts((1, 1)).check_for(StageDag.chain(2)), "costs have no backward"),
        (
            lambda: StageCosts((1,), (1,), {(0, 3): 1.0}).check_for(StageDag.chain(1)),
            r"\[\(0, 3\)\], which are not edges",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()
