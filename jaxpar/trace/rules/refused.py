"""Primitives that no step may hold, or none on examples, with what to do instead of each."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.trace.ir import Eqn
from jaxpar.trace.rules.registry import rules_for
from jaxpar.trace.types import BatchType, Coupling

_MESH = "is written for a mesh by hand, and the pipeline lays out the step itself"
_NO_MESH = (
    "Write the operation for the whole arrays; jax.lax.with_sharding_constraint keeps the layout over axes that the "
    "pipeline doesn't use."
)

# Refused whatever the operands.
ALWAYS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("shard_map", "xla_pmap"), (_MESH, _NO_MESH)),
    **dict.fromkeys(
        ("all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum", "psum_invariant",
         "ragged_all_to_all", "reduce_scatter"),
        (_MESH, _NO_MESH),
    ),
    "rng_uniform": (
        "draws other numbers each time it is run",
        "Draw from a key: jax.random.uniform(key, shape).",
    ),
}  # fmt: skip

# Refused where an operand holds examples, or a reduction of them.
_ON_EXAMPLES = {
    "pure_callback": (
        "calls Python with the examples, and may mix them",
        "Write it in jax.numpy, or compute it before the step and pass it as part of the batch. If the callback treats "
        'rows one by one, say so: jaxpar.register_batch_rule("pure_callback", lambda eqn, types: ...).',
    ),
    "ragged_dot_general": (
        "multiplies groups of rows that examples fill together",
        "Give each example room of its own (a capacity per expert and example) and use einsum.",
    ),
}


@rules_for(*_ON_EXAMPLES)
def _refuse(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    raise Coupling(*_ON_EXAMPLES[eqn.name])
