"""The quick form of schedules and simulations against the originals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.plan.quick_run import run_quickly
from jaxpar.schedule import Link, StageCosts, fill_greedily, simulate
from tests.schedule.strategies import dags, exchanges, microbatches

seconds = st.floats(0, 10)


@st.composite
def cases(draw):
    dag, count = draw(dags()), draw(microbatches)
    forwards_first = draw(st.booleans())
    limit = tuple(count if forwards_first else draw(st.integers(1, count)) for _ in range(dag.num_stages))
    forward, backward = (tuple(draw(seconds) for _ in range(dag.num_stages)) for _ in range(2))
    sent = {edge: draw(seconds) for edge in (*dag.forward, *dag.backward)}
    if draw(st.booleans()):
        costs = StageCosts(forward, backward, sent)
    else:
        costs = StageCosts(forward, backward, sent_bytes=sent, link=Link(draw(seconds), draw(st.floats(0.1, 100))))
    return dag, count, limit, draw(exchanges), forwards_first, costs


@given(cases())
@settings(max_examples=200)
def test_it_is_the_greedy_timetable_and_its_simulations(case):
    dag, count, limit, exchange, forwards_first, costs = case
    timetable = fill_greedily(dag, count, limit=limit, exchange=exchange, forwards_first=forwards_first)
    run = run_quickly(dag, count, limit, exchange, forwards_first)
    assert run.codes == tuple(
        tuple(-1 if a is None else 2 * a.stage + "FB".index(a.kind) for a in cells) for cells in timetable.grid
    )
    assert run.peak_in_flight == timetable.peak_in_flight
    assert run.time_lockstep(costs) == pytest.approx(simulate(timetable, costs, mode="executor").makespan, rel=1e-12)
    assert run.time_freely(costs) == pytest.approx(simulate(timetable, costs, mode="free").makespan, rel=1e-12)
