"""Recorded steps: real times, in the timetable's order, of a step that computes what it should."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxpar
from jaxpar.lower import make_recorder, run
from jaxpar.schedule.needs import find_needs
from tests.equality.grid import small_case
from tests.hlo import check_rings, parse_hlo
from tests.oracle import assert_same, run_reference, to_host


def make_step(case, shape, num_microbatches=8, **options):
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[: np.prod(list(shape.values()))])
    return jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=num_microbatches, **options)


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "shape", "replicas"),
    [
        ("1f1b", {"stage": 4, "data": 2}, None),
        ("zb_h1", {"stage": 4}, None),
        ("interleaved_1f1b", {"stage": 2, "model": 2}, None),
        ("gpipe", {"stage": 1}, None),
        ("1f1b", {"stage": 4}, (1, 2, 1)),
    ],
)
def test_times_are_in_order_and_after_what_the_actions_need(schedule, shape, replicas, exchange):
    case = small_case("mlp", depth=9)
    step = make_step(case, shape, schedule=schedule, schedule_options={"exchange": exchange}, replicas=replicas)
    recorded = step.record(case.state, case.batch)
    timetable = step.timetable()
    assert (recorded.mode, recorded.timetable) == ("measured", timetable)
    for rank in range(timetable.dag.num_ranks):
        order = timetable.order(rank)
        assert sorted(order, key=lambda action: recorded.start[action]) == list(order)
        assert all(recorded.end[action] > recorded.start[action] for action in order)
        assert all(recorded.end[a] <= recorded.start[b] for a, b in pairwise(order))
        for action in order:
            for need in find_needs(timetable.dag, action, recorded.start):
                assert recorded.end[need] <= recorded.start[action]


def test_forward_only_steps_are_recorded():
    case = small_case("forward_only")
    recorded = make_step(case, {"stage": 2}, 4).record(case.state, case.batch)
    assert {action.kind for action in recorded.start} == {"F"}
    assert len(recorded.median_costs().forward) == 2


@pytest.mark.parametrize("exchange", [1, 2])
def test_an_action_takes_its_own_time_and_not_that_of_those_it_waits_for(exchange, monkeypatch):
    original = run.run_branch

    def slow_on_stage_0(branch, registers, carry, *rest):
        if branch.node == ("B", 0):
            jax.debug.callback(lambda _: time.sleep(0.04), registers[0])
        return original(branch, registers, carry, *rest)

    monkeypatch.setattr(run, "run_branch", slow_on_stage_0)
    case = small_case("mlp", depth=9)
    step = make_step(case, {"stage": 4}, schedule_options={"exchange": exchange})
    recorded = step.record(case.state, case.batch)
    costs = recorded.median_costs()
    assert costs.backward[0] >= 0.04
    assert max(*costs.forward, *costs.backward[1:]) < 0.02
    assert recorded.makespan >= 8 * 0.04


def test_a_recorded_step_computes_the_same_and_leaves_the_state():
    case = small_case("gpt_no_dropout")
    step = make_step(case, {"stage": 2, "data": 2}, 4)
    placed = step.place(case.state)
    new, _ = case.split(step(placed, case.batch), case.state)
    before = to_host(step.gather(new))
    step.record(new, case.batch)
    assert not new.is_deleted
    assert_same(step.gather(new), before)

    built = step.plan(new, case.batch) and step._last
    (recorder,) = step._recorders.values()
    _, results = recorder.run(step._placed_arguments(built, (step.place(case.state), case.batch)))
    state, output = case.split(step._finish(built, *results), case.state)
    expected = run_reference(case, 1)
    assert_same(step.gather(state), expected.state, case.rtol)
    assert_same(to_host(output), expected.outputs[0], case.rtol)
    check_rings(parse_hlo(recorder.compiled.as_text()), built.machine)


def test_recording_inside_jit():
    case = small_case("mlp")
    step = make_step(case, {"stage": 2})
    placed = step.place(case.state)
    placed, *_ = step(placed, case.batch)
    with pytest.raises(jaxpar.LowerError, match=r"record runs a step.*call it outside"):
        jax.jit(lambda state: step.record(state, case.batch).makespan)(placed)


def test_clocks_of_several_processes():
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=i) for i in range(2)]))
    with pytest.raises(jaxpar.LowerError, match="2 processes: each has a clock of its own"):
        make_recorder(None, None, mesh, (), (), check=print)
