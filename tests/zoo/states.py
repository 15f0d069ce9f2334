"""Steps whose state or arguments are not just a tree of float64 parameters and a dict of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .case import Case
from .mlp import apply_mlp, cross_entropies, init_mlp, regression_batch, sgd, squared_errors


def integers_and_keys(batch_size=32, depth=8, width=12):
    """A state with a counter, integers, flags, a typed key, a raw key and an empty tuple; dropout by hand."""
    state = {
        "params": init_mlp(jax.random.key(0), [width] * depth + [4]),
        "step": jnp.int32(0),
        "seen": jnp.zeros((3,), jnp.int64),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(3),
        "raw_key": jax.random.PRNGKey(4),
        "nothing": (),
    }

    def step(state, batch):
        key, next_key = jax.random.split(state["key"])
        raw_key, next_raw_key = jax.random.split(state["raw_key"])

        def loss_fn(params):
            mask = jax.random.bernoulli(key, 0.8, batch["x"].shape)
            x = jnp.where(mask, batch["x"], 0.0) + 0.01 * jax.random.normal(raw_key, (width,))
            return squared_errors(params, batch | {"x": x}).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        new_state = {
            "params": sgd(state["params"], grads),
            "step": state["step"] + 1,
            "seen": state["seen"].at[state["step"] % 3].add(batch["x"].shape[0]),
            "flags": ~state["flags"],
            "key": next_key,
            "raw_key": next_raw_key,
            "nothing": state["nothing"],
        }
        return new_state, {"loss": loss, "step": state["step"]}

    return Case("integers_and_keys", step, state, regression_batch(width), batch_size)


def batch_tuple(batch_size=32, depth=8, width=12):
    """The batch is a tuple `(x, y)`, the state too."""
    make_dict = regression_batch(width)
    optimizer = optax.sgd(0.05, momentum=0.9)
    params = init_mlp(jax.random.key(0), [width] * depth + [4])

    def make_batch(size, seed):
        batch = make_dict(size, seed)
        return batch["x"], batch["y"]

    def step(state, batch):
        params, momentum = state
        x, y = batch
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply_mlp(p, x) - y) ** 2))(params)
        updates, momentum = optimizer.update(grads, momentum)
        return (optax.apply_updates(params, updates), momentum), loss

    return Case("batch_tuple", step, (params, optimizer.init(params)), make_batch, batch_size)


def batch_array(batch_size=32, depth=8, width=12):
    """The batch is a bare array: an autoencoder."""
    params = init_mlp(jax.random.key(0), [width] * (depth + 1))

    def make_batch(size, seed):
        return np.random.default_rng(seed).normal(size=(size, width))

    def step(params, x):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply_mlp(p, x) - x) ** 2))(params)
        return sgd(params, grads), loss

    return Case("batch_array", step, params, make_batch, batch_size)


def learning_rate_argument(batch_size=32, depth=8, width=12):
    """A third argument that has no batch dimension."""
    params = init_mlp(jax.random.key(0), [width] * depth + [4])

    def step(params, batch, learning_rate):
        loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
        return sgd(params, grads, learning_rate), {"loss": loss}

    extra = (jnp.float64(0.03),)
    return Case("learning_rate_argument", step, params, regression_batch(width), batch_size, extra)


def bf16_params(batch_size=32, depth=8, width=12):
    """Parameters stored in bfloat16, used and differentiated through a cast to float64."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_mlp(jax.random.key(0), [width] * depth + [4]))

    def step(params, batch):
        def loss_fn(p):
            return squared_errors(jax.tree.map(lambda x: x.astype(jnp.float64), p), batch).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sgd(params, grads), {"loss": loss}

    return Case("bf16_params", step, params, regression_batch(width), batch_size, rtol=2e-2)


def frozen_params(batch_size=32, depth=8, width=12):
    """Half of the layers are in the state and never change, nor are they differentiated."""
    layers = init_mlp(jax.random.key(0), [width] * depth + [4])
    state = {"frozen": layers[: depth // 2], "trained": layers[depth // 2 :]}

    def step(state, batch):
        def loss_fn(trained):
            return squared_errors([*state["frozen"], *trained], batch).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state["trained"])
        return state | {"trained": sgd(state["trained"], grads)}, {"loss": loss}

    return Case("frozen_params", step, state, regression_batch(width), batch_size)


def ema_params(batch_size=32, depth=8, width=12):
    """A moving average of the parameters, used as a teacher in the loss."""
    params = init_mlp(jax.random.key(0), [width] * depth + [4])
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params)}

    def step(state, batch):
        def loss_fn(p):
            teacher = apply_mlp(state["ema"], batch["x"])
            return squared_errors(p, batch).mean() + 0.1 * jnp.mean((apply_mlp(p, batch["x"]) - teacher) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        params = sgd(state["params"], grads)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], params)
        return {"params": params, "ema": ema}, {"loss": loss}

    return Case("ema_params", step, state, regression_batch(width), batch_size)


def weight_decay_in_loss(batch_size=32, depth=8, width=12, classes=5):
    """A loss with a term that no example enters, weighted labels, and metrics that span all parameters."""
    params = init_mlp(jax.random.key(0), [width] * depth + [classes])

    def make_batch(size, seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(size, width))
        return {"x": x, "label": rng.integers(0, classes, size), "weight": rng.uniform(size=size)}

    def step(params, batch):
        def loss_fn(p):
            losses = cross_entropies(apply_mlp(p, batch["x"]), batch["label"])
            decay = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
            return jnp.average(losses, weights=batch["weight"]) + 1e-4 * decay, decay

        (loss, decay), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return sgd(params, grads), {"loss": loss, "decay": decay, "grad_norm": optax.tree.norm(grads)}

    return Case("weight_decay_in_loss", step, params, make_batch, batch_size)
