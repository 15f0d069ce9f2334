"""Random keys and bits of single examples. (Draws for the whole batch from one key are made by row: see `infer`.)"""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar import _jax
from jaxpar.trace.ir import Eqn
from jaxpar.trace.rules.registry import common_layout, require_complete, rules_for
from jaxpar.trace.types import BatchType, Coupling, Invariant

_OWN_KEYS = "Give each example a key of its own: jax.vmap(draw)(jax.random.split(key, batch_size), ...)."
_THREEFRY = "Use threefry keys (jax.random.key(seed, impl='threefry2x32')) for draws that examples make on their own."


@rules_for("random_wrap", "random_unwrap", "random_seed", "random_clone")
def _keys(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    """Keys lead, their words follow: the batch stays where it is."""
    require_complete(types)
    return [common_layout(types)]


@rules_for("random_bits", "random_split", "random_fold_in")
def _draws(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    """Keys lead, what is drawn from each follows."""
    require_complete(types)
    impl = _jax.key_impl(eqn.inputs[0].dtype)
    if impl != "threefry2x32" and not (impl == "rbg" and eqn.name != "random_bits"):
        # vmapped draws of the hardware generator all come from the first key
        raise Coupling(f"draws for each example from {impl} keys, which depends on all of them", _THREEFRY)
    return [common_layout(types)]


@rules_for("random_gamma")
def _gamma(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    require_complete(types)
    if isinstance(types[0], Invariant):
        raise Coupling("draws for all examples from one key, each with parameters of its own", _OWN_KEYS)
    if _jax.key_impl(eqn.inputs[0].dtype) != "threefry2x32":
        raise Coupling("draws for each example from keys of a generator that mixes them", _THREEFRY)
    return [common_layout(types)]


@rules_for("rng_bit_generator", "rng_uniform")
def _generator(eqn: Eqn, types: Sequence[BatchType]) -> list[BatchType]:
    raise Coupling("draws for each example with a generator that mixes their states", _THREEFRY)
