"""Training steps of common kinds of model, as their users write them, at sizes that need a cluster.

gpt               48 layers
unet              image to image, skip connections over all levels
encoder_decoder   cross attention from each decoder layer to the encoder's output
two_towers        an image and a text encoder, whose pairs are scored
experts           each layer a mixture of experts: branches of one layer
contrastive       the two towers with a loss over all pairs of the batch: examples are coupled
global_balance    the experts with a balance loss over the whole batch: likewise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from benchmarks import gpt as gpt_model

PyTree = Any


@dataclass(frozen=True)
class Workload:
    """A training step, and the shapes that it is called with."""

    name: str
    step: Callable[[Any, Any], Any]
    state: PyTree
    batch: PyTree


def _workload(name: str, module: nn.Module, inputs: PyTree, loss_fn: Callable[..., jax.Array]) -> Workload:
    """`loss_fn(outputs, batch)` on `module(**batch)`, and adamw with clipping."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def init(batch: PyTree) -> TrainState:
        return TrainState.create(apply_fn=module.apply, params=module.init(jax.random.key(0), batch)["params"], tx=tx)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
        def total(params: PyTree) -> jax.Array:
            return loss_fn(state.apply_fn({"params": params}, batch), batch)

        loss, grads = jax.value_and_grad(total)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return Workload(name, train_step, jax.eval_shape(init, inputs), inputs)


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


# -- layers ------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A pre-norm transformer layer; with `memory`, it attends to that too."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones((1, x.shape[1]))) if self.causal else None
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, y, mask=mask)
        if memory is not None:
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name="cross_attention")(y, memory)
        return x + MLP(4 * x.shape[-1], name="mlp")(nn.LayerNorm()(x))


class MLP(nn.Module):
    """Two dense layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(self.width, name="up")(x)))


class Embed(nn.Module):
    """Tokens and positions."""

    vocab: int
    dim: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        position = self.param("position", nn.initializers.normal(0.02), (tokens.shape[1], self.dim))
        return nn.Embed(self.vocab, self.dim, name="token")(tokens) + position


# -- models ------------------------------------------------------------------------------------------------------------


def gpt(batch_size: int = 128, num_layers: int = 48, dim: int = 2048, length: int = 1024) -> Workload:
    """A decoder."""
    config = gpt_model.Config(num_layers, dim, heads=dim // 128, vocab=32000, length=length, batch_size=batch_size)
    tokens = _shape(jnp.int32, batch_size, length)
    state = jax.eval_shape(lambda: gpt_model.init_state(config))
    return Workload("gpt", gpt_model.train_step, state, {"tokens": tokens, "targets": tokens})


class ConvBlock(nn.Module):
    """Two convolutions, the time step's embedding in between."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        y = nn.Conv(self.channels, (3, 3), name="conv_0")(nn.silu(nn.GroupNorm(8)(x)))
        y = y + nn.Dense(self.channels, name="time")(time)[:, None, None, :]
        y = nn.Conv(self.channels, (3, 3), name="conv_1")(nn.silu(nn.GroupNorm(8)(y)))
        return y + (x if x.shape == y.shape else nn.Conv(self.channels, (1, 1), name="shortcut")(x))


class UNet(nn.Module):
    """{image [B, H, W, 3], time [B]} -> noise [B, H, W, 3]."""

    levels: tuple[int, ...]
    blocks: int

    @nn.compact
    def __call__(self, batch: PyTree) -> jax.Array:
        angles = batch["time"][:, None] * 2.0 ** np.arange(16, dtype=np.float32)
        time = nn.Dense(256, name="embed_time")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        x = nn.Conv(self.levels[0], (3, 3), name="in")(batch["image"])
        skips = [x]
        for i, channels in enumerate(self.levels):
            for j in range(self.blocks):
                x = ConvBlock(channels, name=f"down_{i}_{j}")(x, time)
                skips.append(x)
            if i + 1 < len(self.levels):
                x = nn.Conv(channels, (3, 3), strides=(2, 2), name=f"down_{i}")(x)
                skips.append(x)
        x = ConvBlock(self.levels[-1], name="middle")(x, time)
        for i, channels in reversed(list(enumerate(self.levels))):
            for j in range(self.blocks + 1):
                x = ConvBlock(channels, name=f"up_{i}_{j}")(jnp.concatenate([x, skips.pop()], -1), time)
            if i:
                x = nn.Conv(channels, (3, 3), name=f"up_{i}")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return nn.Conv(3, (3, 3), name="out")(nn.silu(nn.GroupNorm(8)(x)))


def unet(batch_size: int = 256, levels: tuple[int, ...] = (128, 256, 512, 512), blocks: int = 2) -> Workload:
    """A diffusion model of 64 x 64 images."""
    image = _shape(jnp.float32, batch_size, 64, 64, 3)
    batch = {"image": image, "noise": image, "time": _shape(jnp.float32, batch_size)}
    return _workload("unet", UNet(levels, blocks), batch, lambda out, b: jnp.mean((out - b["noise"]) ** 2))


