"""Every published schedule runs, and computes what the undecorated step computes."""

from __future__ import annotations

import jax
import pytest

import jaxpar
from jaxpar.schedule import SCHEDULES, default_layout
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
    import jaxpar.lower.run as run

    done: list[tuple[int, str, int, int]] = []
    original = run.run_branch

    def reporting(branch, registers, carry, *args):
        kind, stage = branch.node
        note = lambda rank, m: done.append((int(rank), kind, stage, int(m)))
        jax.debug.callback(note, jax.lax.axis_index("stage"), registers[run.MICROBATCH], ordered=False)
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
