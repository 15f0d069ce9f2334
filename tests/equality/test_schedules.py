"""Every published schedule runs, and computes what the undecorated step computes."""

from __future__ import annotations

import jax
import pytest

import jaxpar
from jaxpar.lower import run
from jaxpar.lower.branches import MICROBATCH
from jaxpar.schedule import SCHEDULES, default_layout, simulate
from tests.equality.grid import small_case
from tests.oracle import check_case


@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule, num_microbatches):
    case = small_case("mlp", batch_size=48, depth=9)
    check_case(case, {"stage": 4, "data": 2}, num_microbatches, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["gpt", "towers"])
def test_every_schedule_of_transformers(name, schedule, ranks):
    per_rank, _ = default_layout(schedule)
    parameters = {"num_layers": max(4, ranks * per_rank // 2)} if name == "gpt" else {}
    check_case(small_case(name, **parameters), {"stage": ranks}, 8, schedule, steps=2)


@pytest.mark.parametrize(
    ("name", "schedule"), [("gpt", "zb_h1"), ("gpt", "zb_v"), ("towers", "zb_h2"), ("towers", "interleaved_1f1b")]
)
def test_some_schedules_of_transformers(name, schedule):
    check_case(small_case(name), {"stage": 2}, 4, schedule, steps=2)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "interleaved_1f1b", "zb_v"])
def test_actions_run_in_the_timetables_order(schedule, monkeypatch):
    """Each rank reports what it does, from inside the compiled program."""
    done: list[tuple[int, str, int, int]] = []
    original = run.run_branch

    def reporting(branch, registers, carry, *args):
        kind, stage = branch.node
        note = lambda rank, m: done.append((int(rank), kind, stage, int(m)))
        jax.debug.callback(note, jax.lax.axis_index("stage"), registers[MICROBATCH], ordered=False)
        return original(branch, registers, carry, *args)

    monkeypatch.setattr(run, "run_branch", reporting)
    case = small_case("mlp", depth=9)
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=8, schedule=schedule)
    jax.block_until_ready(step(step.place(case.state), case.batch))
    jax.effects_barrier()
    timetable = step.timetable()
    for rank in range(4):
        wanted = [(a.kind, a.microbatch) for a in timetable.order(rank)]
        assert [(kind, m) for r, kind, _, m in done if r == rank] == wanted


@pytest.mark.parametrize("limit", [{}, {"memory_limit": 3}, {"memory_bytes": 20_000}, {"split_backward": False}])
def test_a_timetable_that_is_searched_for(limit):
    """By the plan's own costs; it is never slower than a named one that fits, and says how far from the bound it is."""
    options = {"seconds": 1.0, "progress": False, "cache": False, **limit}
    step = check_case(small_case("mlp", depth=9), {"stage": 4}, 8, "auto", schedule_options=options)
    result = step._last.search
    assert result.timetable is step.timetable()
    assert result.lower_bound <= result.makespan * (1 + 1e-9)
    assert result.makespan <= min(c.makespan for c in result.candidates if c.fits) * (1 + 1e-9)
    assert f"takes less than {result.lower_bound / result.makespan:.1%}" in step.explain()
    if "memory_limit" in limit:
        assert max(step.timetable().peak_in_flight_on_rank) <= 3
    if "memory_bytes" in limit:
        assert max(simulate(step.timetable(), step.plan().costs).peak_bytes_on_rank) <= 20_000
    if "split_backward" in limit:
        assert not step.timetable().is_split


def test_options_of_the_search():
    case = small_case("mlp")
    mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, schedule="auto", schedule_options={"extra": 1})
    with pytest.raises(jaxpar.ScheduleError, match=r"'auto' takes memory_limit, memory_bytes.*not extra"):
        step.plan(case.state, case.batch)


def test_evaluation_needs_no_search():
    check_case(small_case("forward_only"), {"stage": 2}, 4, "auto")
