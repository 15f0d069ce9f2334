"""Plans of GraphPipe's models by every planner: how fast they are found, and how fast they are.

    python -m benchmarks.planner                       # the table: MMT, DLRM, CANDLE-Uno on 4, 8, 16, 32 V100s
    python -m benchmarks.planner --branches            # CANDLE-Uno with 2, 4, 8, 16 branches
    python -m benchmarks.planner --batches             # how much the mini-batch decides
    python -m benchmarks.planner --growth              # search time, 100 to 10,000 operators, 4 to 1,024 devices
    python -m benchmarks.planner --random 100          # against the exact planner, on random graphs

Models and times are those of `benchmarks.planner_models`; the cluster has nodes of 4 V100s (16 GB) joined by NVLink,
and 100 Gb/s between nodes. Every planner has the same costs, and each plan is the planner's best over all micro-batch
sizes that are powers of two, by the same judge: the simulated step with transfers, gradient reduction and update, of
ranks that run freely as in the literature ("free"), and of the executor's lockstep ("lockstep"), each with the best
number of extra micro-batches in flight that fits. The planners that simulate are told by which they are judged. Search
times are seconds of one CPU core, so that they don't depend on what else the machine does.

    auto                    all timetables, any replica counts and micro-batch sizes, recomputation
    auto, 1F1B only         only the papers' timetable, and no recomputation
    GraphPipe               its plan of each micro-batch size, of which the fastest is taken, as in the paper
    GraphPipe, one search   its own choice among the micro-batch sizes, by the bottleneck alone
    PipeDream               the least bottleneck for each micro-batch size, the fastest taken; what the ratios are to
    PipeDream, by step      chains with fewer stages are judged too
    PipeDream, antichains   as "PipeDream", on the antichains of the graph, as its authors' release does
    Piper                   on down-sets, with recomputation

"at most" is what no plan can pass: all devices always busy, each operator at its best size, nothing sent or updated.

Of the mini-batches, which the paper has in appendix A.2, this file has only what section 7.3 says: 128 for MMT on 8
devices, so 16 a device. The others come close to the memory limit, it says; 64 (DLRM) and 1,024 (CANDLE-Uno) a device
are a choice of this file, and `--batches` shows how much depends on it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty
from typing import Any

import numpy as np

from benchmarks.planner_models import MODELS, candle_uno, layered
from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.pipeline import PipelinePlan
from jaxpar.plan.planners import PLANNERS
from jaxpar.plan.planners.options import list_microbatches
from jaxpar.schedule.simulate import Mode
from jaxpar.text import format_table

Plan = Callable[[OpGraph, ClusterSpec, int, Mode], PipelinePlan]
DEVICES = (4, 8, 16, 32)
BATCH_PER_DEVICE = {"MMT": 16, "DLRM": 64, "CANDLE-Uno": 1024}
PAPER = {  # GraphPipe's throughput over PipeDream's, figure 6
    "MMT": (1.09, 1.27, 1.29, 1.65),
    "DLRM": (1.20, 1.40, 1.30, 1.47),
    "CANDLE-Uno": (0.92, 1.23, 1.23, 1.24),
}
BASE, CHAIN = "PipeDream", "PipeDream, by step"
NAMES: dict[Mode, str] = {"free": "free", "executor": "lockstep"}


def sweep_graphpipe(graph: OpGraph, cluster: ClusterSpec, batch_size: int, mode: Mode) -> PipelinePlan:
    """GraphPipe's plan of each micro-batch size, and of these the fastest, as the paper takes it."""
    plans = []
    for size in list_microbatches(batch_size):
        try:
            plans.append(PLANNERS["graphpipe"](graph, cluster, batch_size, microbatches=[size]))
        except PlanError:
            continue  # doesn't fit
    if not plans:
        raise PlanError("no micro-batch size fits")
    return min(plans, key=lambda plan: plan.predict(mode).step_seconds)


def plan_once(graph: OpGraph, cluster: ClusterSpec, batch_size: int, mode: Mode) -> PipelinePlan:
    """GraphPipe's own choice among the micro-batch sizes, by the bottleneck."""
    return PLANNERS["graphpipe"](graph, cluster, batch_size)


