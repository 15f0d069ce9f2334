"""The GPT that the benchmarks measure, its step, and the baseline: gradient accumulation on one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import lax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of the batch."""

    num_layers: int = 8
    dim: int = 256
    heads: int = 8
    vocab: int = 256
    length: int = 128
    batch_size: int = 32

    def __str__(self) -> str:
        return (
            f"GPT, {self.num_layers} layers, dim {self.dim}, vocabulary {self.vocab}, "
            f"batch {self.batch_size} x {self.length} tokens, float32"
        )


class Block(nn.Module):
    """A transformer block."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, dim = x.shape
        qkv = nn.Dense(3 * dim, use_bias=False, name="qkv")(nn.LayerNorm()(x))
        q, k, v = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(dim // self.heads)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        x = x + nn.Dense(dim, name="out")(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))
        return x + nn.Dense(dim, name="down")(nn.gelu(nn.Dense(4 * dim, name="up")(nn.LayerNorm()(x))))


class GPT(nn.Module):
    """tokens[B, T] -> logits[B, T, vocab], with a tied embedding."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.dim, embedding_init=nn.initializers.normal(0.02), name="embed")
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.02), (c.length, c.dim))
        mask = jnp.tril(jnp.ones((c.length, c.length), bool))
        for i in range(c.num_layers):
            x = Block(c.heads, name=f"block_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def init_state(config: Config) -> TrainState:
    """The state before the first step: clip and adamw."""
    model = GPT(config)
    tokens = jnp.zeros((1, config.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def make_batch(config: Config, seed: int = 0) -> PyTree:
    """Random tokens and targets [B, T]."""
    text = np.random.default_rng(seed).integers(0, config.vocab, (config.batch_size, config.length + 1), np.int32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def loss_fn(params: PyTree, apply_fn: Any, batch: PyTree) -> jax.Array:
    """Mean cross entropy over all tokens of `batch`."""
    logits = apply_fn({"params": params}, batch["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
    """One step on the whole batch."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


def accumulating_step(num_microbatches: int) -> Any:
    """`train_step` for one device, as its user would write it by hand to save memory: a scan over micro-batches."""

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
        def split(x: jax.Array) -> jax.Array:
            return x.reshape(num_microbatches, -1, *x.shape[1:])  # [B, ...] -> [M, B/M, ...]

        def accumulate(carry: PyTree, microbatch: PyTree) -> tuple[PyTree, None]:
            value = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, microbatch)
            return jax.tree.map(jnp.add, carry, value), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = lax.scan(accumulate, zeros, jax.tree.map(split, batch))
        loss, grads = jax.tree.map(lambda x: x / num_microbatches, total)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return step
