#!/usr/bin/env python3
"""What the pipeline costs on emulated devices: step time, memory, compile time, state.

    python -m benchmarks.overhead                 everything
    python -m benchmarks.overhead time memory     parts of it

The emulated devices share the machine's cores, so a pipeline can't be faster than one device here: what the table shows
is the executor's overhead over gradient accumulation written by hand, at equal work.

`time`     step time, 4 stages, M = 16, against a jitted single-device scan over the same micro-batches
`memory`   XLA's temp memory per device against what `train_step.memory` counts, for M = 8, 16 and 32
`compile`  distinct stage programs, and the first call (tracing, compiling, running) against that of the undecorated
           step, for 8, 16 and 32 layers
`state`    bytes of state per rank against the largest stage's
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jaxpar
from benchmarks import gpt, timing

STAGES = 4
MIB = 2**20


def pipelined_step(num_microbatches: int, schedule: str = "1f1b") -> Any:
    """The GPT's step on `STAGES` stages."""
    mesh = jax.make_mesh((STAGES,), ("stage",), devices=jax.devices()[:STAGES])
    return jaxpar.parallelize(gpt.train_step, mesh=mesh, num_microbatches=num_microbatches, schedule=schedule)


def measure_time(config: gpt.Config, num_microbatches: int, repeats: int) -> None:
    """(a) Paired step times."""
    print(f"\n## Step time: {config}, {STAGES} stages, M = {num_microbatches}, {repeats} pairs\n\n{timing.HEADER}")
    batches = [gpt.make_batch(config, seed) for seed in range(2)]
    accumulating = jax.jit(gpt.accumulating_step(num_microbatches), donate_argnums=0)
    whole = jax.jit(gpt.train_step, donate_argnums=0)
    step = pipelined_step(num_microbatches)
    candidates = {
        "whole batch": (whole, gpt.init_state(config)),
        "pipelined": (step, step.place(gpt.init_state(config))),
    }
    for name, (candidate, state) in candidates.items():
        baseline_state = gpt.init_state(config)
        result = timing.compare_steps(
            f"{name} / accumulating", accumulating, baseline_state, candidate, state, batches, repeats
        )
        print(result, flush=True)


def temp_bytes(compiled: Any) -> int:
    """XLA's temp memory of one device."""
    return compiled.memory_analysis().temp_size_in_bytes


def measure_memory(config: gpt.Config) -> None:
    """(b) Temp memory per device, against the timetable's count and against gradient accumulation."""
    print(f"\n## Memory: {config}, but 2 examples per micro-batch; {STAGES} stages, MiB per device")
    print(f"{'M':>4} {'pipelined':>10} {'counted':>10} {'ratio':>7} {'accumulating':>13}")
    for num_microbatches in (8, 16, 32):
        # Micro-batches of one size, so that only their number changes.
        sized = dataclasses.replace(config, batch_size=2 * num_microbatches)
        state, batch = gpt.init_state(sized), gpt.make_batch(sized)
        step = pipelined_step(num_microbatches)
        temp = temp_bytes(step.lower(state, batch).compile())
        counted = step.memory(state, batch).temporary
        baseline = temp_bytes(jax.jit(gpt.accumulating_step(num_microbatches)).lower(state, batch).compile())
        sizes = f"{temp / MIB:10.1f} {counted / MIB:10.1f} {temp / counted:7.2f} {baseline / MIB:13.1f}"
        print(f"{num_microbatches:4d} {sizes}", flush=True)


def measure_compile(config: gpt.Config) -> None:
    """(c) Programs and first calls as the number of layers grows: what they spend on tracing and compiling, and all."""
    print(f"\n## First call: {config} and deeper, {STAGES} stages, M = 16, seconds: compiling + running")
    names = ("undecorated", "accumulating", "pipelined")
    print(f"{'layers':>6} {' '.join(f'{name:>16}' for name in names)} {'compile':>8} {'call':>6} {'programs':>9}")
    for num_layers in (8, 16, 32):
        deep = dataclasses.replace(config, num_layers=num_layers)
        state, batch = gpt.init_state(deep), gpt.make_batch(deep)
        step = pipelined_step(16)
        results = []
        for candidate in (jax.jit(gpt.train_step), jax.jit(gpt.accumulating_step(16)), step):
            results.append(timing.time_first_call(candidate, state, batch))
            compiling, running = results[-1]
            print(f"{num_layers:6d} " * (len(results) == 1) + f"{compiling:7.1f} + {running:6.1f} ", end="", flush=True)
        plain, _, pipelined = results
        ratios = f"{pipelined[0] / plain[0]:8.2f} {sum(pipelined) / sum(plain):6.2f}"
        print(f"{ratios} {step.lower(state, batch).num_programs:9d}", flush=True)


def measure_state(config: gpt.Config) -> None:
    """(d) Bytes of state on each rank, against the largest stage's own."""
    print(f"\n## State: {config}, {STAGES} stages, MiB")
    state, batch = gpt.init_state(config), gpt.make_batch(config)
    step = pipelined_step(16)
    plan = step.plan(state, batch)  # from now on the step knows where each leaf belongs
    per_rank = dict.fromkeys(jax.devices()[:STAGES], 0)
    for leaf in jax.tree.leaves(step.place(state)):
        for shard in leaf.addressable_shards:
            per_rank[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
    largest = max(s.state_bytes for s in plan.summaries)
    print("per rank: " + " ".join(f"{size / MIB:.1f}" for size in per_rank.values()))
    print(f"largest stage: {largest / MIB:.1f}; ratio {max(per_rank.values()) / largest:.2f}; whole: {whole / MIB:.1f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="time, memory, compile, state; default: all")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    config = gpt.Config(num_layers=args.layers, dim=args.dim, length=args.length, batch_size=args.batch_size)
    parts = {
        "time": lambda: measure_time(config, args.microbatches, args.repeats),
        "memory": lambda: measure_memory(config),
        "compile": lambda: measure_compile(config),
        "state": lambda: measure_state(config),
    }
    unknown = set(args.parts) - set(parts)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    print(timing.describe_machine())
    for name in args.parts or parts:
        parts[name]()


if __name__ == "__main__":
    main()
