"""The zoo itself: each good case trains undecorated, and is well-conditioned enough to be compared at 1e-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import assert_same, run_reference, run_steps, to_host
from tests.zoo import BAD_CASES, CASES


@pytest.mark.parametrize("name", CASES)
def test_runs_and_learns(name):
    case = CASES[name]()
    run = run_reference(case)
    for leaf in jax.tree.leaves((run.state, run.outputs)):
        assert np.all(np.isfinite(leaf.astype(np.float64))), name
    losses = [output["loss"] if isinstance(output, dict) else output for output in run.outputs]
    assert len(set(map(float, losses))) == len(losses), losses
    if case.updates_state:
        before = jax.tree.leaves(to_host(case.state))
        assert any(not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(run.state), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rounding_stays_small(name):
    """Parameters that differ by rounding give a run that differs by rounding: no leaf is noise."""
    case = CASES[name]()
    rng = np.random.default_rng(0)

    def perturb(leaf):
        if not hasattr(leaf, "dtype") or leaf.dtype != jnp.float64:
            return leaf
        return leaf * (1 + 4e-16 * rng.choice([-1.0, 1.0], np.shape(leaf)))

    state, outputs = run_steps(case, jax.jit(case.step), jax.tree.map(perturb, case.state), 3)
    expected = run_reference(case)
    assert_same((to_host(state), outputs), (expected.state, expected.outputs), rtol=max(1e-10, case.rtol / 10))


@pytest.mark.parametrize("name", CASES)
def test_batches_of_any_size(name):
    case = CASES[name]()
    for size in (2, 6):
        shapes = jax.eval_shape(case.step, case.state, case.make_batch(size, 0), *case.extra)
        assert jax.tree.leaves(shapes)


@pytest.mark.parametrize("name", BAD_CASES)
def test_bad_cases_are_good_programs(name):
    """A bad case is bad for a pipeline only: undecorated it runs."""
    case = BAD_CASES[name]()
    jax.eval_shape(case.step, case.state, case.batch, *case.extra)
