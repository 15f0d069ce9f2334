"""Steps that use one thing each: the structured operations of JAX inside a small network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .case import Case
from .mlp import apply_mlp, classification_batch, init_mlp, regression_batch, sgd, squared_errors


def regression(name, loss_fn, params, width, batch_size, extra=()):
    """Mean of `loss_fn(params, batch, *extra)`, one loss per example, and SGD."""

    def step(params, batch, *extra):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, *extra).mean())(params)
        return sgd(params, grads), {"loss": loss}

    return Case(name, step, params, regression_batch(width), batch_size, extra)


def indexed_loss(batch_size=32, depth=8, width=12, classes=5):
    """`x[jnp.arange(B), labels]`: rows picked by their own position."""
    params = init_mlp(jax.random.key(0), [width] * depth + [classes])

    def step(params, batch):
        def loss_fn(p):
            logprobs = jax.nn.log_softmax(apply_mlp(p, batch["x"]))
            return -logprobs[jnp.arange(logprobs.shape[0]), batch["label"]].mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sgd(params, grads), {"loss": loss}

    return Case("indexed_loss", step, params, classification_batch(width, classes), batch_size)


def one_hot_accuracy(batch_size=32, depth=8, width=12, classes=5):
    """A vmapped loss, one-hot labels, top-k accuracy, and sums that are divided only after the batch."""
    params = init_mlp(jax.random.key(0), [width] * depth + [classes])

    def loss_fn(p, x, label):
        logits = apply_mlp(p, x)
        return -jnp.sum(jax.nn.one_hot(label, classes) * jax.nn.log_softmax(logits)), logits

    def step(params, batch):
        def mean_loss(p):
            losses, logits = jax.vmap(loss_fn, (None, 0, 0))(p, batch["x"], batch["label"])
            return losses.mean(), logits

        (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        _, best = lax.top_k(logits, 2)
        correct = jnp.any(best == batch["label"][:, None], axis=-1)
        return sgd(params, grads), {"loss": loss, "top2": correct.sum() / correct.size, "perplexity": jnp.exp(loss)}

    return Case("one_hot_accuracy", step, params, classification_batch(width, classes), batch_size)


def nested_jit(batch_size=32, depth=8, width=12):
    """Each layer is a `jax.jit` of its own, and so is the optimizer."""

    @jax.jit
    def layer(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    def losses(params, batch):
        x = batch["x"]
        for p in params[:-1]:
            x = layer(p, x)
        return jnp.sum((x @ params[-1]["w"] - batch["y"]) ** 2, axis=-1)

    params = init_mlp(jax.random.key(0), [width] * depth + [4])
    params[-1].pop("b")

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: losses(p, batch).mean())(params)
        return jax.jit(sgd)(params, grads), {"loss": loss}

    return Case("nested_jit", step, params, regression_batch(width), batch_size)


@jax.custom_vjp
def clip_gradient(x):
    return x


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


def custom_vjp(batch_size=32, depth=8, width=12):
    """The identity with a clipped cotangent after each layer."""

    def losses(params, batch):
        x = batch["x"]
        for p in params[:-1]:
            x = clip_gradient(jnp.tanh(x @ p["w"] + p["b"]))
        return jnp.sum((x @ params[-1]["w"] + params[-1]["b"] - batch["y"]) ** 2, axis=-1)

    return regression("custom_vjp", losses, init_mlp(jax.random.key(0), [width] * depth + [4]), width, batch_size)


@jax.custom_jvp
def softplus(x):
    return jnp.logaddexp(x, 0.0)


@softplus.defjvp
def softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), jax.nn.sigmoid(x) * dx


def custom_jvp(batch_size=32, depth=8, width=12):
    """An activation with a derivative rule of its own."""

    def losses(params, batch):
        x = batch["x"]
        for p in params[:-1]:
            x = softplus(x @ p["w"] + p["b"]) - 0.5
        return jnp.sum((x @ params[-1]["w"] + params[-1]["b"] - batch["y"]) ** 2, axis=-1)

    return regression("custom_jvp", losses, init_mlp(jax.random.key(0), [width] * depth + [4]), width, batch_size)


def cond(batch_size=32, depth=8, width=12):
    """`lax.cond` on a number that is the same for every example: a step counter in the state."""
    state = {"params": init_mlp(jax.random.key(0), [width] * depth + [4]), "step": jnp.int64(0)}

    def step(state, batch):
        def loss_fn(params):
            x = batch["x"]
            for p in params[:-1]:
                z = x @ p["w"] + p["b"]
                x = lax.cond(state["step"] % 2 == 0, jnp.tanh, lambda z: jax.nn.silu(z) * 0.9, z)
            return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        return {"params": sgd(state["params"], grads), "step": state["step"] + 1}, {"loss": loss}

    return Case("cond", step, state, regression_batch(width), batch_size)


def scan_layers(batch_size=32, depth=6, width=12, remat=False):
    """Equal layers stacked in one array and run by `lax.scan`, between a first and a last layer."""
    first, *middle, last = init_mlp(jax.random.key(0), [width] * (depth + 2) + [4])
    params = {"first": first, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *middle), "last": last}

    def layer(x, p):
        return x + jnp.tanh(x @ p["w"] + p["b"]), None

    def losses(params, batch):
        x = jnp.tanh(batch["x"] @ params["first"]["w"] + params["first"]["b"])
        x, _ = lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])
        return jnp.sum((x @ params["last"]["w"] + params["last"]["b"] - batch["y"]) ** 2, axis=-1)

    name = "scan_layers_remat" if remat else "scan_layers"
    return regression(name, losses, params, width, batch_size)


def scan_layers_remat(batch_size=32, depth=6, width=12):
    """The same with `jax.checkpoint` on the scan's body."""
    return scan_layers(batch_size, depth, width, remat=True)


