#!/usr/bin/env python3
"""Plans of common kinds of model, from their traced training steps, with no device.

    python -m benchmarks.plan_zoo [--devices 16] [--cluster h100] [--planner auto] [MODEL ...]

For each model: equations and operators, how many of them differ, seconds to trace, to make the graph of operators and
to plan; then the plan: stages, depth, micro-batch, imbalance (the seconds of the busiest device over the mean, minus
one), predicted examples per second. A step that can't be pipelined says why.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise

import jax

from benchmarks.zoo_models import WORKLOADS, Workload
from jaxpar import JaxparError
from jaxpar.arguments import read_arguments
from jaxpar.plan import DEVICES, ClusterSpec, PipelinePlan, planners
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.planning import build_graph, read_signature
from jaxpar.text import format_table
from jaxpar.tracing import trace_step

_COUNTS = ("model", "equations", "operators", "kinds", "edges", "trace s", "graph s", "plan s")
HEAD: tuple[str, ...] = (*_COUNTS, "stages", "depth", "micro-batch", "imbalance", "examples/s")


def imbalance(plan: PipelinePlan) -> float:
    """How much longer the busiest rank works on a micro-batch than the mean of all devices."""
    busy = [0.0] * len(plan.rank_devices)
    for rank, seconds in zip(plan.rank_of, plan.stage_times, strict=True):
        busy[rank] += sum(seconds)
    devices = [len(d) for d in plan.rank_devices]
    mean = sum(t * d for t, d in zip(busy, devices, strict=True)) / sum(devices)
    return max(busy) / mean - 1


def plan_workload(work: Workload, cluster: ClusterSpec, planner: str) -> tuple[tuple[str, ...], PipelinePlan]:
    """The row of the table, and the plan."""
    marks = [time.perf_counter()]
    traced = trace_step(read_arguments(read_signature(work.step), (work.state, work.batch)))
    marks.append(time.perf_counter())
    found = build_graph(traced, AnalyticCosts(DEVICES[cluster.devices[0].name]))
    marks.append(time.perf_counter())
    plan = planners.plan(found.graph, cluster, traced.program.num_examples, planner=planner)
    marks.append(time.perf_counter())
    seconds = [f"{b - a:.1f}" for a, b in pairwise(marks)]
    equations = len(found.flow.forward) + len(found.flow.backward)
    counts = (found.graph.num_ops, len({op.kind for op in found.graph.ops}), len(found.graph.edges))
    how = (len(plan.stages), max(plan.depth), plan.microbatch)
    end = (f"{imbalance(plan):.1%}", f"{plan.predict().throughput:.4g}")
    return (work.name, f"{equations}", *map(str, counts), *seconds, *map(str, how), *end), plan


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and the plans before it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(WORKLOADS))
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--cluster", default="h100")
    parser.add_argument("--planner", default="auto")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    cluster = ClusterSpec.preset(options.cluster, options.devices)
    rows, refused = [HEAD], []
    for name in options.models or WORKLOADS:
        try:
            row, plan = plan_workload(WORKLOADS[name](), cluster, options.planner)
        except JaxparError as error:
            refused.append(f"{name} is refused: {error}")
            continue
        rows.append(row)
        print(f"{name}\n{plan}\n", flush=True)
    print(format_table(rows), *refused, sep="\n")


if __name__ == "__main__":
    main()
