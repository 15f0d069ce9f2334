"""Three training steps with parallel branches, as their users write them: MMT, DLRM and CANDLE-Uno.

They are the models of GraphPipe's evaluation (Jeon et al., ASPLOS 2025, arXiv 2406.17145), at its sizes by default:

    MMT          4 branches of 8 transformer layers (sequence 256, hidden 1024, 16 heads), joined by concatenation
    DLRM         7 dense branches of 4 x 4096 and 7 bags of 100 rows of 1,000,000 x 64 tables, joined, then 4 x 4096
    CANDLE-Uno   7 dense branches of 4 x 4096, joined, then 4 x 4096

A `Model` holds no arrays: `state` and `batch(size)` are shapes, which is all that planning needs; `init_state` and
`make_batch` make arrays of them.
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

PyTree = Any


@dataclass(frozen=True)
class Model:
    """A training step `(state, batch) -> (state, metrics)` and the shapes that it is for."""

    name: str
    module: nn.Module
    make_batch: Callable[[int, int], dict[str, np.ndarray]]  # (size, seed) -> batch of `size` examples
    step: Callable[[TrainState, PyTree], tuple[TrainState, PyTree]]
    optimizer: optax.GradientTransformation

    @property
    def state(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s."""

        def init(inputs: PyTree) -> TrainState:
            return self.make_state(self.module.init(jax.random.key(0), inputs)["params"])

        return jax.eval_shape(init, _without_target(self.batch(1)))

    def make_state(self, params: PyTree) -> TrainState:
        """The state before the first step."""
        return TrainState.create(apply_fn=self.module.apply, params=params, tx=self.optimizer)

    def batch(self, size: int) -> PyTree:
        """A batch of `size` examples as `jax.ShapeDtypeStruct`s."""
        one = self.make_batch(1, 0)
        return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in one.items()}


def _without_target(batch: PyTree) -> PyTree:
    return {name: x for name, x in batch.items() if name != "target"}


def _regression_step(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
    """Mean squared error."""

    def loss_fn(params: PyTree) -> jax.Array:
        predicted = state.apply_fn({"params": params}, _without_target(batch))
        return jnp.mean((predicted - batch["target"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def _classification_step(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
    """Mean cross entropy."""

    def loss_fn(params: PyTree) -> jax.Array:
        logits = state.apply_fn({"params": params}, _without_target(batch))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


class Layer(nn.Module):
    """A transformer encoder layer."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = {"dtype": self.dtype, "param_dtype": self.dtype}
        attend = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention", **kind)
        y = nn.LayerNorm(**kind)(x)
        x = x + attend(y, y)
        y = nn.Dense(4 * x.shape[-1], name="up", **kind)(nn.LayerNorm(**kind)(x))
        return x + nn.Dense(x.shape[-1], name="down", **kind)(nn.gelu(y))


class Modality(nn.Module):
    """The layers of one branch."""

    num_layers: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = Layer(self.heads, self.dtype, name=f"layer_{i}")(x)
        return x


class MMT(nn.Module):
    """{x0, x1, ... : [B, T, hidden]} -> logits [B, classes]."""

    num_layers: int
    heads: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: PyTree) -> jax.Array:
        branches = [
            Modality(self.num_layers, self.heads, self.dtype, name=f"branch_{i}")(inputs[f"x{i}"])
            for i in range(len(inputs))
        ]
        joined = jnp.concatenate(branches, axis=-1)  # [B, T, branches * hidden]
        head = nn.Dense(self.classes, dtype=self.dtype, param_dtype=self.dtype, name="head")
        return head(joined.mean(axis=1))


def mmt(
    branches: int = 4,
    num_layers: int = 8,
    length: int = 256,
    hidden: int = 1024,
    heads: int = 16,
    classes: int = 16,
    dtype: Any = np.float32,
) -> Model:
    """A multi-modal transformer: one branch for each modality, whose features it is given."""

    def make_batch(size: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        features = {f"x{i}": rng.normal(size=(size, length, hidden)).astype(dtype) for i in range(branches)}
        return features | {"target": rng.integers(0, classes, size).astype(np.int32)}

    module = MMT(num_layers, heads, classes, dtype)
    return Model("MMT", module, make_batch, _classification_step, optax.adam(1e-4))


class MLP(nn.Module):
    """`depth` dense layers."""

    width: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, param_dtype=self.dtype, name=f"dense_{i}")(x))
        return x


class EmbeddingBag(nn.Module):
    """ids[B, bag] -> the sum of these rows of a table, [B, width]."""

    rows: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = nn.Embed(self.rows, self.width, dtype=self.dtype, param_dtype=self.dtype, name="table")
        return table(ids).sum(axis=1)  # [B, bag, width] -> [B, width]


class Branches(nn.Module):
    """{dense0, ... : [B, width], ids0, ... : [B, bag]} -> [B, 1]: a branch for each, joined, then an MLP."""

    width: int
    depth: int
    rows: int
    embedding: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: PyTree) -> jax.Array:
        joined = []
        for name, x in inputs.items():
            if name.startswith("dense"):
                joined.append(MLP(self.width, self.depth, self.dtype, name=f"branch_{name}")(x))
            else:
                joined.append(EmbeddingBag(self.rows, self.embedding, self.dtype, name=f"branch_{name}")(x))
        x = MLP(self.width, self.depth, self.dtype, name="top")(jnp.concatenate(joined, axis=-1))
        return nn.Dense(1, dtype=self.dtype, param_dtype=self.dtype, name="out")(x)


def dlrm(
    dense: int = 7,
    sparse: int = 7,
    depth: int = 4,
    width: int = 4096,
    rows: int = 1_000_000,
    embedding: int = 64,
    bag: int = 100,
    dtype: Any = np.float32,
) -> Model:
    """A recommendation model; plain SGD, as is usual for such tables."""
    module = Branches(width, depth, rows, embedding, dtype)
    return Model(
        "DLRM", module, _feature_batch(dense, sparse, width, rows, bag, dtype), _regression_step, optax.sgd(0.01)
    )


def candle_uno(branches: int = 7, depth: int = 4, width: int = 4096, dtype: Any = np.float32) -> Model:
    """CANDLE's Uno, which predicts a tumour's response to drugs from several kinds of features."""
    module = Branches(width, depth, 1, 1, dtype)
    batch = _feature_batch(branches, 0, width, 1, 1, dtype)
    return Model("CANDLE-Uno", module, batch, _regression_step, optax.adam(1e-4))


def _feature_batch(
    dense: int, sparse: int, width: int, rows: int, bag: int, dtype: Any
) -> Callable[[int, int], dict[str, np.ndarray]]:
    def make_batch(size: int, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        features = {f"dense{i}": rng.normal(size=(size, width)).astype(dtype) for i in range(dense)}
        ids = {f"ids{i}": rng.integers(0, rows, (size, bag)).astype(np.int32) for i in range(sparse)}
        return features | ids | {"target": rng.normal(size=(size, 1)).astype(dtype)}

    return make_batch


MODELS: dict[str, Callable[..., Model]] = {"mmt": mmt, "dlrm": dlrm, "candle_uno": candle_uno}
