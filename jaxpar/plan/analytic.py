"""Analytic times: a roofline per operation, with what small operations lose.

An operation takes the longer of its arithmetic and its memory traffic (Williams, Waterman, Patterson, CACM 2009), at
the shares of the data sheet's figures that large operations reach. Small products reach less, for two reasons that
depend on their shape (NVIDIA, "Matrix Multiplication Background User's Guide": tile and wave quantization):

    tiles    a product m x n is computed in tiles, and the last tile of each row and column may be mostly padding
    waves    tiles are dealt to the device's cores, and in the last round some cores have none

so that its time is a staircase in the micro-batch's size, flat below one tile and straight far above. A library
chooses among several tiles, and may split long sums over cores: the best choice counts. Each product, reduction and the
like is a kernel with a fixed cost; element-wise work is fused into its neighbours.

Not modelled: caches, clocks that fall under load, bank conflicts, what a compiler does to particular patterns. Use
measured times (`jaxpar.measure`) where the device is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxpar.plan.block_program import BlockProgram
from jaxpar.plan.cluster import DeviceSpec
from jaxpar.plan.costs import HEAVY, count_bytes, count_flops
from jaxpar.plan.time_curve import TimeCurve
from jaxpar.trace import Eqn
from jaxpar.trace.ir import at_size


@dataclass(frozen=True)
class Engine:
    """How a device does its arithmetic.

    Args:
        cores: that tiles are dealt to.
        tiles: (rows, columns, share of a core's peak that products of this tile reach).
        arithmetic: share of the peak that large products reach.
        traffic: share of the memory bandwidth that large transfers reach.
        launch: seconds that each kernel costs besides.
        depth: sums are padded to a multiple of this.
        split: the most parts that a sum may be split into.
        source: where the figures are from.
    """

    cores: int
    tiles: tuple[tuple[int, int, float], ...]
    arithmetic: float
    traffic: float
    launch: float
    depth: int = 1
    split: int = 1
    source: str = ""


_GPU_TILES = ((256, 128, 1.0), (128, 128, 0.95), (64, 64, 0.75), (32, 32, 0.5))


def _gpu(cores: int, source: str) -> Engine:
    return Engine(cores, _GPU_TILES, arithmetic=0.8, traffic=0.85, launch=3e-6, depth=16, split=8, source=source)


def _tpu(size: int, source: str) -> Engine:
    return Engine(1, ((8, size, 1.0),), arithmetic=0.85, traffic=0.85, launch=1e-6, depth=size, source=source)


ENGINES: Mapping[str, Engine] = {
    "v100": _gpu(80, "V100 architecture white paper: 80 SMs"),
    "a100": _gpu(108, "A100 architecture white paper: 108 SMs"),
    "h100": _gpu(132, "H100 architecture white paper, SXM5: 132 SMs"),
    "h200": _gpu(132, "H200 data sheet: the H100's processor"),
    "b200": _gpu(148, "round figure: two dies of 74 SMs"),
    "tpu_v4": _tpu(128, "Cloud documentation: MXUs of 128 x 128"),
    "tpu_v5e": _tpu(128, "Cloud documentation: MXUs of 128 x 128"),
    "tpu_v5p": _tpu(128, "Cloud documentation: MXUs of 128 x 128"),
    "tpu_v6e": _tpu(256, "Cloud documentation: MXUs of 256 x 256"),
    "cpu": Engine(1, ((4, 16, 1.0),), arithmetic=0.8, traffic=0.8, launch=1e-6, source="round figures"),
}
"""By the name of the `DeviceSpec`; shares and launches are round figures of what such devices usually reach."""

_PLAIN = Engine(1, ((1, 1, 1.0),), arithmetic=0.8, traffic=0.8, launch=2e-6, source="nothing is known")

_SLOW = frozenset(
    """
    acos asin atan atan2 cbrt cos cosh digamma div erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rem
    rsqrt sin sinh sqrt tan tanh
    """.split()
)
_SLOW_FLOPS = 10.0  # of one element of these
_VECTOR_SHARE = 0.25  # of the peak, for element-wise arithmetic: no fused multiply-add, some lanes idle
_FP32 = "float32"


@dataclass(frozen=True)
class AnalyticCosts:
    """Times of programs on a device, from its data sheet.

    >>> from jaxpar.plan.devices import DEVICES
    >>> costs = AnalyticCosts(DEVICES["v100"])
    >>> few, many = (costs.product_seconds(1, n, 4096, 4096, "float32", 0.0) for n in (64, 4096))
    >>> 0.5 < many / (64 * few) < 1  # each row of a small product takes longer
    True
    """

    spec: DeviceSpec

    @property
    def device(self) -> str:
        """The device's name."""
        return self.spec.name

    @property
    def engine(self) -> Engine:
        """How the device does its arithmetic: as the preset that its name begins with."""
        return next((engine for name, engine in ENGINES.items() if self.spec.name.startswith(name)), _PLAIN)

    def time(self, programs: Mapping[str, BlockProgram], sizes: Sequence[int]) -> dict[str, TimeCurve]:
        """Seconds of each program for each number of examples; larger batches never take less time."""
        found = {}
        for digest, program in programs.items():
            points, longest = [], 0.0
            for n in sizes:
                longest = max(longest, self.seconds(program.eqns, n) + self._accumulate_seconds(program))
                points.append((n, longest))
            found[digest] = TimeCurve(tuple(points))
        return found

    def _accumulate_seconds(self, program: BlockProgram) -> float:
        """Accumulators are read and written for each micro-batch; that is part of the kernel that makes the value."""
        return self._traffic_seconds(2.0 * sum(v.bytes_at(1) for v in program.partials))

    def seconds(self, eqns: Sequence[Eqn], n: int) -> float:
        """Seconds of some equations for n examples."""
        return math.fsum(self.eqn_seconds(eqn, n) for eqn in eqns)

    def eqn_seconds(self, eqn: Eqn, n: int) -> float:
        """Seconds of one equation for n examples."""
        match eqn.name:
            case "scan":
                (body,) = eqn.bodies["jaxpr"]
                return at_size(eqn.params["length"], n) * (self.seconds(body.eqns, n) + self.engine.launch)
            case "while" | "cond":
                bodies = [body for group in eqn.bodies.values() for body in group]
                return self.engine.launch + max(self.seconds(body.eqns, n) for body in bodies)
            case "dot_general" | "conv_general_dilated":
                return self.product_seconds(*_product_shape(eqn, n), self._dtype_of(eqn), count_bytes(eqn, n))
        work = count_flops(eqn, n) * (_SLOW_FLOPS if eqn.name in _SLOW else 1.0)
        arithmetic = work / (self.spec.peak(_FP32) * _VECTOR_SHARE)
        kernel = eqn.name in HEAVY or eqn.name.startswith(("reduce_", "arg", "cum"))
        return max(arithmetic, self._traffic_seconds(count_bytes(eqn, n))) + self.engine.launch * kernel

    def product_seconds(self, batch: int, m: int, n: int, k: int, dtype: str, size: float) -> float:
        """Seconds of `batch` products of m x k and k x n matrices that move `size` bytes."""
        engine = self.engine
        core = self.spec.peak(dtype) * engine.arithmetic / engine.cores
        best = math.inf
        for rows, columns, share in engine.tiles:
            for a, b in {(rows, columns), (columns, rows)}:
                tiles = batch * -(-m // a) * -(-n // b)
                for parts in _splits(k, engine):
                    waves = -(-tiles * parts // engine.cores)
                    depth = -(-k // (parts * engine.depth)) * engine.depth
                    best = min(best, waves * 2.0 * a * b * depth / (core * share))
        return max(best, self._traffic_seconds(size)) + engine.launch

    def _traffic_seconds(self, size: float) -> float:
        return size / (self.spec.memory_bandwidth * self.engine.traffic)

    def _dtype_of(self, eqn: Eqn) -> str:
        """The type that a product is computed in: by default GPUs that can take float32 operands as TF32."""
        name = str(getattr(eqn.inputs[0].dtype, "name", eqn.inputs[0].dtype))
        precision = str(eqn.params.get("precision"))
        if name == _FP32 and "tf32" in self.spec.flops and "HIGH" not in precision:
            return "tf32"
        return name


def _splits(k: int, engine: Engine) -> list[int]:
    """Numbers of parts that a sum over k may be split into: not so many that a part is short."""
    return [2**i for i in range(engine.split.bit_length()) if i == 0 or k // 2**i >= 256]


def _product_shape(eqn: Eqn, n: int) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a product; a convolution as the product of its patches with its kernel."""
    (out,) = eqn.outputs
    elements = math.prod(out.shape_at(n))
    if eqn.name == "dot_general":
        (lhs_c, _), (lhs_b, _) = eqn.params["dimension_numbers"]
        lhs = at_size(eqn.inputs[0].shape, n)
        batch = math.prod(lhs[d] for d in lhs_b)
        k = math.prod(lhs[d] for d in lhs_c)
        m = math.prod(size for d, size in enumerate(lhs) if d not in (*lhs_b, *lhs_c))
    else:
        numbers = eqn.params["dimension_numbers"]
        batch = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        features = out.shape_at(n)[numbers.out_spec[1]]
        k = round(count_flops(eqn, n) / (2 * elements)) if elements else 1
        m = elements // max(features, 1)
        return batch, m, max(features // batch, 1), max(k, 1)
    return batch, m, elements // max(batch * m, 1), k
