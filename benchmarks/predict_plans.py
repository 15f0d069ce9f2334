#!/usr/bin/env python3
"""What it takes to judge a plan, and how near the lower bound that searches use comes to the simulation.

    python -m benchmarks.predict_plans

Balanced chains with B = 2F, one device a stage; 1F1B with as many micro-batches in flight as there are stages
downstream, and ZB-H1. `simulated` makes the timetable and simulates it in both modes; `predicted` is `plan.predict` in
both modes, the first time and when only costs have changed; `estimated` is `estimate_step`. The last column is the
estimate over the free-running simulation, in the last table for slow links.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import replace

from jaxpar.plan import ClusterSpec, Op, OpGraph, PipelinePlan, PlannedStage, estimate_step
from jaxpar.plan.quick_run import run_quickly
from jaxpar.schedule import Link


def make_chain(stages: int, microbatches: int, link: Link | None = None) -> PipelinePlan:
    """Stages of 1 + 2 ms an example on H100s."""
    ops = [
        Op(f"layer_{i}", 1e-3, 1e-3, 1e-3, parameter_bytes=1e8, residual_bytes=1e6, output_bytes=1e6)
        for i in range(stages)
    ]
    graph = OpGraph.build(ops, [(f"layer_{i}", f"layer_{i + 1}") for i in range(stages - 1)])
    cluster = ClusterSpec.preset("h100", stages)
    if link is not None:
        cluster = ClusterSpec.homogeneous(cluster.devices[0], stages, link)
    planned = tuple(PlannedStage((i,), (i,)) for i in range(stages))
    return PipelinePlan(graph, cluster, planned, 1, microbatches, schedule_options={"extra": 0})


def time_best(
    call: Callable[[PipelinePlan], object], plan: PipelinePlan, repeats: int = 5, warm: bool = False
) -> float:
    """The least of some times, each of a plan that nothing is yet known of, or only the order of its actions."""
    best = float("inf")
    for _ in range(repeats):
        fresh = replace(plan)
        if not warm:
            run_quickly.cache_clear()
        start = time.perf_counter()
        call(fresh)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}; milliseconds, best of 5\n")
    both = ("executor", "free")
    columns = "".join(f"{name:>11}" for name in ("simulated", "predicted", "again", "estimated", "bound"))
    print(f"{'':<8} {'stages':>6} {'M':>4}{columns}")
    for schedule, stages, microbatches in itertools.product(("1f1b", "zb_h1"), (8, 32), (32, 128)):
        plan = replace(make_chain(stages, microbatches), schedule=schedule)
        plan = replace(plan, schedule_options={"extra": 0} if schedule == "1f1b" else {})
        times = [
            time_best(lambda p: [p.simulate(mode).makespan for mode in both], plan),  # type: ignore[arg-type]
            time_best(lambda p: [p.predict(mode) for mode in both], plan),  # type: ignore[arg-type]
            time_best(lambda p: [p.predict(mode) for mode in both], plan, warm=True),  # type: ignore[arg-type]
            time_best(estimate_step, plan),
        ]
        cells = "".join(f"{t * 1e3:>11.2f}" for t in times)
        bound = estimate_step(plan) / plan.predict("free").step_seconds
        print(f"{schedule:<8} {stages:>6} {microbatches:>4}{cells}{bound:>11.4f}")
    print(f"\n{'stages':>6} {'M':>4} {'latency/F':>10} {'bound':>8}")
    for latency in (0.0, 0.1, 0.5, 1.0, 2.0):
        plan = make_chain(8, 32, Link(latency * 1e-3, 1e12))
        print(f"{8:>6} {32:>4} {latency:>10} {estimate_step(plan) / plan.predict('free').step_seconds:>8.4f}")


if __name__ == "__main__":
    main()
