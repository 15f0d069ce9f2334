"""Stages with different numbers of replicas compute what the undecorated step computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxpar
from tests.equality.grid import small_case
from tests.oracle import assert_same, check_case


@pytest.mark.parametrize(
    ("replicas", "schedule"),
    [
        ((2, 1, 1), "1f1b"),
        ((1, 2, 4, 1), "1f1b"),
        ((3, 1, 4), "gpipe"),
        ((1, 6), "eager_1f1b"),
        ((2, 1, 2), "zb_h1"),
        ((1, 2), "interleaved_1f1b"),
        ((2, 1, 1), "zb_v"),
        ((4,), "1f1b"),
    ],
    ids=str,
)
def test_unequal_replicas(replicas, schedule):
    case = small_case("mlp", batch_size=48, depth=9)
    step = check_case(case, {"stage": sum(replicas)}, 2 if 6 in replicas else 4, schedule, replicas=replicas)
    assert step._last.machine.groups == step.plan().groups


@pytest.mark.parametrize("replicas", [(1, 2, 1), (2, 2)], ids=str)
def test_beside_a_data_axis(replicas):
    check_case(small_case("mlp", depth=9), {"stage": 4, "data": 2}, 4, replicas=replicas)


@pytest.mark.parametrize(
    "name", ["mlp_per_example", "indexed_loss", "unet", "integers_and_keys", "weight_decay_in_loss", "bf16_params"]
)
def test_kinds_of_values(name):
    """Rows of the output, positions, skip connections, keys, the state's own loss, half precision."""
    check_case(small_case(name), {"stage": 4}, 4, replicas=(1, 2, 1))


@pytest.mark.parametrize(("schedule", "replicas"), [("1f1b", (1, 2, 1)), ("zb_h1", (2, 1))], ids=str)
def test_transformer(schedule, replicas):
    """Dropout draws the same masks, the tied embedding is updated alike on all replicas."""
    check_case(small_case("gpt"), {"stage": sum(replicas)}, 4, schedule, steps=2, replicas=replicas)


def test_evaluation_where_training_placed_the_state():
    """The step of another function follows the groups in which the state lies."""
    case, evaluation = small_case("mlp", depth=9, outputs=5), small_case("forward_only", depth=9)
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    train = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, replicas=(1, 2, 1))
    state, _ = train(train.place(case.state), case.batch)
    evaluate = jaxpar.parallelize(evaluation.step, mesh=mesh, num_microbatches=2, state_of=train)
    found = evaluate(state, evaluation.batch)
    assert_same(found, jax.jit(evaluation.step)(train.gather(state), evaluation.batch))


def test_replicas_stay_equal_to_the_bit():
    """The copies of a stage's state never drift apart."""
    case = small_case("gpt")
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4, replicas=(3, 1))
    state = step.place(small_case("gpt", batch_size=24).state)
    for batch in small_case("gpt", batch_size=24).batches(2):
        state, _ = step(state, batch)
    for buffer in state.buffers:
        rows = np.asarray(buffer)
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(rows[0], rows[2])


def test_errors():
    case = small_case("mlp")
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    make = lambda replicas, count=4: jaxpar.parallelize(
        case.step, mesh=mesh, num_microbatches=count, replicas=replicas
    ).plan(case.state, case.batch)
    with pytest.raises(jaxpar.PlanError, match=r"replicas=\(2, 1\) takes 3 ranks, but the mesh has 4"):
        make((2, 1))
    with pytest.raises(jaxpar.PlanError, match="at least 1, for each stage"):
        make((4, 0))
    with pytest.raises(jaxpar.PlanError, match="8 examples doesn't split evenly among a stage's 3 replicas"):
        make((3, 1))