class EncoderDecoder(nn.Module):
    """{source [B, S], target_in [B, T]} -> logits [B, T, vocab]."""

    vocab: int
    dim: int
    layers: int

    @nn.compact
    def __call__(self, batch: PyTree) -> jax.Array:
        memory = Embed(self.vocab, self.dim, name="embed_source")(batch["source"])
        for i in range(self.layers):
            memory = Layer(self.dim // 64, name=f"encoder_{i}")(memory)
        memory = nn.LayerNorm(name="encoder_norm")(memory)
        x = Embed(self.vocab, self.dim, name="embed_target")(batch["target_in"])
        for i in range(self.layers):
            x = Layer(self.dim // 64, causal=True, name=f"decoder_{i}")(x, memory)
        return nn.Dense(self.vocab, name="head")(nn.LayerNorm(name="norm")(x))


def encoder_decoder(batch_size: int = 128, layers: int = 12, dim: int = 1024) -> Workload:
    """A translator."""
    tokens = _shape(jnp.int32, batch_size, 256)
    batch = {"source": tokens, "target_in": tokens, "target": tokens}

    def loss_fn(logits: jax.Array, b: PyTree) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, b["target"]).mean()

    return _workload("encoder_decoder", EncoderDecoder(32000, dim, layers), batch, loss_fn)


class TwoTowers(nn.Module):
    """{patches [B, N, P], tokens [B, T]} -> two unit vectors for each example."""

    layers: tuple[int, int]
    dims: tuple[int, int]

    @nn.compact
    def __call__(self, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        image = nn.Dense(self.dims[0], name="patches")(batch["patches"])
        text = Embed(32000, self.dims[1], name="tokens")(batch["tokens"])
        towers = []
        for name, x, count in (("image", image, self.layers[0]), ("text", text, self.layers[1])):
            for i in range(count):
                x = Layer(x.shape[-1] // 64, name=f"{name}_{i}")(x)
            x = nn.Dense(512, name=f"{name}_out")(x.mean(axis=1))
            towers.append(x / jnp.linalg.norm(x, axis=-1, keepdims=True))
        return towers[0], towers[1]


def _two_towers(name: str, batch_size: int, loss_fn: Callable[..., jax.Array]) -> Workload:
    patches = _shape(jnp.float32, batch_size, 196, 768)
    batch = {"patches": patches, "tokens": _shape(jnp.int32, batch_size, 77), "score": _shape(jnp.float32, batch_size)}
    return _workload(name, TwoTowers((24, 12), (1024, 768)), batch, loss_fn)


def two_towers(batch_size: int = 256) -> Workload:
    """A retrieval model that is taught the score of each pair."""
    return _two_towers(
        "two_towers", batch_size, lambda out, b: jnp.mean((jnp.sum(out[0] * out[1], -1) - b["score"]) ** 2)
    )


def contrastive(batch_size: int = 256) -> Workload:
    """The same, taught that all other pairs of the batch don't match."""

    def loss_fn(out: Any, _: PyTree) -> jax.Array:
        scores = out[0] @ out[1].T  # [B, B]
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(scores.shape[0])).mean()

    return _two_towers("contrastive", batch_size, loss_fn)


class Mixture(nn.Module):
    """Experts side by side, each weighed by its gate; the gates of each sequence come back too."""

    experts: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))  # [B, T, E]
        best, chosen = jax.lax.top_k(gates, 2)
        weights = (jax.nn.one_hot(chosen, self.experts) * best[..., None]).sum(axis=-2)  # [B, T, E], two of them not 0
        parts = [MLP(self.width, name=f"expert_{i}")(x) * weights[..., i, None] for i in range(self.experts)]
        return sum(parts[1:], parts[0]), gates


class Experts(nn.Module):
    """tokens [B, T] -> logits, and the gates of all layers [B, layers, T, E]."""

    layers: int
    dim: int
    experts: int

    @nn.compact
    def __call__(self, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        x = Embed(32000, self.dim, name="embed")(batch["tokens"])
        all_gates = []
        mask = nn.make_causal_mask(jnp.ones((1, x.shape[1])))
        for i in range(self.layers):
            y = nn.LayerNorm(name=f"norm_{i}")(x)
            x = x + nn.MultiHeadDotProductAttention(self.dim // 64, name=f"attention_{i}")(y, y, mask=mask)
            y, gates = Mixture(self.experts, 2 * self.dim, name=f"mixture_{i}")(nn.LayerNorm(name=f"norm_m_{i}")(x))
            x = x + y
            all_gates.append(gates)
        return nn.Dense(32000, name="head")(nn.LayerNorm(name="norm")(x)), jnp.stack(all_gates, axis=1)


def _experts(name: str, batch_size: int, balance: Callable[[jax.Array], jax.Array]) -> Workload:
    tokens = _shape(jnp.int32, batch_size, 512)

    def loss_fn(out: Any, b: PyTree) -> jax.Array:
        logits, gates = out
        return optax.softmax_cross_entropy_with_integer_labels(logits, b["target"]).mean() + 0.01 * balance(gates)

    return _workload(name, Experts(12, 1024, 8), {"tokens": tokens, "target": tokens}, loss_fn)


def experts(batch_size: int = 128) -> Workload:
    """A decoder whose balance loss looks at each sequence by itself."""
    return _experts("experts", batch_size, lambda gates: jnp.mean(jnp.sum(jnp.mean(gates, axis=2) ** 2, axis=-1)))


def global_balance(batch_size: int = 128) -> Workload:
    """The same with a balance loss of the whole batch: the square of a mean over examples."""
    return _experts(
        "global_balance", batch_size, lambda gates: jnp.mean(jnp.sum(jnp.mean(gates, axis=(0, 2)) ** 2, -1))
    )


WORKLOADS: dict[str, Callable[..., Workload]] = {
    f.__name__: f for f in (gpt, unet, encoder_decoder, two_towers, experts, contrastive, global_balance)
}
