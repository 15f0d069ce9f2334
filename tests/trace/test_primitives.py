"""Each primitive of JAX, on the version at hand, has been decided on."""

import jax.extend.core.primitives as primitives
from jax import lax
from jax.extend import random

from jaxpar.trace.rules import find_rule, refused

# Spliced into the caller, or with types of its own in `control`.
CALLS = {"call", "closed_call", "composite", "custom_jvp_call", "custom_linear_solve", "custom_vjp_call", "eval_jaxpr",
         "jit", "remat2", "checkpoint", "scan", "while", "cond"}  # fmt: skip
# Without operands, so that there is nothing to infer.
CREATE = {"iota", "create_token", "empty2"}
# Never in a jaxpr that `make_jaxpr` returns: the marks of derivatives under way.
INTERNAL = {"custom_lin", "dce_sink"}
# They have effects, and capture refuses those.
EFFECTS = {"get", "swap", "after_all"}


def test_every_primitive_is_decided():
    names = {getattr(module, n).name for module in (lax, primitives, random) for n in dir(module) if n.endswith("_p")}
    decided = CALLS | CREATE | INTERNAL | EFFECTS | set(refused.ALWAYS)
    assert sorted(n for n in names if find_rule(n) is None and n not in decided) == []