def with_options(name: str, **options: Any) -> Plan:
    """A planner of the registry with some options, judging by a mode."""
    return lambda graph, cluster, batch_size, mode: PLANNERS[name](graph, cluster, batch_size, mode=mode, **options)


def plan_replicas(graph: OpGraph, cluster: ClusterSpec, batch_size: int, mode: Mode) -> PipelinePlan:
    """One stage on all devices, which any mode judges alike."""
    return PLANNERS["data_parallel"](graph, cluster, batch_size)


ONLY_1F1B = [("1f1b", {"extra": 0}), ("1f1b", {})]
COMPARED: dict[str, Plan] = {
    "auto": with_options("auto"),
    "auto, 1F1B only": with_options("auto", schedules=ONLY_1F1B, recompute=False),
    "GraphPipe": sweep_graphpipe,
    "GraphPipe, one search": plan_once,
    BASE: with_options("pipedream", select="bottleneck"),
    CHAIN: with_options("pipedream"),
    "PipeDream, antichains": with_options("pipedream", form="antichains", select="bottleneck"),
    "Piper": with_options("piper", select="bottleneck"),
    "data parallel": plan_replicas,
}
GROWING = ("GraphPipe, one search", CHAIN, "auto")
EXPLODING = ("PipeDream, antichains", "Piper")  # searched once for both judges


@dataclass(frozen=True)
class Result:
    """What became of one search: a plan or why there is none, and the seconds of CPU that it took."""

    seconds: float
    plan: PipelinePlan | None = None
    why_not: str = ""


def run_limited(plan: Plan, graph: OpGraph, cluster: ClusterSpec, batch_size: int, mode: Mode, limit: float) -> Result:
    """Run a planner in a process of its own, for so many seconds at most."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def work() -> None:
        started = time.process_time()
        try:
            found, why = plan(graph, cluster, batch_size, mode), ""
        except PlanError as error:
            found, why = None, _shorten(str(error))
        answers.put((time.process_time() - started, found and found.to_json(), why))

    process = context.Process(target=work)
    process.start()
    try:
        seconds, text, why = answers.get(timeout=limit)
        return Result(seconds, text and PipelinePlan.from_json(text), why)
    except Empty:
        return Result(limit, None, f"gave up: > {limit:.0f} s")
    finally:
        process.terminate()
        process.join()


def _shorten(error: str) -> str:
    for mark in ("down-sets", "pairs"):
        before, found, _ = error.partition(f" {mark}")
        if found:
            return f"gave up: {before.split()[-1]}+ {mark}" if mark == "down-sets" else f"gave up: {before} pairs"
    return "does not fit" if "fits into" in error else error.splitlines()[0][:60]


def judge(plan: PipelinePlan, mode: Mode) -> float:
    """Examples per second, with the best number of extra micro-batches in flight that fits."""
    deepest = max(plan.depth)
    best = plan.predict(mode).throughput
    if plan.schedule == "1f1b":
        for extra in sorted({1, 2, 4, deepest // 2, deepest - 1} - {0}):
            more = replace(plan, schedule_options={**plan.schedule_options, "extra": extra})
            try:
                more.check()
            except PlanError:
                break
            best = max(best, more.predict(mode).throughput)
    return best


@dataclass(frozen=True)
class Case:
    """What is planned for what."""

    model: str
    graph: OpGraph
    devices: int
    batch: int

    @property
    def most(self) -> float:
        """Examples per second if all devices were always busy, each operator at the size that suits it best."""
        sizes = [2.0**i for i in range(self.batch.bit_length())]
        times = [(self.graph.forward_seconds(n) + self.graph.backward_seconds(n)) / n for n in sizes]
        return self.devices / float(np.min(times, axis=0).sum())

    @property
    def paper(self) -> float | None:
        """The paper's ratio for it."""
        known = self.model in PAPER and self.devices in DEVICES
        return PAPER[self.model][DEVICES.index(self.devices)] if known else None


