"""The quick form of schedules and simulations against the originals."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.plan.quick_run import Limits, find_limits, run_quickly
from jaxpar.schedule import SCHEDULES, Link, StageCosts, fill_greedily, make_timetable, simulate
from tests.schedule.strategies import dags, exchanges, microbatches

seconds = st.floats(0, 10)


@st.composite
def priced(draw, dag) -> StageCosts:
    forward, inputs, weights = (tuple(draw(seconds) for _ in range(dag.num_stages)) for _ in range(3))
    backward = tuple(i + w for i, w in zip(inputs, weights, strict=True))
    sent = {edge: draw(seconds) for edge in (*dag.forward, *dag.backward)}
    if draw(st.booleans()):
        return StageCosts(forward, backward, sent, inputs)
    link = Link(draw(seconds), draw(st.floats(0.1, 100)))
    return StageCosts(forward, backward, input_backward=inputs, sent_bytes=sent, link=link)


@st.composite
def cases(draw):
    dag, count = draw(dags(has_backward=True)), draw(microbatches)
    first = draw(st.booleans())
    limit = tuple(count if first else draw(st.integers(1, count)) for _ in range(dag.num_stages))
    split = not first and draw(st.booleans())
    hold = tuple(draw(st.integers(1, count)) for _ in range(dag.num_stages)) if split else None
    return dag, count, Limits(limit, hold, draw(exchanges), first), draw(priced(dag))


def check_equal(run, timetable, costs):
    codes = {"F": 0, "B": 1, "I": 1, "W": 2}
    assert run.codes == tuple(
        tuple(-1 if a is None else 3 * a.stage + codes[a.kind] for a in cells) for cells in timetable.grid
    )
    assert run.peak_in_flight == timetable.peak_in_flight
    assert run.time_lockstep(costs) == pytest.approx(simulate(timetable, costs, mode="executor").makespan, rel=1e-12)
    assert run.time_freely(costs) == pytest.approx(simulate(timetable, costs, mode="free").makespan, rel=1e-12)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_it_is_the_greedy_timetable_and_its_simulations(case):
    dag, count, limits, costs = case
    timetable = fill_greedily(
        dag,
        count,
        limit=limits.before_backward,
        hold=limits.hold,
        exchange=limits.exchange,
        forwards_first=limits.forwards_first,
    )
    check_equal(run_quickly(dag, count, limits), timetable, costs)


@given(dags(has_backward=True), microbatches, st.data())
@settings(max_examples=100, deadline=None)
def test_schedules_have_the_limits_that_they_work_by(dag, count, data):
    name = data.draw(st.sampled_from(["1f1b", "eager_1f1b", "gpipe", "zb_h1", "zb_h2"]))
    options = {"exchange": data.draw(exchanges)} if data.draw(st.booleans()) else {}
    if name == "1f1b":
        options |= {"extra": data.draw(st.none() | st.integers(0, 3))}
    limits = find_limits(name, options, dag, count)
    check_equal(run_quickly(dag, count, limits), make_timetable(name, dag, count, **options), data.draw(priced(dag)))


def test_what_works_by_other_rules_has_none():
    from jaxpar.schedule import StageDag

    chain = StageDag.chain(2)
    known = {name for name in SCHEDULES if find_limits(name, {}, chain, 4)}
    assert known == {"1f1b", "eager_1f1b", "gpipe", "zb_h1", "zb_h2"}
    assert find_limits("1f1b", {"exchange": 3}, chain, 4) is None
    assert find_limits("1f1b", {"extra": -1}, chain, 4) is None
    assert find_limits("gpipe", {"extra": 1}, chain, 4) is None
    assert find_limits("gpipe", {}, StageDag.chain(2, has_backward=False), 4) is None
