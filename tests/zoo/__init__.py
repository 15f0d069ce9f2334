"""Training steps written for one device, as the users of their libraries write them.

Nothing here knows of pipelines. `CASES[name](**parameters)` builds a case that a pipeline must run with the same
numbers, `BAD_CASES[name]()` one that it must refuse. Builders need 64-bit numbers (`jax_enable_x64`).
"""

from __future__ import annotations

from collections.abc import Callable

from . import bad, branches, gpt, mlp, operations, resnet, states, towers, unet
from .case import Case

_GOOD: list[Callable[..., Case]] = [
    mlp.mlp,
    mlp.mlp_sum_loss,
    mlp.mlp_per_example,
    mlp.forward_only,
    mlp.no_optimizer,
    gpt.gpt,
    gpt.gpt_remat,
    gpt.gpt_no_dropout,
    towers.towers,
    branches.mmt,
    branches.dlrm,
    branches.candle_uno,
    unet.unet,
    resnet.resnet,
    operations.indexed_loss,
    operations.one_hot_accuracy,
    operations.nested_jit,
    operations.custom_vjp,
    operations.custom_jvp,
    operations.cond,
    operations.scan_layers,
    operations.scan_layers_remat,
    operations.checkpoint,
    operations.while_loop,
    operations.while_batched,
    states.integers_and_keys,
    states.batch_tuple,
    states.batch_array,
    states.learning_rate_argument,
    states.bf16_params,
    states.frozen_params,
    states.ema_params,
    states.weight_decay_in_loss,
]

_BAD: list[Callable[..., Case]] = [
    bad.batch_norm,
    bad.sort_along_batch,
    bad.cumsum_along_batch,
    bad.reverse_along_batch,
    bad.contrastive,
    bad.log_of_mean_loss,
    bad.control_flow_on_batch_size,
    bad.loop_over_examples,
    bad.branch_on_batch_value,
    bad.batch_not_used,
    bad.batch_without_array,
    bad.batch_of_different_sizes,
    bad.batch_of_scalars,
]

CASES: dict[str, Callable[..., Case]] = {build.__name__: build for build in _GOOD}
BAD_CASES: dict[str, Callable[..., Case]] = {build.__name__: build for build in _BAD}

__all__ = ["BAD_CASES", "CASES", "Case"]
