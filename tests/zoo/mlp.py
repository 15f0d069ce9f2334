"""Multi-layer perceptrons in bare JAX: a list of dicts, SGD by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .case import Case

LEARNING_RATE = 0.05


def init_mlp(key, sizes):
    """A list of dense layers, one for each pair of neighbours in `sizes`."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (n, m), jnp.float64) / np.sqrt(n), "b": jnp.zeros((m,), jnp.float64)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply_mlp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def sgd(params, grads, learning_rate=LEARNING_RATE):
    return jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)


def squared_errors(params, batch):
    """Per example: x[B, n] -> [B]."""
    return jnp.sum((apply_mlp(params, batch["x"]) - batch["y"]) ** 2, axis=-1)


def cross_entropies(logits, labels):
    """Per example: logits[B, n], labels[B] -> [B]."""
    logprobs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logprobs, labels[:, None], axis=-1)[:, 0]


def regression_batch(width, outputs=4):
    """A `make_batch`: x[B, width], and y[B, outputs], a function of x."""
    teacher = np.random.default_rng(7).normal(size=(width, outputs))

    def make_batch(size, seed):
        x = np.random.default_rng(seed).normal(size=(size, width))
        return {"x": x, "y": np.sin(x @ teacher)}

    return make_batch


def classification_batch(width, classes):
    """A `make_batch`: x[B, width], and label[B], a function of x."""
    teacher = np.random.default_rng(7).normal(size=(width, classes))

    def make_batch(size, seed):
        x = np.random.default_rng(seed).normal(size=(size, width))
        return {"x": x, "label": np.argmax(x @ teacher, axis=-1)}

    return make_batch


def mlp(batch_size=32, depth=10, width=12, outputs=4):
    """Mean squared error and SGD; `depth` dense layers."""
    params = init_mlp(jax.random.key(0), [width] * depth + [outputs])

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
        return sgd(params, grads), {"loss": loss}

    return Case("mlp", step, params, regression_batch(width, outputs), batch_size)


def mlp_sum_loss(batch_size=32, depth=10, width=12, outputs=4):
    """The same with the sum of the examples' losses."""
    params = init_mlp(jax.random.key(0), [width] * depth + [outputs])

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).sum())(params)
        return sgd(params, grads, 0.001), {"loss": loss}

    return Case("mlp_sum_loss", step, params, regression_batch(width, outputs), batch_size)


def mlp_per_example(batch_size=32, depth=10, width=12, classes=5):
    """A classifier whose step returns each example's loss and logits beside the batch's accuracy."""
    params = init_mlp(jax.random.key(0), [width] * depth + [classes])

    def step(params, batch):
        def loss_fn(p):
            logits = apply_mlp(p, batch["x"])
            losses = cross_entropies(logits, batch["label"])
            return losses.mean(), (losses, logits)

        (loss, (losses, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return sgd(params, grads), {"loss": loss, "losses": losses, "logits": logits, "accuracy": accuracy}

    return Case("mlp_per_example", step, params, classification_batch(width, classes), batch_size)


def forward_only(batch_size=32, depth=10, width=12, classes=5):
    """An evaluation step: metrics and logits, nothing learnt."""
    params = init_mlp(jax.random.key(0), [width] * depth + [classes])

    def step(params, batch):
        logits = apply_mlp(params, batch["x"])
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        loss = cross_entropies(logits, batch["label"]).mean()
        return {"loss": loss, "correct": correct.sum(), "largest": jnp.max(logits), "logits": logits}

    return Case("forward_only", step, params, classification_batch(width, classes), batch_size, updates_state=False)


def no_optimizer(batch_size=32, depth=10, width=12, outputs=4):
    """Loss and raw gradients, nothing more."""
    params = init_mlp(jax.random.key(0), [width] * depth + [outputs])

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
        return {"loss": loss, "grads": grads}

    return Case("no_optimizer", step, params, regression_batch(width, outputs), batch_size, updates_state=False)
