"""Backwards cut into I and W, and several stages on a rank: the same numbers, whatever the timetable."""

from __future__ import annotations

import pytest

from jaxpar.schedule import Action, Timetable, gpipe, one_f_one_b, validate_timetable
from tests.equality.grid import small_case
from tests.oracle import check_case


def split_soon(dag, num_microbatches, every=1):
    """1F1B at half speed: the backward of each `every`-th micro-batch as I, and W in the next tick; others whole."""
    table = one_f_one_b(dag, num_microbatches)
    is_split = lambda a: a is not None and a.kind == "B" and a.microbatch % every == 0
    grid = []
    for row in table.grid:
        grid.append(tuple(Action("I", a.stage, a.microbatch) if is_split(a) else a for a in row))
        grid.append(tuple(Action("W", a.stage, a.microbatch) if is_split(a) else None for a in row))
    return validate_timetable(Timetable("soon", dag, num_microbatches, tuple(grid), table.exchange))


def split_late(dag, num_microbatches):
    """GPipe with all W at the end, in reverse: everything that they read is kept for all micro-batches at once."""
    table = gpipe(dag, num_microbatches)
    grid = [
        tuple(Action("I", a.stage, a.microbatch) if a is not None and a.kind == "B" else a for a in row)
        for row in table.grid
    ]
    for m in reversed(range(num_microbatches)):
        for k in range(dag.num_stages // dag.num_ranks):
            grid.append(tuple(Action("W", dag.stages_on(rank)[k], m) for rank in range(dag.num_ranks)))
    return validate_timetable(Timetable("late", dag, num_microbatches, tuple(grid), table.exchange))


def split_every_other(dag, num_microbatches):
    return split_soon(dag, num_microbatches, every=2)


SCHEDULES = {"soon": split_soon, "late": split_late, "every other": split_every_other}


@pytest.mark.parametrize(
    ("name", "placement", "schedule"),
    [("mlp", placement, schedule) for placement in ("one each", "round_robin", "v") for schedule in SCHEDULES]
    + [("gpt_remat", "one each", "late"), ("gpt_remat", "v", "every other"), ("unet", "round_robin", "soon")],
)
def test_split_backwards(name, placement, schedule):
    several = {} if placement == "one each" else {"stages_per_rank": 2, "placement": placement}
    mesh = {"stage": 2, "data": 2} if several else {"stage": 4}
    step = check_case(small_case(name), mesh, 4, SCHEDULES[schedule], **several)
    graph = step.plan().graph
    assert graph.is_split
    for stage in range(4):
        first, second = graph.programs["I", stage], graph.programs["W", stage]
        assert not set(first.eqns) & set(second.eqns) or name != "mlp"  # cheap ones may be repeated
        assert second.partials, "no gradient waits for W"
        assert first.eqns or stage == 0


@pytest.mark.parametrize(
    "name",
    "gpt towers resnet mlp_sum_loss mlp_per_example scan_layers scan_layers_remat cond custom_vjp custom_jvp "
    "checkpoint ema_params frozen_params bf16_params integers_and_keys no_optimizer".split(),
)
def test_split_backwards_of_many_models(name):
    check_case(small_case(name), {"stage": 2}, 4, split_soon)


@pytest.mark.parametrize("placement", ["round_robin", "v"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("name", ["gpt", "towers", "mlp_per_example"])
def test_several_stages_on_a_rank(name, schedule, placement):
    """Neighbouring stages may share a rank: what one makes the other finds there in the next tick."""
    step = check_case(small_case(name), {"stage": 2}, 4, schedule, stages_per_rank=2, placement=placement)
    ranks = {"round_robin": (0, 1, 0, 1), "v": (0, 1, 1, 0)}
    assert step.timetable().dag.rank_of == ranks[placement]


def test_fewer_microbatches_than_stages_on_a_rank():
    check_case(small_case("mlp"), {"stage": 2, "data": 2}, 1, "1f1b", stages_per_rank=4, placement="v")
