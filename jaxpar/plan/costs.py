"""Analytic costs: flops, bytes moved, and time by the roofline of a device.

A roofline (Williams, Waterman, Patterson, CACM 2009): an operation takes the longer of its arithmetic at peak speed and
its memory traffic at full bandwidth. Element-wise work is fused by XLA, so that only a part of its traffic is real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxpar.trace import Eqn, Var
from jaxpar.trace.ir import at_size

_FUSED_TRAFFIC = 0.25  # of element-wise operations, about one array in four is really written and read back
_LAYOUT = frozenset(
    "alias reshape squeeze expand_dims broadcast_in_dim stop_gradient copy optimization_barrier".split()
)
HEAVY = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "gather", "scatter-add", "sort", "scatter"}


@dataclass(frozen=True)
class Roofline:
    """A device's peak arithmetic [flop/s], memory bandwidth [byte/s], and bandwidth to its neighbours [byte/s]."""

    flops: float
    memory: float
    link: float

    @classmethod
    def for_platform(cls, platform: str) -> Roofline:
        """Round figures of a common device: they set the balance of arithmetic and traffic, not absolute times."""
        table = {
            "cpu": cls(5e10, 2e10, 1e10),
            "gpu": cls(4e14, 3e12, 2e11),  # H100 SXM data sheet: dense bf16 with usual efficiency, HBM3, NVLink
            "tpu": cls(2e14, 8e11, 5e10),  # TPU v5e system documentation: 197 Tflop/s bf16, 819 GB/s
        }
        return table.get(platform, table["gpu"])


def count_flops(eqn: Eqn, n: int) -> float:
    """Floating-point operations of one evaluation for n examples."""
    match eqn.name:
        case "dot_general":
            (lhs_c, _), _ = eqn.params["dimension_numbers"]
            lhs = at_size(eqn.inputs[0].shape, n)
            return 2.0 * _elements(eqn.outputs[0], n) * math.prod(lhs[d] for d in lhs_c)
        case "conv_general_dilated":
            rhs = at_size(eqn.inputs[1].shape, n)
            spec = eqn.params["dimension_numbers"].rhs_spec
            return 2.0 * _elements(eqn.outputs[0], n) * math.prod(rhs) / rhs[spec[0]]
        case "scan":
            return at_size(eqn.params["length"], n) * _body_flops(eqn, n)
        case "while" | "cond":
            return _body_flops(eqn, n)
        case name if name in _LAYOUT:
            return 0.0
        case "random_bits":
            return 60.0 * _elements(eqn.outputs[0], n)
    return float(sum(_elements(v, n) for v in eqn.outputs))


def _body_flops(eqn: Eqn, n: int) -> float:
    bodies = [body for group in eqn.bodies.values() for body in group]
    return max(sum(count_flops(e, n) for e in body.eqns) for body in bodies)


def _elements(var: Var, n: int) -> int:
    return math.prod(var.shape_at(n))


def count_bytes(eqn: Eqn, n: int) -> float:
    """Bytes read and written by one evaluation for n examples, fusion of element-wise work assumed."""
    if eqn.name in _LAYOUT:
        return 0.0
    if eqn.name == "scan":
        (body,) = eqn.bodies["jaxpr"]
        return at_size(eqn.params["length"], n) * sum(count_bytes(e, n) for e in body.eqns)
    if eqn.name == "gather":  # reads the rows that it picks, not the table
        indices = [v for v in eqn.inputs[1:] if isinstance(v, Var)]
        return float(sum(v.bytes_at(n) for v in (*indices, *eqn.outputs, *eqn.outputs)))
    total = float(sum(v.bytes_at(n) for v in (*eqn.reads, *eqn.outputs)))
    return total if eqn.name in HEAVY else total * _FUSED_TRAFFIC


def estimate_seconds(eqn: Eqn, n: int, device: Roofline) -> float:
    return max(count_flops(eqn, n) / device.flops, count_bytes(eqn, n) / device.memory)
