"""The law can fail: a rule that isn't sound is caught."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.trace import INVARIANT, Batched, Partial
from jaxpar.trace.rules import registry

from .law import check_law

X = np.random.default_rng(0).normal(size=(6, 4))

UNSOUND = {
    "order": ("rev", lambda eqn, types: [types[0]], lambda x: x[::-1]),
    "neighbours": ("cumsum", lambda eqn, types: [types[0]], lambda x: jnp.cumsum(x, 0)),
    "invariant": ("reduce_sum", lambda eqn, types: [INVARIANT], lambda x: x.sum(0)),
    "reduction": ("reduce_max", lambda eqn, types: [Partial("sum")], lambda x: x.max(0)),
    "nonlinear": ("exp", lambda eqn, types: [types[0]], lambda x: jnp.exp(x.sum(0))),
    "layout": (
        "reshape",
        lambda eqn, types: [Batched(0, 2, 2)],
        lambda x: x.reshape(-1),
    ),
    "uniform": ("sin", lambda eqn, types: [Batched(0, uniform=True)], jnp.sin),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_rule_is_caught(name, monkeypatch):
    primitive, rule, f = UNSOUND[name]
    monkeypatch.setitem(registry._RULES, primitive, rule)
    with pytest.raises(AssertionError):
        check_law(f, (X,))
