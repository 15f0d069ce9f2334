"""What the messages say: the user's line, what couples there, and what to do; causes, not consequences."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from jaxpar.errors import TraceError
from jaxpar.trace import Batched, abstract_args, make_program, register_batch_rule
from jaxpar.trace.rules import registry
from tests.zoo import bad

from .law import check_law, check_refused, trace

X = np.random.default_rng(0).normal(size=(6, 4))
W = np.ones((4, 4))


def message_of(case):
    """What tracing a case of the zoo at 32 and 8 examples says."""
    args = abstract_args((case.state, case.batch))
    leaves, tree = jax.tree.flatten(args)
    state = len(jax.tree.leaves(args[0]))
    roles = ["state"] * state + ["batch"] * (len(leaves) - state)

    def at(n):
        avals = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) if i >= state else a for i, a in enumerate(leaves)]
        return jax.make_jaxpr(lambda *xs: case.step(*jax.tree.unflatten(tree, xs)))(*avals)

    with pytest.raises(TraceError) as caught:
        make_program(at(32), at(8), (32, 8), [f"input {i}" for i in range(len(leaves))], roles)
    return str(caught.value)


ZOO = {
    "batch_norm": ("model.apply(", "a statistic of the whole batch", "LayerNorm"),
    "sort_along_batch": ("jnp.sort(", "sorts along the batch", "for each example"),
    "cumsum_along_batch": ("jnp.cumsum(", "accumulates along the batch", "for each example"),
    "reverse_along_batch": ("[::-1]", "reverses the order of the examples", "for each example"),
    "contrastive": ('batch["y"].T', "multiplies examples with other examples", "bank kept in the state"),
    "log_of_mean_loss": (
        "jnp.log(",
        "the gradient of each example needs a value of the whole batch",
        "Differentiate a sum",
    ),
    "branch_on_batch_value": ("lax.cond(", "chooses what is computed for each example", "jnp.where"),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    code, clause, advice = ZOO[name]
    message = message_of(getattr(bad, name)())
    assert clause in message
    assert advice in message
    places = re.findall(r"^(/.*):(\d+)", message, re.M)
    assert len(places) == 1, message
    ((path, line),) = places
    assert code in Path(path).read_text().splitlines()[int(line) - 1]
    assert len(message.splitlines()) <= 8


@pytest.mark.parametrize("name", ["control_flow_on_batch_size", "loop_over_examples"])
def test_zoo_that_does_not_pair(name):
    message = message_of(getattr(bad, name)())
    assert "bad.py:" in message
    assert "with 32 examples than with 8" in message


def test_all_failures_at_once_forward_first():
    def loss(w, x):
        y = jnp.sort(x @ w, 0)
        z = jnp.cumsum(x @ w, 0)
        return (y * z).sum()

    with pytest.raises(TraceError) as caught:
        trace(lambda x, w: jax.value_and_grad(loss)(w, x), (X,), (W,))
    message = str(caught.value)
    assert "sorts along" in message
    assert "accumulates along" in message
    assert message.count("test_failures.py") == 2, message
    assert "backward" not in message


def test_many_failures_are_cut_short():
    def step(x):
        a, b, c, d = jnp.sort(x, 0), jnp.cumsum(x, 0), x[::-1], jnp.argmax(x, 0)
        e, f, g = jnp.cumprod(x, 0), x[:1], x @ x.T
        h = jnp.fft.fft(x, axis=0)
        return a, b, c, d, e, f, g, h

    with pytest.raises(TraceError, match=r"\.\.\. and 2 more\."):
        trace(step, (X,))


def test_a_failure_in_a_loop_names_its_own_line():
    def body(x, _):
        return jnp.sort(x, 0), None

    with pytest.raises(TraceError) as caught:
        trace(lambda x: jax.lax.scan(body, x, None, length=2)[0], (X,))
    line = body.__code__.co_firstlineno + 1
    assert f"test_failures.py:{line}:" in str(caught.value)


def test_an_operation_that_jax_spells_out_is_the_users_line():
    def ranks(x):
        return jnp.searchsorted(x[:, 0], jnp.ones(3))

    message = check_refused(ranks, (X,), (), "that doesn't grow evenly")  # log2 of the number of examples
    assert "scan at" in message
    check_law(lambda x: jax.vmap(lambda x: jnp.searchsorted(x, 0.5))(jnp.sort(x)), (X,), expect=[Batched])


mystery_p = Primitive("mystery")
mystery_p.def_impl(lambda x: x * 2)
mystery_p.def_abstract_eval(lambda x: x)


def mystery(x):
    return mystery_p.bind(x)


def test_a_primitive_without_rule():
    with pytest.raises(TraceError) as caught:
        trace(lambda x: mystery(x), (X,))
    message = str(caught.value)
    assert "jaxpar knows nothing of the primitive 'mystery'" in message
    assert "register_batch_rule" in message
    assert "coupled" not in message


def test_a_primitive_without_rule_on_what_is_no_example():
    """Needs none on invariant values; waits for a reduction to be complete."""
    traced = trace(lambda x, w: (mystery(w), mystery(x.sum(0))), (X,), (W,))
    names = [eqn.name for eqn in traced.typed.body.eqns]
    assert names == ["mystery", "reduce_sum", "complete", "mystery"]


def test_a_rule_of_the_users(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register_batch_rule(mystery_p, lambda eqn, types: [types[0]])
    traced = trace(lambda x: mystery(x) + 1, (X,))
    assert traced.out_types() == [Batched(0)]


def test_a_rule_of_the_users_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register_batch_rule("mystery", lambda eqn, types: [Batched(1)])
    with pytest.raises(TraceError, match="makes an array of n × 4 values, with n examples, out of the batch"):
        trace(lambda x: mystery(x), (X,))


def test_optimizers():
    """An update waits for each gradient once, whatever it does with it."""
    optax = pytest.importorskip("optax")
    params = {"w": W, "b": np.ones(4)}
    adam = optax.adamw(1e-2)
    for opt in (
        adam,
        optax.chain(optax.clip_by_global_norm(1.0), adam),
        optax.MultiSteps(adam, 2),
        optax.apply_if_finite(optax.sgd(1e-2, momentum=0.9), 3),
        optax.contrib.muon(1e-2),
    ):

        def step(x, params, state, opt=opt):
            loss = lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2)
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        traced = check_law(step, (X,), (params, opt.init(params)))
        assert [eqn.name for eqn in traced.typed.body.eqns].count("complete") == 3