def list_rows(case: Case, results: dict[str, Result], mode: Mode) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """A row for each planner, and the examples per second of those that found a plan."""
    rates = {name: judge(result.plan, mode) for name, result in results.items() if result.plan}
    rows = []
    for name, result in results.items():
        head = (case.model, str(case.devices), str(case.batch), name, f"{result.seconds:.2f}")
        plan = result.plan
        cells: tuple[str, ...] = (result.why_not, *[""] * 5)
        if plan is not None:
            split = f"{plan.microbatch} x {plan.num_microbatches}"
            ratios = (f"{rates[name] / rates[base]:.2f}" if base in rates else "" for base in (BASE, CHAIN))
            cells = (describe_stages(plan), str(max(plan.depth)), split, f"{rates[name]:.4g}", *ratios)
        rows.append((*head, *cells))
    return rows, rates


HEAD = (
    "model",
    "devices",
    "batch",
    "planner",
    "search s",
    "stages x replicas",
    "depth",
    "b x M",
    "examples/s",
    "/ PipeDream",
    "/ by step",
)


def describe_stages(plan: PipelinePlan) -> str:
    """How many stages have how many replicas, and how many of them compute their forward again.

    >>> # "3x1 2x4" is three stages on one device each and two on four
    """
    counts: dict[int, int] = {}
    for stage in plan.stages:
        counts[len(stage.devices)] = counts.get(len(stage.devices), 0) + 1
    again = sum(stage.recompute for stage in plan.stages)
    text = " ".join(f"{count}x{wide}" for wide, count in sorted(counts.items()))
    return f"{text}{f' ({again} recompute)' if again else ''}{'' if plan.schedule == '1f1b' else f' {plan.schedule}'}"


def print_table(cases: Iterable[Case], planners: Sequence[str], modes: Sequence[Mode], limit: float) -> None:
    """The comparison, case by case so that a long run can be watched; then the ratios beside the paper's."""
    head = ("model", "devices", "batch", "mode", *planners, "at most", "paper: GraphPipe")
    summary: list[tuple[str, ...]] = [head]
    for case in cases:
        cluster = ClusterSpec.preset("v100", case.devices)
        results: dict[str, Result] = {}
        for mode in modes:
            for name in planners:
                if name not in EXPLODING or name not in results:
                    results[name] = run_limited(COMPARED[name], case.graph, cluster, case.batch, mode, limit)
            rows, rates = list_rows(case, results, mode)
            print(f"\n{NAMES[mode]}\n{format_table([HEAD, *rows])}", flush=True)
            ratios = (f"{rates[name] / rates[BASE]:.2f}" if {name, BASE} <= rates.keys() else "-" for name in planners)
            paper = f"{case.paper:.2f}" if case.paper else ""
            most = f"{case.most / rates[BASE]:.2f}" if BASE in rates else "-"
            summary.append((case.model, str(case.devices), str(case.batch), NAMES[mode], *ratios, most, paper))
    print(f"\nThroughput over PipeDream's\n{format_table(summary)}")


def print_growth(names: Sequence[str], limit: float) -> None:
    """Search time for graphs and clusters of many sizes; 8 examples a device, 8 transformer layers too up to 512."""
    rows: list[tuple[str, ...]] = [("operators", "devices", *(f"{name} s" for name in names))]
    operators, clusters = (100, 300, 1000, 3000, 10_000), (4, 16, 64, 256, 1024)
    for count, devices in [(n, 32) for n in operators] + [(300, d) for d in clusters]:
        graph, cluster = layered(count, layers=min(8 * devices, 512)), ClusterSpec.preset("v100", devices)
        cells = []
        for name in names:
            result = run_limited(COMPARED[name], graph, cluster, 8 * devices, "free", limit)
            cells.append(f"{result.seconds:.2f}" if result.plan else result.why_not)
        rows.append((str(count), str(devices), *cells))
        print("...", *rows[-1], flush=True)
    print(format_table(rows))


