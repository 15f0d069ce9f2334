"""The oracle of the tests: a pipelined step must give what the undecorated step gives on the whole batch.

    check_case(zoo.CASES["gpt"](), {"stage": 4, "data": 2}, num_microbatches=8)

compares the state after three steps and what every step returned. The undecorated run of a case is made once per
process and kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpar
from tests.zoo import Case

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """What `steps` steps gave, on the host: the last state, and each step's outputs."""

    state: PyTree
    outputs: list[PyTree]


_REFERENCES: dict[tuple[Any, ...], Run] = {}


def to_host(tree: PyTree) -> PyTree:
    """`tree` with NumPy arrays for leaves; typed keys become their words."""
    return jax.tree.map(_leaf_to_host, tree)


def _leaf_to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf)  # a copy: the leaf may be donated later


def assert_same(actual: PyTree, expected: PyTree, rtol: float = 1e-9) -> None:
    """Each leaf of `actual` equals that of `expected`: max |a - e| <= rtol * max |e|, and exactly if not a float.

    Structure, shapes and dtypes must be the same; NaN equals NaN and inf equals inf. All leaves that differ are
    reported, worst first.
    """
    structure, expected_structure = jax.tree.structure(actual), jax.tree.structure(expected)
    assert structure == expected_structure, f"another tree:\n  {structure}\nexpected\n  {expected_structure}"
    actual_leaves = jax.tree.leaves_with_path(to_host(actual))
    problems = []
    for (path, a), e in zip(actual_leaves, jax.tree.leaves(to_host(expected)), strict=True):
        error, problem = _compare_leaves(a, e, rtol)
        if problem:
            problems.append((error, f"{jax.tree_util.keystr(path) or 'the value'} : {problem}"))
    problems.sort(key=lambda item: -item[0])
    assert not problems, f"{len(problems)} of {len(actual_leaves)} leaves differ:\n  " + "\n  ".join(
        text for _, text in problems[:20]
    )


def _compare_leaves(a: np.ndarray, e: np.ndarray, rtol: float) -> tuple[float, str | None]:
    """The error relative to the largest element of `e`, and what is wrong, if anything."""
    if (a.shape, a.dtype) != (e.shape, e.dtype):
        return np.inf, f"{a.dtype}{list(a.shape)}, expected {e.dtype}{list(e.shape)}"
    if not jnp.issubdtype(e.dtype, jnp.inexact):
        wrong = int(np.sum(a != e))
        return np.inf, f"{wrong} of {e.size} elements of {e.dtype}{list(e.shape)} differ" if wrong else None
    wide = np.complex128 if jnp.issubdtype(e.dtype, jnp.complexfloating) else np.float64
    a, e = a.astype(wide), e.astype(wide)
    finite = np.isfinite(e)
    if not np.array_equal(a[~finite], e[~finite], equal_nan=True) or not np.all(np.isfinite(a[finite])):
        return np.inf, f"{np.sum(~np.isfinite(a))} elements are not finite, expected {np.sum(~finite)}"
    difference = np.max(np.abs(a[finite] - e[finite]), initial=0.0)
    scale = max(1e-30, np.max(np.abs(e[finite]), initial=0.0))
    error = float(difference / scale)
    if error <= rtol:
        return error, None
    return error, f"differs by {difference:.2e}, {error:.2e} of its largest element {scale:.2e}"


def run_steps(
    case: Case, step: Any, state: PyTree, steps: int, gather: Callable[[PyTree], PyTree] = lambda tree: tree
) -> tuple[PyTree, list[PyTree]]:
    """`steps` steps from `state`, each finished before the next begins: the last state, and the outputs on the host.

    `gather` makes the user's tree of whatever outputs a step leaves on its ranks.
    """
    outputs = []
    for batch in case.batches(steps):
        state, output = case.split(step(state, batch, *case.extra), state)
        jax.block_until_ready((state, output))
        outputs.append(to_host(gather(output)))
    return state, outputs


def run_reference(case: Case, steps: int = 3) -> Run:
    """The undecorated step on the whole batch, jitted on one device. Made once per case, then remembered."""
    shapes = jax.tree.map(lambda x: (np.shape(x), str(jnp.result_type(x))), (case.state, case.batch, case.extra))
    key = (case.name, case.batch_size, steps, str(shapes))
    if key not in _REFERENCES:
        state, outputs = run_steps(case, jax.jit(case.step), case.state, steps)
        _REFERENCES[key] = Run(to_host(state), outputs)
    return _REFERENCES[key]


@contextlib.contextmanager
def _note_on_failure(what: str) -> Iterator[None]:
    """Adds what was compared to an assertion's message."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the {what}")
        raise


def check_case(
    case: Case,
    mesh_shape: dict[str, int],
    num_microbatches: int,
    schedule: Any = "1f1b",
    steps: int = 3,
    **options: Any,
) -> Any:
    """Runs `case` pipelined on a mesh of `mesh_shape` and compares it with the reference; returns the decorated step.

    `options` go to `jaxpar.parallelize`. The mesh takes the first devices there are, as many as it needs.
    """
    size = int(np.prod(list(mesh_shape.values())))
    mesh = jax.make_mesh(tuple(mesh_shape.values()), tuple(mesh_shape), devices=jax.devices()[:size])
    step = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=num_microbatches, schedule=schedule, **options)
    expected = run_reference(case, steps)

    def gather(tree: PyTree) -> PyTree:
        """Outputs like the state in structure and shape, gradients for instance, stay on the state's ranks."""
        is_placed = lambda x: isinstance(x, jaxpar.PlacedState)
        return jax.tree.map(lambda x: step.gather(x) if is_placed(x) else x, tree, is_leaf=is_placed)

    placed, outputs = run_steps(case, step, step.place(case.state), steps, gather)
    for i, (actual_output, expected_output) in enumerate(zip(outputs, expected.outputs, strict=True)):
        with _note_on_failure(f"outputs of step {i}, {case.name} on {mesh_shape}"):
            assert_same(actual_output, expected_output, case.rtol)
    with _note_on_failure(f"state after {steps} steps, {case.name} on {mesh_shape}"):
        assert_same(step.gather(placed), expected.state, case.rtol)
    assert not any(x.is_deleted() for x in jax.tree.leaves(case.state) if isinstance(x, jax.Array)), (
        "the state that the caller gave to place() was donated"
    )
    return step
