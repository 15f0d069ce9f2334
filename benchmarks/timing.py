"""Paired timing: programs that are compared take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds of each repeat, in pairs."""

    name: str
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over the pairs of candidate / baseline."""
        return statistics.median(c / b for b, c in zip(self.baseline, self.candidate, strict=True))

    @property
    def ratio_of_best(self) -> float:
        """The fastest candidate over the fastest baseline."""
        return min(self.candidate) / min(self.baseline)

    def __str__(self) -> str:
        b, c = self.baseline, self.candidate
        return (
            f"{self.name:<28} {min(b):9.3f} {statistics.median(b):9.3f} {min(c):9.3f} {statistics.median(c):9.3f}"
            f" {self.ratio_of_best:8.3f} {self.ratio:8.3f}"
        )


HEADER = (
    f"{'':<28} {'baseline, s':>19} {'candidate, s':>19} {'ratio':>17}\n"
    f"{'':<28} {'min':>9} {'median':>9} {'min':>9} {'median':>9} {'of min':>8} {'median':>8}"
)


def compare_steps(
    name: str,
    baseline: Callable[[Any, Any], Any],
    baseline_state: Any,
    candidate: Callable[[Any, Any], Any],
    candidate_state: Any,
    batches: Sequence[Any],
    repeats: int = 7,
) -> Comparison:
    """Times one step of each in turn, `repeats` times, after one untimed step of each.

    A step maps `(state, batch)` to `(state, outputs)` and may donate its state. Which one goes first alternates.
    """
    states = {"baseline": baseline_state, "candidate": candidate_state}
    steps = {"baseline": baseline, "candidate": candidate}
    seconds: dict[str, list[float]] = {"baseline": [], "candidate": []}
    for repeat in range(-1, repeats):
        batch = batches[repeat % len(batches)]
        for which in list(steps)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            states[which], outputs = steps[which](states[which], batch)
            jax.block_until_ready((states[which], outputs))
            if repeat >= 0:
                seconds[which].append(time.perf_counter() - start)
    return Comparison(name, tuple(seconds["baseline"]), tuple(seconds["candidate"]))


def time_first_call(step: Any, *args: Any) -> tuple[float, float]:
    """Seconds that the first call of a jitted function takes: to trace and compile it, and to run it."""
    start = time.perf_counter()
    compiled = step.lower(*args).compile()
    between = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return between - start, time.perf_counter() - between


def describe_machine() -> str:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return (
        f"jax {jax.__version__}, Python {platform.python_version()}, {len(jax.devices())} x {device.device_kind} "
        f"({device.platform}), {os.cpu_count()} cores, {platform.machine()}"
    )