def print_random(count: int, num_ops: int, devices: int) -> None:
    """How far `graphpipe` and `auto` are from `exact`: series-parallel graphs and DAGs, with tight and ample memory."""
    from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel

    rows: list[tuple[str, ...]] = [("graphs", "planner", "of", "within 1 %", "median", "90 %", "worst", "worst seed")]
    for kind, make in (("series-parallel", random_series_parallel), ("DAGs", random_dag)):
        found: dict[str, list[tuple[float, int]]] = {"graphpipe": [], "auto": []}
        for seed in range(count):
            graph = make(seed, 2 + seed % (num_ops - 1))
            cluster = random_cluster(seed, 2 + seed % (devices - 1), graph if seed % 2 else None)
            for name, ratio in compare_with_exact(graph, cluster, 32):
                found[name].append((ratio, seed))
        for name, ratios in found.items():
            rows.append((kind, name, "bottleneck" if name == "graphpipe" else "step", *_spread(ratios)))
    print(format_table(rows))


def compare_with_exact(graph: OpGraph, cluster: ClusterSpec, batch_size: int) -> Iterator[tuple[str, float]]:
    """For each planner, its objective over the exact planner's; nothing where no plan fits for either."""
    exact = PLANNERS["exact"]
    try:
        best = exact(graph, cluster, batch_size, objective="bottleneck")
    except PlanError:
        return
    plan = PLANNERS["graphpipe"](graph, cluster, batch_size, transfers=False)
    plan.check()
    yield "graphpipe", plan.bottleneck / best.bottleneck
    step = exact(graph, cluster, batch_size, mode="free").predict("free").step_seconds
    alike: dict[str, Any] = {
        "mode": "free",
        "schedules": ONLY_1F1B[:1],
        "replicas": "powers_of_two",
        "recompute": False,
    }
    plan = PLANNERS["auto"](graph, cluster, batch_size, **alike)
    plan.check()
    yield "auto", plan.predict("free").step_seconds / step


def _spread(ratios: Sequence[tuple[float, int]]) -> tuple[str, ...]:
    ordered = sorted(ratios)
    values = [ratio for ratio, _ in ordered]
    close = sum(ratio <= 1.01 for ratio in values)
    tenth = values[min(len(values) - 1, int(0.9 * len(values)))]
    worst, seed = ordered[-1]
    middle = statistics.median(values)
    return f"{close} of {len(values)}", f"{middle:.3f}", f"{tenth:.3f}", f"{worst:.3f}", str(seed)


def list_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases asked for."""
    if args.branches:
        each = args.batch_per_device or BATCH_PER_DEVICE["CANDLE-Uno"]
        for branches in (2, 4, 8, 16):
            for devices in (d for d in args.devices if d <= 16):
                yield Case(f"CANDLE-Uno {branches}x4", candle_uno(branches), devices, each * devices)
        return
    for model in args.models:
        each = args.batch_per_device or BATCH_PER_DEVICE[model]
        for devices in [max(args.devices)] if args.batches else args.devices:
            for times in (0.25, 0.5, 1, 2, 4) if args.batches else (1,):
                yield Case(model, MODELS[model](), devices, int(each * times * devices))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=list(DEVICES))
    parser.add_argument("--planners", nargs="+", choices=list(COMPARED), help="all, with --growth a few, by default")
    parser.add_argument("--batch-per-device", type=int, help="examples of the mini-batch for each device")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a search")
    parser.add_argument("--modes", nargs="+", default=list(NAMES), choices=list(NAMES), help="the judges")
    for kind in ("branches", "batches", "growth"):
        parser.add_argument(f"--{kind}", action="store_true")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="graphs of each kind")
    parser.add_argument("--random-size", type=int, nargs=2, default=(9, 4), metavar=("OPS", "DEVICES"))
    args = parser.parse_args()
    if args.growth:
        print_growth(args.planners or GROWING, args.limit)
    elif args.random:
        print_random(args.random, *args.random_size)
    else:
        print_table(list_cases(args), args.planners or list(COMPARED), args.modes, args.limit)


if __name__ == "__main__":
    main()
