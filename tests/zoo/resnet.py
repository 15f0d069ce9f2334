"""A small residual network with group normalisation."""

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


class ResidualBlock(nn.Module):
    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False, **F64)(x)
        y = nn.relu(nn.GroupNorm(num_groups=2, **F64)(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False, **F64)(y)
        y = nn.GroupNorm(num_groups=2, **F64)(y)
        if y.shape != x.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False, name="shortcut", **F64)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    widths: tuple[int, ...]  # channels; each change of width halves the image
    blocks_per_width: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem", **F64)(x)
        for i, channels in enumerate(self.widths):
            for j in range(self.blocks_per_width):
                stride = 2 if i > 0 and j == 0 else 1
                x = ResidualBlock(channels, stride, name=f"block_{i}_{j}")(x)
        return nn.Dense(self.classes, name="head", **F64)(x.mean(axis=(1, 2)))


def resnet(batch_size=32, widths=(4, 8), blocks_per_width=2, classes=5, size=8):
    """Classify images of `size` x `size` pixels; adam."""
    model = ResNet(widths, blocks_per_width, classes)

    def make_batch(examples, seed):
        rng = np.random.default_rng(seed)
        return {"image": rng.normal(size=(examples, size, size, 3)), "label": rng.integers(0, classes, examples)}

    def step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    params = init_variables(model, make_batch(1, 0)["image"])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    return Case("resnet", step, state, make_batch, batch_size)
