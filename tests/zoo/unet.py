"""A U-Net that removes noise: the encoder's features pass over several stages to the decoder."""

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


class ConvBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, time):
        x = nn.Conv(self.channels, (3, 3), use_bias=False, **F64)(x)
        x = nn.GroupNorm(num_groups=2, **F64)(x)
        x = nn.silu(x + nn.Dense(self.channels, name="time", **F64)(time)[:, None, None, :])
        return nn.Conv(self.channels, (3, 3), **F64)(x)


class UNet(nn.Module):
    levels: tuple[int, ...]  # channels, from the finest to the coarsest

    @nn.compact
    def __call__(self, x, time):
        frequencies = 2.0 ** np.arange(4)
        angles = time[:, None] * frequencies  # [B, 4]
        time = nn.silu(nn.Dense(8, name="time", **F64)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)))
        skips = []
        for i, channels in enumerate(self.levels[:-1]):
            x = ConvBlock(channels, name=f"down_{i}")(x, time)
            skips.append(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = ConvBlock(self.levels[-1], name="middle")(x, time)
        for i, channels in reversed(list(enumerate(self.levels[:-1]))):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = ConvBlock(channels, name=f"up_{i}")(jnp.concatenate([x, skips[i]], axis=-1), time)
        return nn.Conv(1, (1, 1), name="out", **F64)(x)


def unet(batch_size=32, levels=(4, 6, 8), size=8):
    """Predict the noise that was mixed into images of `size` x `size` pixels."""
    model = UNet(levels)

    def make_batch(examples, seed):
        rng = np.random.default_rng(seed)
        grid = np.linspace(0, 6, size)
        phase = rng.uniform(0, 6, (examples, 1, 1, 1))
        return {
            "image": np.sin(grid[:, None, None] + phase) * np.cos(grid[None, :, None]),  # [B, H, W, 1]
            "noise": rng.normal(size=(examples, size, size, 1)),
            "time": rng.uniform(0, 1, examples),
        }

    def step(state, batch):
        t = batch["time"][:, None, None, None]
        noisy = jnp.sqrt(1 - t) * batch["image"] + jnp.sqrt(t) * batch["noise"]

        def loss_fn(params):
            predicted = state.apply_fn({"params": params}, noisy, batch["time"])
            return jnp.mean((predicted - batch["noise"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    first = make_batch(1, 0)
    params = init_variables(model, first["image"], first["time"])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    return Case("unet", step, state, make_batch, batch_size)
