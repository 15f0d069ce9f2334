"""The compiled program on the CPU; `tests/aot` asks the same of a TPU's and a GPU's."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxpar
from benchmarks.gpt import Config, init_state, make_batch, train_step
from tests.hlo import check_pipeline, check_rings, parse_hlo, ticks_body

CONFIG = Config(num_layers=2, dim=32, heads=4, vocab=64, length=16, batch_size=16)


@pytest.fixture(scope="module")
def compiled():
    mesh = jax.make_mesh((2, 2), ("stage", "data"), devices=jax.devices()[:4])
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=4)
    return step.lower(jax.eval_shape(partial(init_state, CONFIG)), make_batch(CONFIG)).compile()


@pytest.fixture(scope="module")
def hlo(compiled):
    return parse_hlo(compiled.as_text())


def test_one_switch_per_tick_and_transfers_beside_it(hlo, compiled):
    check_pipeline(hlo, compiled.built.machine)


def test_no_ring_is_copied(hlo, compiled):
    check_rings(hlo, compiled.built.machine)


def test_gradients_are_reduced_once_per_step(hlo):
    """Over replicas, after the loop: no reduction in any tick."""
    assert hlo.ops_in(ticks_body(hlo), opcode="all-reduce.*|reduce-scatter.*|all-gather.*|all-to-all.*") == []
    assert hlo.ops_in(hlo.entry, opcode="all-reduce.*") != []


# -- that the checks can fail ------------------------------------------------------------------------------------------


def test_a_permute_in_a_branch_is_found():
    mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2])

    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("stage"), check_vma=False)
    def step(x):
        send = lambda x: jax.lax.ppermute(x, "stage", [(0, 1)])
        return jax.lax.cond(jax.lax.axis_index("stage") == 0, send, lambda x: x, x)

    found = parse_hlo(jax.jit(step).lower(jnp.ones(4)).compile().as_text())
    assert [op.opcode for op in found.in_branches("collective-permute.*")] != []


def test_a_copied_ring_is_found():
    ring, row = jnp.zeros((6, 512)), jnp.ones(512)
    write = lambda ring, row, i: jax.lax.dynamic_update_index_in_dim(ring, row, i, 0)
    in_place = parse_hlo(jax.jit(write, donate_argnums=0).lower(ring, row, 2).compile().as_text())
    assert in_place.whole_writes(ring.shape, in_place.entry) == []
    with_a_copy = parse_hlo(jax.jit(write).lower(ring, row, 2).compile().as_text())
    assert [op.opcode for op in with_a_copy.whole_writes(ring.shape, with_a_copy.entry)] == ["copy"]
