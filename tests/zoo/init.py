"""First parameters without compiling an initializer for each shape."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def init_variables(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The variables of `model.init(key, *args)`: matrices normal / sqrt(fan in), scales 1, biases 0."""
    rng = np.random.default_rng(0)

    def fill(path, shape):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.ones(shape.shape, shape.dtype)
        if name in ("bias", "mean"):
            return jnp.zeros(shape.shape, shape.dtype)
        fan_in = shape.shape[-1] if name == "embedding" else np.prod(shape.shape[:-1])
        return jnp.asarray(rng.normal(size=shape.shape) / np.sqrt(fan_in), shape.dtype)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map_with_path(fill, shapes)
