"""Measured times: each different block compiled and run on a device.

A block runs in a loop inside one compiled program, as it does in the pipeline, so that calling it costs nothing. Its
inputs pass a barrier that depends on the counter of the loop, so that nothing is computed only once; its outputs are
carried, and its gradients are added to accumulators. Runs of the loop with few and with many rounds are compared; the
least of several counts, since whatever else the machine does only adds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar import _jax
from jaxpar.errors import PlanError
from jaxpar.lower.evaluate import Rows, evaluate, read
from jaxpar.plan import DeviceSpec, TimeCurve
from jaxpar.plan.block_program import BlockProgram
from jaxpar.plan.devices import DEVICES, match_device_kind
from jaxpar.schedule.search_cache import find_directory, write_whole
from jaxpar.trace import Var

_REPEATS = 5
_SPAN = 0.01  # seconds that the longer runs of a loop take more than the short ones
_MOST_ROUNDS = 3072
_INDEX_BOUND = 8  # integers are drawn below this: they may be rows of a table, or classes
_VERSION = 1  # of how it is measured


@dataclass(frozen=True)
class Measuring:
    """How far measuring has come."""

    done: int
    total: int
    seconds: float

    def __str__(self) -> str:
        return f"measured {self.done} of {self.total} blocks and sizes, {self.seconds:.0f} s"


Progress = Callable[[Measuring], None] | Literal[False] | None


@dataclass(frozen=True)
class MeasuredCosts:
    """Times of programs on a device that is there; a `CostModel`.

    Args:
        on: the device; JAX's first by default.
        num_examples: of the whole batch, for draws of random numbers that take the whole batch's.
        progress: called after each measurement; by default a line on stderr when it takes more than a second and stderr
            is a terminal; False for none.
        cache: a directory to keep times in, by program, device and JAX version; `JAXPAR_CACHE_DIR` by default, if set;
            False for none.
    """

    on: Any = None
    num_examples: int = 0
    progress: Progress = None
    cache: str | os.PathLike[str] | Literal[False] | None = None
    _kept: dict[tuple[str, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> str:
        """The preset's name for this kind of device, or the kind as JAX calls it."""
        kind = str(self._jax_device.device_kind)
        return match_device_kind(kind) or kind

    @property
    def _jax_device(self) -> Any:
        return self.on if self.on is not None else jax.devices()[0]

    def time(self, programs: Mapping[str, BlockProgram], sizes: Sequence[int]) -> dict[str, TimeCurve]:
        """Seconds of each program for each number of examples, measured where they aren't known yet.

        Raises: PlanError where a file of the cache holds something else.
        """
        directory = None if self.cache is False else find_directory(self.cache)
        for digest in programs if directory else ():
            self._kept.update({(digest, n): t for n, t in self._read(directory, digest).items()})  # type: ignore[arg-type]
        missing = [(digest, n) for digest in programs for n in sizes if (digest, n) not in self._kept]
        start = time.perf_counter()
        for done, (digest, n) in enumerate(missing, 1):
            self._kept[digest, n] = measure_program(programs[digest], n, self._jax_device, self.num_examples)
            if directory:
                self._write(directory, digest)
            self._report(Measuring(done, len(missing), time.perf_counter() - start))
        return {d: _rising_curve([(n, self._kept[d, n]) for n in sizes]) for d in programs}

    def _report(self, state: Measuring) -> None:
        if self.progress:
            self.progress(state)
        elif self.progress is None and state.seconds > 1 and sys.stderr.isatty():
            sys.stderr.write(f"\r{state}\x1b[K" + "\n" * (state.done == state.total))
            sys.stderr.flush()

    # -- the cache on disk: one file for each program, device and JAX version ------------------------------------------

    def _path(self, directory: Path, digest: str) -> Path:
        return directory / f"{digest}-{hashlib.sha256(repr(self._setting).encode()).hexdigest()[:16]}.times"

    @property
    def _setting(self) -> dict[str, Any]:
        """All that a program's time depends on besides the program."""
        device = self._jax_device
        host = f"{platform.machine()}, {os.cpu_count()} processors" if device.platform == "cpu" else ""
        flags = os.environ.get("XLA_FLAGS", "")
        return {
            "platform": device.platform,
            "device": str(device.device_kind),
            "host": host,
            "jax": jax.__version__,
            "flags": flags,
            "version": _VERSION,
        }

    def _read(self, directory: Path, digest: str) -> dict[int, float]:
        path = self._path(directory, digest)
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text())
            if found["setting"] != self._setting or found["program"] != digest:
                raise ValueError("it is for another program or device")
            return {int(n): float(t) for n, t in found["seconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the cached times {path} can't be used, delete the file: {error}") from error

    def _write(self, directory: Path, digest: str) -> None:
        seconds = {str(n): t for (d, n), t in sorted(self._kept.items()) if d == digest}
        text = json.dumps({"program": digest, "setting": self._setting, "seconds": seconds}, indent=1)
        write_whole(self._path(directory, digest), f"{text}\n")


def _rising_curve(points: Sequence[tuple[int, float]]) -> TimeCurve:
    """A larger batch doesn't take less time: what a noisy measurement says, the next larger one corrects."""
    found: list[tuple[int, float]] = []
    least = float("inf")
    for n, seconds in reversed(points):
        least = min(least, seconds)
        found.append((n, least))
    return TimeCurve(tuple(reversed(found)))


# -- one measurement ---------------------------------------------------------------------------------------------------


def measure_program(program: BlockProgram, n: int, device: Any, num_examples: int = 0) -> float:
    """Seconds of one run of a program for n examples on a device, without what a call from Python costs."""
    rng = np.random.default_rng(0)
    inputs = [jax.device_put(_make_input(v, n, rng), device) for v in program.inputs]
    rows = Rows(n, max(n, num_examples), np.int32(0))
    loop = jax.jit(lambda rounds, values: _run_rounds(program, rows, rounds, values))

    with jax.default_device(device):
        return _seconds_of_round(lambda rounds: loop(rounds, inputs))


def _run_rounds(program: BlockProgram, rows: Rows, rounds: Any, values: Sequence[Any]) -> Any:
    made = tuple(dict.fromkeys((*program.outputs, *program.partials)))
    summed = set(program.partials)

    def one_round(i: Any, before: Sequence[Any]) -> list[Any]:
        _, fresh = lax.optimization_barrier((i, list(values)))
        env = dict(zip(program.inputs, fresh, strict=True))
        evaluate(program.eqns, env, rows)
        results = [_jax.unwrap_key(jnp.asarray(read(env, v))) for v in made]
        return [b + r if v in summed else r for v, b, r in zip(made, before, results, strict=True)]

    def zeros(v: Var) -> Any:
        shape, dtype = _jax.raw_shape(v.shape_at(rows.count), v.dtype)
        return jnp.zeros(shape, dtype)

    return lax.fori_loop(0, rounds, one_round, [zeros(v) for v in made])


def _make_input(v: Var, n: int, rng: np.random.Generator) -> Any:
    shape = v.shape_at(n)
    if _jax.is_key(v.dtype):
        return jax.random.split(jax.random.key(0, impl=_jax.key_impl(v.dtype)), shape or (1,)).reshape(shape)
    kind = np.dtype(v.dtype).kind
    if kind == "b":
        return rng.random(shape) < 0.5
    if kind in "iu":
        return rng.integers(0, _INDEX_BOUND, shape).astype(v.dtype)
    return jnp.asarray(rng.standard_normal(shape, np.float32), v.dtype)  # of any floating or complex type


def measure_device(on: Any = None, name: str = "", size: int = 1024) -> DeviceSpec:
    """A `DeviceSpec` with what a device that is there really does: for machines without a data sheet.

    Args:
        on: the device; JAX's first by default.
        name: what to call it; by default the kind that JAX reports.
        size: of the matrices that are multiplied, and of a sixteenth of the array that is read and written.
    """
    device = on if on is not None else jax.devices()[0]
    types = [jnp.float32, jnp.bfloat16] + [jnp.float64] * bool(jax.config.read("jax_enable_x64"))
    flops = {
        np.dtype(t).name: 2.0 * size**3 / _time_of(lambda a: (a @ a) / size, (size, size), t, device) for t in types
    }
    copied = 16 * size * size
    seconds = _time_of(lambda a: a + 1, (copied,), jnp.float32, device)
    known = DEVICES.get(match_device_kind(str(device.device_kind)) or "")
    memory = (device.memory_stats() or {}).get("bytes_limit") or (known.memory_bytes if known else 16 * 2.0**30)
    kind = name or str(device.device_kind)
    return DeviceSpec(kind, flops, float(memory), 8.0 * copied / seconds, "measured")


def _time_of(fun: Callable[[Any], Any], shape: tuple[int, ...], dtype: Any, device: Any) -> float:
    """Seconds of one application of `fun`, which gives an array like its argument, in a compiled loop."""
    x = jax.device_put(jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype), device)
    loop = jax.jit(lambda rounds, x: lax.fori_loop(0, rounds, lambda _, x: fun(x), x))
    with jax.default_device(device):
        return _seconds_of_round(lambda rounds: loop(rounds, x))


def _seconds_of_round(run: Callable[[int], Any]) -> float:
    """Seconds of one round of a loop, from runs with few and with many; the first run compiles."""

    def least(rounds: int) -> float:
        found = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(run(rounds))
            found.append(time.perf_counter() - start)
        return min(found)

    jax.block_until_ready(run(1))
    few, rounds = least(1), 3
    while (many := least(rounds)) < few + _SPAN and rounds < _MOST_ROUNDS:
        rounds = min(_MOST_ROUNDS, 4 * rounds)
    return max(0.0, many - few) / (rounds - 1)