def checkpoint(batch_size=32, depth=8, width=12):
    """`jax.checkpoint` around every pair of layers, with a policy."""
    policy = jax.checkpoint_policies.dots_saveable

    def losses(params, batch):
        def pair(x, p, q):
            return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ q["w"] + q["b"])

        x = batch["x"]
        for p, q in zip(params[:-1:2], params[1:-1:2], strict=True):
            x = jax.checkpoint(pair, policy=policy)(x, p, q)
        return jnp.sum((x @ params[-1]["w"] + params[-1]["b"] - batch["y"]) ** 2, axis=-1)

    return regression("checkpoint", losses, init_mlp(jax.random.key(0), [width] * (depth + 1) + [4]), width, batch_size)


def while_loop(batch_size=32, depth=8, width=12):
    """A `lax.while_loop` without derivative: power iteration on a weight, to keep it from growing."""

    def spectral_norm(w, iterations=5):
        def body(carry):
            i, v = carry
            v = w.T @ (w @ v)
            return i + 1, v / jnp.linalg.norm(v)

        start = jnp.ones(w.shape[1]) / jnp.sqrt(w.shape[1])
        _, v = lax.while_loop(lambda carry: carry[0] < iterations, body, (0, start))
        return jnp.linalg.norm(w @ v)

    def losses(params, batch):
        first = params[0]
        scale = lax.stop_gradient(spectral_norm(lax.stop_gradient(first["w"])))
        return squared_errors([{"w": first["w"] / scale, "b": first["b"]}, *params[1:]], batch)

    return regression("while_loop", losses, init_mlp(jax.random.key(0), [width] * depth + [4]), width, batch_size)


def while_batched(batch_size=32, depth=8, width=12):
    """A `lax.while_loop` over the examples' activations: a fixed point of a contraction, seen by the loss as data."""

    def fixed_point(w, x):
        def body(carry):
            i, z = carry
            return i + 1, jnp.tanh(0.1 * (z @ w) + x)

        return lax.while_loop(lambda carry: carry[0] < 6, body, (0, jnp.zeros_like(x)))[1]

    def losses(params, batch):
        target = fixed_point(lax.stop_gradient(params[0]["w"]), batch["x"])
        return squared_errors(params, batch) + jnp.mean((apply_mlp(params, target) - batch["y"]) ** 2, axis=-1)

    return regression("while_batched", losses, init_mlp(jax.random.key(0), [width] * depth + [4]), width, batch_size)
