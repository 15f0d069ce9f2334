"""GraphPipe's three models as graphs of layers, with times of a V100 in float32 from a roofline; no JAX.

The sizes are those of Jeon et al. 2025, https://arxiv.org/abs/2406.17145, appendix A.2:

    MMT          4 branches of 8 transformer layers (sequence 256, hidden 1024, 16 heads), joined by concatenation
    DLRM         7 branches of 4 dense layers of 4096 and 7 embedding branches, a table of 1M rows of 64 each, whose
                 bag of 100 rows is concatenated; joined, then 4 dense layers of 4096
    CANDLE-Uno   7 branches of 4 dense layers of 4096; joined, then 4 dense layers of 4096

One evaluation of a layer for n examples takes the longest of its arithmetic and of its bytes, weights included, at
80 % of the memory's bandwidth, and a launch per kernel. A matrix product reaches 90 % of the peak when its output is
large, and half of that when the output has as many elements as the multiprocessors hold at a time (`HALF`):

    seconds = 2 m k n / (0.9 peak) * (1 + HALF / (m n))

so that small micro-batches are slow. For a transformer layer, forwards and backwards, an example takes 13 % less in
a micro-batch of 4 than in one of 2, and 7 % less in one of 8 than in one of 4; the paper measured 10 % between 2 and 4
(section 7.5).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jaxpar.plan.op_graph import Op, OpGraph
from jaxpar.plan.time_curve import TimeCurve

PEAK = 15.7e12  # float32 flop/s, NVIDIA V100 SXM2 datasheet
BANDWIDTH = 900e9  # bytes/s, the same
ARITHMETIC, STREAM = 0.9, 0.8  # what large kernels reach of them
LAUNCH = 5e-6  # seconds a kernel
HALF = 80 * 3500.0  # assumed: 80 multiprocessors, each with 3,500 elements of the output under way
SIZES = tuple(float(2**i) for i in range(15))
FLOAT = 4


Product = tuple[float, float, float, float]  # how many, rows per example, inner size, columns; of its forward


@dataclass(frozen=True)
class Work:
    """Of one evaluation: its matrix products, what it moves for each example and whatever the size, and its kernels.

    `gradients` are the products that give weights' gradients: the examples' rows are summed over, and the output has
    the size of the weights.
    """

    products: tuple[Product, ...] = ()
    gradients: tuple[Product, ...] = ()
    bytes: float = 0.0
    fixed_bytes: float = 0.0
    kernels: int = 1

    def curve(self) -> TimeCurve:
        """Seconds for n examples."""
        return TimeCurve(tuple((n, self._seconds(n)) for n in SIZES))

    def _seconds(self, n: float) -> float:
        products = ((2 * count * inner, n * rows * columns) for count, rows, inner, columns in self.products)
        gradients = ((2 * count * n * rows, inner * columns) for count, rows, inner, columns in self.gradients)
        arithmetic = sum(inner * (outputs + HALF) for inner, outputs in (*products, *gradients)) / (PEAK * ARITHMETIC)
        memory = (n * self.bytes + self.fixed_bytes) / (BANDWIDTH * STREAM)
        return max(arithmetic, memory) + self.kernels * LAUNCH


def dense_layer(name: str, inputs: int, outputs: int) -> Op:
    """`relu(x @ w + b)`: each example reads a row and writes one; each evaluation reads the weights."""
    weights = FLOAT * (inputs * outputs + outputs)
    rows = FLOAT * (inputs + 3 * outputs)  # the relu reads and writes once more
    return Op(
        name,
        forward=Work(((1, 1, inputs, outputs),), (), rows, weights, kernels=2).curve(),
        input_backward=Work(((1, 1, outputs, inputs),), (), rows, weights, kernels=2).curve(),
        weight_backward=Work((), ((1, 1, inputs, outputs),), rows, 2 * weights).curve(),  # adds to the accumulator
        parameter_bytes=weights,
        residual_bytes=FLOAT * (inputs + outputs),
        output_bytes=FLOAT * outputs,
        kind=f"dense {inputs}x{outputs}",
    )


def transformer_layer(name: str, length: int, hidden: int, heads: int) -> Op:
    """Pre-norm attention and a feed-forward layer of 4 x hidden, without dropout and without flash attention."""
    weights = FLOAT * (12 * hidden**2 + 13 * hidden)
    token = FLOAT * hidden
    scores = FLOAT * heads * length**2
    linear = ((4, length, hidden, hidden), (1, length, hidden, 4 * hidden), (1, length, 4 * hidden, hidden))
    attention = ((1, heads * length, hidden / heads, length), (1, heads * length, length, hidden / heads))
    kept = length * 17 * token + scores  # inputs of 2 norms, 4 products and the gelu, q k v, the context; softmax
    moved = 2 * kept + 2 * scores
    return Op(
        name,
        forward=Work((*linear, *attention), (), moved, weights, kernels=20).curve(),
        input_backward=Work((*linear, *attention, *attention), (), moved, weights, kernels=20).curve(),
        weight_backward=Work((), linear, kept, 2 * weights, kernels=8).curve(),
        parameter_bytes=weights,
        residual_bytes=kept,
        output_bytes=length * token,
        kind="transformer layer",
    )


def embedding_bag(name: str, rows: int, width: int, bag: int) -> Op:
    """`bag` rows of a table, concatenated; the backward scatters into a dense accumulator. Plain SGD: no more state."""
    table = FLOAT * rows * width
    out = FLOAT * width * bag
    return Op(
        name,
        forward=Work((), (), 2 * out + FLOAT * bag).curve(),
        weight_backward=Work((), (), 3 * out + FLOAT * bag).curve(),
        parameter_bytes=table,
        state_bytes=table,
        residual_bytes=FLOAT * bag,
        output_bytes=out,
        kind=f"bag {rows}x{width}x{bag}",
    )


def concatenation(name: str, width: int, rows: int = 1) -> Op:
    """Copies its inputs side by side."""
    size = FLOAT * width * rows
    copy = Work((), (), 2 * size).curve()
    return Op(name, forward=copy, input_backward=copy, output_bytes=size, kind=f"concatenate {width}x{rows}")


def mmt(branches: int = 4, layers: int = 8, length: int = 256, hidden: int = 1024, heads: int = 16) -> OpGraph:
    """The multi-modal transformer, as it ends: with the concatenation."""
    ops, edges, ends = [], [], []
    for b in range(branches):
        names = [f"branch{b}.layer{i}" for i in range(layers)]
        ops += [transformer_layer(name, length, hidden, heads) for name in names]
        edges += list(pairwise(names))
        ends.append(names[-1])
    ops.append(concatenation("join", branches * hidden, length))
    return OpGraph.build(ops, edges + [(end, "join") for end in ends])


def candle_uno(branches: int = 7, depth: int = 4, width: int = 4096) -> OpGraph:
    """Branches of dense layers, joined, then dense layers."""
    return _join_branches(branches, 0, depth, width)


def dlrm(dense: int = 7, sparse: int = 7, depth: int = 4, width: int = 4096) -> OpGraph:
    """As `candle_uno`, with embedding branches beside the dense ones."""
    return _join_branches(dense, sparse, depth, width)


def _join_branches(dense: int, sparse: int, depth: int, width: int) -> OpGraph:
    ops, edges, ends, joined = [], [], [], 0
    for b in range(dense):
        names = [f"dense{b}.layer{i}" for i in range(depth)]
        ops += [dense_layer(name, width, width) for name in names]
        edges += list(pairwise(names))
        ends.append(names[-1])
        joined += width
    for b in range(sparse):
        bag = embedding_bag(f"sparse{b}.bag", 1_000_000, 64, 100)
        ops.append(bag)
        ends.append(bag.name)
        joined += int(bag.output_bytes / FLOAT)
    ops.append(concatenation("join", joined))
    edges += [(end, "join") for end in ends]
    top = [f"top.layer{i}" for i in range(depth)]
    ops += [dense_layer(name, joined if i == 0 else width, width) for i, name in enumerate(top)]
    edges += list(pairwise(["join", *top]))
    return OpGraph.build(ops, edges)


def layered(num_ops: int, layers: int = 256, branches: int = 4, sections: int = 4, seed: int = 0) -> OpGraph:
    """Sections one after the other, each of uneven branches side by side, joined; for how search time grows.

    All operators together take as long and hold as much as so many transformer layers, however many they are; no two
    are alike, so that nothing is gained by recognising equal branches.
    """
    rng = random.Random(seed)
    layer = transformer_layer("layer", 256, 1024, 16)
    length = max(1, (num_ops - sections) // (branches * sections))
    share = layers / (branches * length * sections)
    ops: list[Op] = []
    edges: list[tuple[str, str]] = []
    last = ""
    for section in range(sections):
        ends = []
        for branch in range(branches):
            names = [f"section{section}.branch{branch}.op{i}" for i in range(length)]
            ops += [_scale(layer, name, share * rng.uniform(0.5, 1.5)) for name in names]
            edges += list(pairwise([last, *names] if last else names))
            ends.append(names[-1])
        last = f"section{section}.join"
        ops.append(concatenation(last, 1024, 256))
        edges += [(end, last) for end in ends]
    return OpGraph.build(ops, edges)


def _scale(op: Op, name: str, factor: float) -> Op:
    return Op(
        name,
        forward=op.forward.scaled(factor),
        input_backward=op.input_backward.scaled(factor),
        weight_backward=op.weight_backward.scaled(factor),
        parameter_bytes=op.parameter_bytes * factor,
        residual_bytes=op.residual_bytes * factor,
        output_bytes=op.output_bytes,
        kind=name,
    )


MODELS: dict[str, Callable[[], OpGraph]] = {"MMT": mmt, "DLRM": dlrm, "CANDLE-Uno": candle_uno}
