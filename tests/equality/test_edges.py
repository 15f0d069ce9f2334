"""Settings at the edges: one of everything, one example at a time, more stages than layers, other forms of a mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import jaxpar
from tests.equality.grid import Setting, check, small_case
from tests.oracle import assert_same, check_case, run_reference, run_steps


@pytest.mark.parametrize("name", ["mlp", "gpt_no_dropout", "mlp_per_example", "forward_only", "integers_and_keys"])
def test_one_stage_one_replica_one_microbatch(name):
    check(name, Setting(1, 1, 1, "gpipe"))


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_per_example", "indexed_loss", "integers_and_keys", "while_batched", "gpt"]
)
def test_one_example_in_a_microbatch(name):
    """At size 1 JAX traces other equations (`squeeze`, no `broadcast`), which must not matter."""
    check(name, Setting(2, 2, 4, "1f1b"), batch_size=8)


def test_batch_of_one_example():
    """For which JAX traces other operations than for more: refused."""
    with pytest.raises(jaxpar.TraceError, match="1 example"):
        check("mlp", Setting(2, 1, 1, "1f1b"), batch_size=1)


@pytest.mark.parametrize("name", ["mlp", "mlp_per_example"])
def test_batch_of_two(name):
    check(name, Setting(2, 2, 1, "1f1b"), batch_size=2)
    check(name, Setting(2, 1, 2, "1f1b"), batch_size=2)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5])
def test_fewer_microbatches_than_stages(microbatches):
    case = small_case("mlp", batch_size=30)
    check_case(case, {"stage": 8}, microbatches)


def test_odd_numbers_of_stages_and_microbatches():
    case = small_case("mlp", batch_size=42)
    check_case(case, {"stage": 3, "data": 2}, 7)
    check_case(case, {"stage": 7}, 21)
    check_case(case, {"stage": 5}, 6, "gpipe")


@pytest.mark.parametrize("depth", [2, 3])
def test_more_stages_than_layers(depth):
    """Stages then hold parts of a layer, some of them none of the parameters."""
    case = small_case("mlp", depth=depth)
    step = check_case(case, {"stage": 8}, 4)
    assert step.plan().graph.num_stages == 8


def test_more_stages_than_blocks_of_a_transformer():
    check_case(small_case("gpt", num_layers=1), {"stage": 8}, 4)


def test_data_axis_first():
    """The order of the mesh's axes doesn't matter."""
    check_case(small_case("mlp"), {"data": 2, "stage": 4}, 4)


def test_axes_by_other_names():
    check_case(small_case("mlp"), {"pp": 4, "dp": 2}, 4, stage_axis="pp", data_axis="dp")


def test_no_data_axis_on_a_mesh_with_another_one():
    """An axis that nobody uses: every device along it does the same."""
    check_case(small_case("mlp"), {"stage": 2, "other": 2}, 4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_meshes_of_both_kinds(axis_type):
    case = small_case("mlp_per_example")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("stage", "data"), axis_types=(axis_type,) * 2)
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4)
    placed, outputs = run_steps(case, step, step.place(case.state), 3)
    assert_same(outputs, run_reference(case).outputs)
    assert_same(step.gather(placed), run_reference(case).state)


def test_pinned_cuts():
    """Stages of the user's choice give the same numbers as those of the planner."""
    case = small_case("gpt_no_dropout")
    step = check_case(case, {"stage": 2}, 4, cuts=["block_1"])
    check_case(case, {"stage": 4}, 4, cuts=["block_0", "block_1", "norm"])
    assert "block_1" in step.plan().summaries[1].modules
