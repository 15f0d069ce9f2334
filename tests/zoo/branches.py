"""Models whose branches have inputs of their own, at small width: a multi-modal transformer, DLRM and CANDLE-Uno."""

from __future__ import annotations

import numpy as np

from benchmarks import planner_models_jax as models

from .case import Case
from .init import init_variables


def _case(name, model, batch_size):
    inputs = {key: x for key, x in model.make_batch(1, 0).items() if key != "target"}
    state = model.make_state(init_variables(model.module, inputs)["params"])
    return Case(name, model.step, state, model.make_batch, batch_size)


def mmt(batch_size=32, branches=4, num_layers=2, length=3, hidden=8, heads=2, classes=5):
    """`branches` transformers of `num_layers` layers each, joined by concatenation."""
    return _case("mmt", models.mmt(branches, num_layers, length, hidden, heads, classes, np.float64), batch_size)


def dlrm(batch_size=32, dense=3, sparse=3, depth=2, width=12, rows=20, embedding=6, bag=4):
    """`dense` MLPs and `sparse` embedding bags side by side, then an MLP."""
    return _case("dlrm", models.dlrm(dense, sparse, depth, width, rows, embedding, bag, np.float64), batch_size)


def candle_uno(batch_size=32, branches=4, depth=2, width=12):
    """`branches` MLPs side by side, then another."""
    return _case("candle_uno", models.candle_uno(branches, depth, width, np.float64), batch_size)
