"""Four transformer towers, each with an input of its own, joined by an MLP: stages side by side."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from .case import Case
from .init import init_variables

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Layer(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(**F64)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, use_bias=False, **F64)(y, y)
        y = nn.LayerNorm(**F64)(x)
        return x + nn.Dense(x.shape[-1], **F64)(nn.gelu(nn.Dense(2 * x.shape[-1], **F64)(y)))


class Tower(nn.Module):
    num_layers: int
    dim: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.dim, name="in", **F64)(x)
        for i in range(self.num_layers):
            x = Layer(heads=2, name=f"layer_{i}")(x)
        return x.mean(axis=1)  # [B, T, dim] -> [B, dim]


class Towers(nn.Module):
    num_towers: int
    num_layers: int
    dim: int
    classes: int

    @nn.compact
    def __call__(self, inputs):
        joined = [Tower(self.num_layers, self.dim, name=f"tower_{i}")(x) for i, x in enumerate(inputs)]
        x = jnp.concatenate(joined, axis=-1)
        x = nn.gelu(nn.Dense(2 * self.dim, name="join", **F64)(x))
        return nn.Dense(self.classes, name="head", **F64)(x)


def towers(batch_size=32, num_towers=4, num_layers=2, dim=12, classes=5, lengths=(3, 4, 5, 6), features=6):
    """`num_towers` towers of `num_layers` layers; tower i reads `batch["x{i}"]` : [B, lengths[i], features]."""
    model = Towers(num_towers, num_layers, dim, classes)
    names = [f"x{i}" for i in range(num_towers)]

    def make_batch(size, seed):
        rng = np.random.default_rng(seed)
        batch = {name: rng.normal(size=(size, lengths[i], features)) for i, name in enumerate(names)}
        return batch | {"label": rng.integers(0, classes, size)}

    def step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, [batch[name] for name in names])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return state.apply_gradients(grads=grads), {"loss": loss, "accuracy": accuracy}

    first = make_batch(1, 0)
    params = init_variables(model, [first[name] for name in names])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    return Case("towers", step, state, make_batch, batch_size)
