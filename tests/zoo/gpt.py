"""A GPT in Flax Linen with optax: tied embedding, dropout, causal mask, token-weighted loss, clip and adamw."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from .case import Case
from .init import init_variables

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Attention(nn.Module):
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic):
        batch, length, dim = x.shape
        qkv = nn.Dense(3 * dim, use_bias=False, name="qkv", **F64)(x)
        q, k, v = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)  # [B, T, H, D/H]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(dim / self.heads)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = nn.Dropout(self.dropout)(jax.nn.softmax(scores), deterministic)
        y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        return nn.Dense(dim, name="out", **F64)(y)


class Block(nn.Module):
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic):
        x = x + Attention(self.heads, self.dropout, name="attention")(nn.LayerNorm(**F64)(x), mask, deterministic)
        y = nn.Dense(4 * x.shape[-1], name="up", **F64)(nn.LayerNorm(**F64)(x))
        y = nn.Dense(x.shape[-1], name="down", **F64)(nn.gelu(y))
        return x + nn.Dropout(self.dropout)(y, deterministic)


class GPT(nn.Module):
    vocab: int
    dim: int
    heads: int
    num_layers: int
    dropout: float
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, *, deterministic=False):
        length = tokens.shape[1]
        embed = nn.Embed(self.vocab, self.dim, name="embed", **F64)
        position = self.param("position", nn.initializers.normal(0.02), (length, self.dim), jnp.float64)
        x = nn.Dropout(self.dropout)(embed(tokens) + position, deterministic)
        mask = jnp.tril(jnp.ones((length, length), bool))
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i in range(self.num_layers):
            x = block(self.heads, self.dropout, name=f"block_{i}")(x, mask, deterministic)
        return embed.attend(nn.LayerNorm(name="norm", **F64)(x))  # [B, T, vocab]


class TrainState(train_state.TrainState):
    dropout_key: jax.Array


def train_step(state, batch):
    dropout_key = jax.random.fold_in(state.dropout_key, state.step)

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["tokens"], rngs={"dropout": dropout_key})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])  # [B, T]
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.apply_gradients(grads=grads), metrics


def token_batch(vocab, length):
    """A `make_batch`: tokens, targets, weights [B, length]; each example is padded at a length of its own."""

    def make_batch(size, seed):
        rng = np.random.default_rng(seed)
        text = rng.integers(0, vocab, (size, length + 1))
        weights = np.arange(length) < rng.integers(length // 2, length + 1, (size, 1))
        return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": weights.astype(np.float64)}

    return make_batch


def gpt(
    batch_size=32, num_layers=4, dim=32, heads=4, vocab=64, length=16, dropout=0.1, remat=False, train_step=train_step
):
    """`train_step` on a GPT of `num_layers` blocks."""
    model = GPT(vocab, dim, heads, num_layers, dropout, remat)
    make_batch = token_batch(vocab, length)
    params = init_variables(model, make_batch(1, 0)["tokens"], deterministic=True)["params"]
    schedule = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, warmup_steps=2, decay_steps=10)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx, dropout_key=jax.random.key(1))
    return Case("gpt_remat" if remat else "gpt", train_step, state, make_batch, batch_size)


def gpt_remat(batch_size=32, num_layers=4, **kwargs):
    """The same with `nn.remat` on each block."""
    return gpt(batch_size, num_layers, remat=True, **kwargs)


def sgd_step(state, batch):
    """A step without dropout, whose examples therefore don't know their place in the batch."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["tokens"], deterministic=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def gpt_no_dropout(batch_size=32, num_layers=4, **kwargs):
    """The same with no random numbers."""
    case = gpt(batch_size, num_layers, dropout=0.0, train_step=sgd_step, **kwargs)
    return Case("gpt_no_dropout", case.step, case.state, case.make_batch, batch_size)
