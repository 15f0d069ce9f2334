#!/usr/bin/env python3
"""The cost models against the machine: times of operators, analytic and measured.

    python -m benchmarks.cost_model [--sizes 1,4,16] [--cache DIRECTORY] [MODEL ...]

Each different operator of a model's training step is compiled and timed on JAX's first device, forward and backward, at
several micro-batch sizes, and estimated from what the device does at its best (`measure_device`: a large product, a
large copy). Printed for each model, and all together:

    bias      the median of analytic over measured: what a better figure for the device would remove
    error     the median factor, up or down, between both
    relative  the same once the bias is removed: what balancing stages depends on
    rank      Spearman's correlation of both, over operators and sizes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from benchmarks import gpt
from benchmarks import planner_models_jax as models
from jaxpar.arguments import read_arguments
from jaxpar.measure import MeasuredCosts, measure_device
from jaxpar.plan import OpGraph
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.planning import build_graph, read_signature
from jaxpar.text import format_table
from jaxpar.tracing import trace_step

Step = tuple[Callable[..., Any], Any, Any]
LEAST = 20e-6  # seconds; what takes less is mostly overhead, and no stage


def _gpt() -> Step:
    config = gpt.Config(num_layers=3, dim=256, length=64, batch_size=16)
    return gpt.train_step, jax.eval_shape(lambda: gpt.init_state(config)), gpt.make_batch(config)


def _branches(model: models.Model) -> Step:
    return model.step, model.state, model.batch(64)


STEPS: dict[str, Callable[[], Step]] = {
    "gpt": _gpt,
    "mmt": lambda: _branches(models.mmt(branches=2, num_layers=2, length=64, hidden=256, heads=4)),
    "candle_uno": lambda: _branches(models.candle_uno(width=1024)),
    "dlrm": lambda: _branches(models.dlrm(width=512, rows=20_000)),
}


def list_times(graph: OpGraph, sizes: Sequence[int]) -> dict[tuple[str, str, int], float]:
    """Seconds of F and of B of each different operator at each size."""
    different = {op.kind: op for op in reversed(graph.ops)}
    found = {}
    for op in different.values():
        for n in sizes:
            found[op.name, "F", n] = op.forward(n)
            found[op.name, "B", n] = op.input_backward(n) + op.weight_backward(n)
    return found


def summarise(name: str, pairs: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """A row of the table from (analytic, measured) seconds."""
    ratios = np.log([a / m for a, m in pairs])
    bias = np.median(ratios)
    error, relative = (np.exp(np.median(np.abs(x))) for x in (ratios, ratios - bias))
    rank = spearmanr([a for a, _ in pairs], [m for _, m in pairs]).statistic
    return name, str(len(pairs)), f"{np.exp(bias):.2f}", f"{error:.2f}", f"{relative:.2f}", f"{rank:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(STEPS))
    parser.add_argument("--sizes", default="1,4,16")
    parser.add_argument("--cache", help="a directory to keep measured times in")
    parser.add_argument("--verbose", action="store_true", help="print each operator's times")
    options = parser.parse_args(argv)
    sizes = [int(n) for n in options.sizes.split(",")]
    spec = measure_device()
    figures = ", ".join(f"{t} {x / 1e9:.4g} Gflop/s" for t, x in spec.flops.items())
    print(f"{spec.name}: {figures}, memory {spec.memory_bandwidth / 1e9:.3g} GB/s; jax {jax.__version__}")
    measured, analytic = MeasuredCosts(cache=options.cache), AnalyticCosts(spec)
    rows: list[tuple[str, ...]] = [("model", "times", "bias", "error", "relative", "rank")]
    everything: list[tuple[float, float]] = []
    for name in options.models or STEPS:
        fun, *args = STEPS[name]()
        traced = trace_step(read_arguments(read_signature(fun), args))
        both = [list_times(build_graph(traced, costs, sizes).graph, sizes) for costs in (analytic, measured)]
        pairs = [(both[0][key], both[1][key]) for key in both[0] if min(both[0][key], both[1][key]) > LEAST]
        for key in both[0] if options.verbose else ():
            print(f"  {key[0]:45} {key[1]} {key[2]:3}  {both[0][key] * 1e6:9.0f} us  {both[1][key] * 1e6:9.0f} us")
        rows.append(summarise(name, pairs))
        everything += pairs
    rows.append(summarise("all", everything))
    print(format_table(rows))


if __name__ == "__main__":
    main()
