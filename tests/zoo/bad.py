"""Steps that a pipeline can't run as they are: each must be an error that says why."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .case import Case
from .init import init_variables
from .mlp import apply_mlp, init_mlp, regression_batch, sgd, squared_errors

WIDTH, DEPTH = 12, 8


def training(name, loss_fn, make_batch=None, batch_size=32):
    """SGD on `loss_fn(params, batch)`, a scalar."""
    params = init_mlp(jax.random.key(0), [WIDTH] * DEPTH + [4])

    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch))(params)
        return sgd(params, grads), {"loss": loss}

    return Case(name, step, params, make_batch or regression_batch(WIDTH), batch_size)


def batch_norm(batch_size=32):
    """Statistics over the batch inside the forward."""
    model = nn.Sequential([
        nn.Dense(WIDTH, param_dtype=jnp.float64),
        nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64),
        nn.tanh,
        nn.Dense(4, param_dtype=jnp.float64),
    ])  # fmt: skip
    make_batch = regression_batch(WIDTH)
    variables = init_variables(model, make_batch(2, 0)["x"])

    def step(variables, batch):
        def loss_fn(params):
            y, updated = model.apply(variables | {"params": params}, batch["x"], mutable=["batch_stats"])
            return jnp.mean((y - batch["y"]) ** 2), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        return updated | {"params": sgd(variables["params"], grads)}, {"loss": loss}

    return Case("batch_norm", step, variables, make_batch, batch_size)


def sort_along_batch(batch_size=32):
    """The loss weighs the examples by their rank."""

    def loss_fn(params, batch):
        losses = jnp.sort(squared_errors(params, batch))
        return jnp.mean(losses * jnp.linspace(0.0, 1.0, losses.shape[0]))

    return training("sort_along_batch", loss_fn, batch_size=batch_size)


def cumsum_along_batch(batch_size=32):
    """Each example adds to all that come before it."""

    def loss_fn(params, batch):
        return jnp.mean((jnp.cumsum(apply_mlp(params, batch["x"]), axis=0) - batch["y"]) ** 2)

    return training("cumsum_along_batch", loss_fn, batch_size=batch_size)


def reverse_along_batch(batch_size=32):
    """Each example is mixed with the one at the other end of the batch."""

    def loss_fn(params, batch):
        return jnp.mean((apply_mlp(params, 0.7 * batch["x"] + 0.3 * batch["x"][::-1]) - batch["y"]) ** 2)

    return training("reverse_along_batch", loss_fn, batch_size=batch_size)


def contrastive(batch_size=32):
    """Each example is compared with all the others of the batch."""

    def loss_fn(params, batch):
        embedded = apply_mlp(params, batch["x"])
        similarity = embedded @ batch["y"].T  # [B, B]
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(similarity)))

    return training("contrastive", loss_fn, batch_size=batch_size)


def log_of_mean_loss(batch_size=32):
    """The backward needs the loss of the whole batch."""

    def loss_fn(params, batch):
        return jnp.log(squared_errors(params, batch).mean())

    return training("log_of_mean_loss", loss_fn, batch_size=batch_size)


def control_flow_on_batch_size(batch_size=32):
    """Python takes another path when there are few examples."""

    def loss_fn(params, batch):
        x = batch["x"]
        if x.shape[0] > 8:
            x = jnp.tanh(x) + 0.1 * x
        return squared_errors(params, batch | {"x": x}).mean()

    return training("control_flow_on_batch_size", loss_fn, batch_size=batch_size)


def loop_over_examples(batch_size=32):
    """One equation per example."""

    def loss_fn(params, batch):
        examples = range(batch["x"].shape[0])
        return sum(jnp.sum((apply_mlp(params, batch["x"][i]) - batch["y"][i]) ** 2) for i in examples) / len(examples)

    return training("loop_over_examples", loss_fn, batch_size=batch_size)


def branch_on_batch_value(batch_size=32):
    """`lax.cond` on a number that all examples make together."""

    def loss_fn(params, batch):
        losses = squared_errors(params, batch)
        return lax.cond(losses.mean() > 1.0, lambda x: x.mean(), lambda x: 0.5 * x.mean(), losses)

    return training("branch_on_batch_value", loss_fn, batch_size=batch_size)


def batch_not_used(batch_size=32):
    """The batch is an argument that nothing reads."""
    return training("batch_not_used", lambda params, batch: jnp.sum(params[0]["w"] ** 2), batch_size=batch_size)


def batch_without_array(batch_size=32):
    """The batch holds nothing."""
    return training(
        "batch_without_array", lambda params, batch: jnp.sum(params[0]["w"] ** 2), lambda size, seed: {}, batch_size
    )


def batch_of_different_sizes(batch_size=32):
    """The leaves of the batch don't agree on the number of examples."""

    def make_batch(size, seed):
        batch = regression_batch(WIDTH)(size, seed)
        return batch | {"extra": np.ones(size - 1)}

    return training(
        "batch_of_different_sizes", lambda p, batch: squared_errors(p, batch).mean(), make_batch, batch_size
    )


def batch_of_scalars(batch_size=32):
    """A leaf of the batch has no dimension at all."""

    def make_batch(size, seed):
        return regression_batch(WIDTH)(size, seed) | {"temperature": np.float64(2.0)}

    def loss_fn(params, batch):
        return squared_errors(params, batch).mean() / batch["temperature"]

    return training("batch_of_scalars", loss_fn, make_batch, batch_size)
