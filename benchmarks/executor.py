#!/usr/bin/env python3
"""The executor against the simulator: every schedule's step, measured and predicted.

    python -m benchmarks.executor                     four ranks, sixteen micro-batches
    python -m benchmarks.executor --ranks 8

Emulated devices share the machine's cores, so that the time of real work on them says nothing of a pipeline. Here each
action of the compiled step also sleeps, for as long as the costs say: sleeping ranks don't disturb each other. All else
is the executor as it is: the switch, the exchange between ranks, waiting for neighbours. The model is so small that its
own work takes little of the time. What an action takes besides its sleep is measured first, on one rank.

XLA:CPU's permutes block: a rank waits for its neighbours' last tick, also where the timetable gives transfers a tick of
their own, which overlap on GPUs and TPUs. So two predictions are printed: with transfers that block, which is what runs
here, and as the timetable has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import jaxpar
import jaxpar.lower.run
from benchmarks.timing import describe_machine
from jaxpar.schedule import SCHEDULES, StageCosts, default_layout, simulate
from jaxpar.text import format_table


def loss_fn(params: list[Any], batch: dict[str, Any]) -> Any:
    x = batch["x"]
    for i, w in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = jnp.tanh(x @ w)
    return jnp.mean((x - batch["y"]) ** 2)


def train_step(params: list[Any], batch: dict[str, Any]) -> tuple[list[Any], Any]:
    """Plain gradient descent on layers of 8 numbers."""
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], loss


def sleeping(seconds: dict[str, float]) -> Callable[..., Any]:
    """The executor's `run_branch`, with actions that take the given time besides."""
    original = jaxpar.lower.run.run_branch

    def run_branch(branch: Any, registers: Any, carry: Any, *rest: Any) -> Any:
        jax.debug.callback(lambda _: time.sleep(seconds[branch.node[0]]), registers[0])
        return original(branch, registers, carry, *rest)

    return run_branch


def measure(schedule: str, ranks: int, count: int, seconds: dict[str, float], repeats: int) -> tuple[Any, float]:
    """The step, and the least time that it takes."""
    per_rank, _ = default_layout(schedule)
    mesh = jax.make_mesh((ranks,), ("stage",), devices=jax.devices()[:ranks])
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32) for _ in range(ranks * per_rank)]
    batch = {name: rng.normal(size=(count, 8)).astype(np.float32) for name in "xy"}
    original = jaxpar.lower.run.run_branch
    jaxpar.lower.run.run_branch = sleeping({k: s / per_rank for k, s in seconds.items()})
    cuts = [f"layer_{i}" for i in range(1, len(params))]
    step = jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=count, schedule=schedule, cuts=cuts)
    try:
        state = step.place(params)
        state, _ = step(state, batch)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            state, loss = step(state, batch)
            jax.block_until_ready((state, loss))
            times.append(time.perf_counter() - start)
    finally:
        jaxpar.lower.run.run_branch = original
    return step, min(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--forward", type=float, default=0.03, help="seconds of a rank's forward; I and W take as long")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    f = args.forward
    seconds = {"F": f, "B": 2 * f, "I": f, "W": f}
    print(f"{describe_machine()}\n\n{args.ranks} ranks, M = {args.microbatches}, F = I = W = {f} s on each rank\n")
    _, alone = measure("gpipe", 1, args.microbatches, seconds, args.repeats)
    extra = (alone / args.microbatches - 3 * f) / 2
    print(f"an action takes {extra * 1e3:.2f} ms besides its sleep\n")
    rows = [("schedule", "ticks", "overlapping, s", "blocking, s", "measured, s", "measured / blocking")]
    predicted, measured = [], []
    for schedule in SCHEDULES:
        step, taken = measure(schedule, args.ranks, args.microbatches, seconds, args.repeats)
        timetable, per_rank = step.timetable(), default_layout(schedule)[0]
        actions = 2 if timetable.is_split else 1
        forward, backward = f / per_rank + extra, 2 * f / per_rank + actions * extra
        costs = StageCosts.uniform(timetable.dag.num_stages, forward=forward, backward=backward)
        overlapping = simulate(timetable, costs).makespan
        predicted.append(simulate(dataclasses.replace(timetable, exchange=1), costs).makespan)
        measured.append(taken)
        values = (f"{overlapping:.3f}", f"{predicted[-1]:.3f}", f"{taken:.3f}", f"{taken / predicted[-1]:.3f}")
        rows.append((schedule, str(timetable.num_ticks), *values))
        print(f"{schedule}: {taken:.3f} s", file=sys.stderr, flush=True)
    print(format_table(rows))
    print(f"\nrank correlation of measured and blocking (Spearman): {spearmanr(predicted, measured).statistic:.3f}")


if __name__ == "__main__":
    main()
