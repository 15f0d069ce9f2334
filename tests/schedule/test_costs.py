import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, StageCosts, StageDag


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCosts((1, -2), (2, 2)), r"forward\[1\] = -2 < 0"),
        (lambda: StageCosts((1,), (2,), transfer=-1.0), r"transfer = -1\.0 < 0"),
        (lambda: StageCosts((1, 1), (2,)), "backward is for 1 stages, forward for 2"),
        (lambda: StageCosts((1,), (2,), input_backward=(3,)), r"input_backward\[0\] = 3 is more than .* 2"),
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
