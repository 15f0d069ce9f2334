#!/usr/bin/env python3
"""Plans of one model, predicted and measured: do they come in the same order?

    python -m benchmarks.plan_times                     24 plans on eight ranks
    python -m benchmarks.plan_times --plans 40 --seed 7

The plans are random: any division of CANDLE-Uno's operators into stages without cycles, on any groups of ranks, under
several schedules; and that of the planner `auto`. Emulated devices share the machine's cores, so each action sleeps for
as long as the plan says that it takes (see `benchmarks.executor`): all else, from the switch to the pieces of values
that travel between stages of unequal width and the totals over groups of ranks, is the executor as it is. XLA:CPU's
permutes block, so the prediction is for an exchange that does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from scipy.stats import spearmanr

import jaxpar
import jaxpar.lower.run
from benchmarks.planner_models_jax import candle_uno
from benchmarks.timing import describe_machine
from jaxpar.plan import ClusterSpec, OpGraph, PipelinePlan
from jaxpar.plan.devices import DEVICES
from jaxpar.plan.planners import plan as plan_graph
from jaxpar.plan.program_graph import replace_times
from jaxpar.planning import graph_step
from jaxpar.schedule import Link, simulate
from jaxpar.text import format_table
from tests.plan.random_plans import draw_plan

RANKS = 8
BATCH = 32


def make_problem(seconds: float, seed: int) -> tuple[Any, Any, Any, OpGraph]:
    """The step, its state and batch, and its operators with times of their own that sum to `seconds` for a batch."""
    model = candle_uno(branches=4, depth=3, width=8, dtype=np.float32)
    batch = model.make_batch(BATCH, 0)
    inputs = {key: x for key, x in batch.items() if key != "target"}
    state = model.make_state(model.module.init(jax.random.key(0), inputs)["params"])
    graph = graph_step(model.step, state, batch, costs="cpu").graph
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, graph.num_ops)
    each = seconds / 3 / BATCH * weights / weights.sum()
    times = {op.name: (t, t, t) for op, t in zip(graph.ops, each, strict=True)}
    return model.step, state, batch, replace_times(graph, times)


@contextmanager
def sleeping(plan: PipelinePlan) -> Iterator[None]:
    """Actions that take as long as the plan says, besides."""
    original = jaxpar.lower.run.run_branch
    planned = [s for s, stage in enumerate(plan.stages) for _ in stage.devices]  # of each replica
    seconds: dict[tuple[str, int], float] = {}
    for i, s in enumerate(planned):
        forward, first, second = plan.stage_times[s]
        seconds |= {("F", i): forward, ("I", i): first, ("W", i): second, ("B", i): first + second}

    def run_branch(branch: Any, registers: Any, carry: Any, *rest: Any) -> Any:
        jax.debug.callback(lambda _: time.sleep(seconds[branch.node]), registers[0])
        return original(branch, registers, carry, *rest)

    jaxpar.lower.run.run_branch = run_branch  # type: ignore[assignment]
    try:
        yield
    finally:
        jaxpar.lower.run.run_branch = original


def predict_blocking(plan: PipelinePlan) -> float:
    """Seconds of the step, with an exchange that blocks."""
    return simulate(dataclasses.replace(plan.timetable, exchange=1), plan.costs).makespan


def measure(step_fun: Any, state: Any, batch: Any, plan: PipelinePlan, repeats: int) -> float:
    """The least seconds of a step."""
    mesh = jax.make_mesh((RANKS,), ("stage",))
    with sleeping(plan):
        step = jaxpar.parallelize(step_fun, mesh=mesh, plan=plan)
        placed, _ = step(step.place(state), batch)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            placed, out = step(placed, batch)
            jax.block_until_ready((placed, out))
            times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of all operators for the whole batch, on one device"
    )
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    step, state, batch, graph = make_problem(args.seconds, args.seed)
    cluster = ClusterSpec.homogeneous(DEVICES["cpu"], RANKS, Link())
    plans = [draw_plan(graph, RANKS, BATCH, args.seed * 1000 + k) for k in range(args.plans)]
    plans = [dataclasses.replace(p, cluster=cluster) for p in plans]
    plans.append(plan_graph(graph, cluster, BATCH, "auto", progress=False))
    print(f"{describe_machine()}\n\n{graph.num_ops} operators, {RANKS} ranks, batches of {BATCH}\n")
    rows = [("plan", "stages", "depth", "replicas", "M", "schedule", "predicted, s", "measured, s", "ratio")]
    predicted, measured = [], []
    for k, plan in enumerate(plans):
        predicted.append(predict_blocking(plan))
        measured.append(measure(step, state, batch, plan, args.repeats))
        ratio = measured[-1] / predicted[-1]
        widths = " ".join(str(len(s.devices)) for s in plan.stages)
        shape = (str(len(plan.stages)), str(max(plan.depth)), widths, str(plan.num_microbatches), plan.schedule)
        rows.append((plan.planner or str(k), *shape, f"{predicted[-1]:.3f}", f"{measured[-1]:.3f}", f"{ratio:.3f}"))
        print(f"plan {k}: {predicted[-1]:.3f} s predicted, {measured[-1]:.3f} s measured", file=sys.stderr, flush=True)
    print(format_table(rows))
    errors = [abs(m / p - 1) for m, p in zip(measured, predicted, strict=True)]
    print(f"\nmedian error {np.median(errors):.1%}, largest {max(errors):.1%}")
    print(f"rank correlation of predicted and measured (Spearman): {spearmanr(predicted, measured).statistic:.3f}")


if __name__ == "__main__":
    main()
