"""Random graphs of operators and clusters for the planners' tests: small, uneven, and the same for the same seed.

Times are some milliseconds an example, bytes some megabytes; `random_cluster` has devices whose memory holds about what
`tightness` says, so that some plans fit and others don't.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace

from jaxpar.plan.cluster import ClusterSpec, DeviceSpec
from jaxpar.plan.op_graph import Op, OpEdge, OpGraph
from jaxpar.plan.time_curve import TimeCurve
from jaxpar.schedule import Link

Edges = set[tuple[int, int]]


def random_series_parallel(seed: int, num_ops: int, *, equal_branches: float = 0.3, overhead: bool = True) -> OpGraph:
    """A series-parallel graph: blocks in series, joined by all of their ends or through one operator, and in parallel.

    Args:
      seed: of everything random in it.
      num_ops: operators in it, exactly.
      equal_branches: how probable it is that parallel branches are copies of one branch, costs included.
      overhead: give some operators a time that doesn't shrink with the batch, so that micro-batch sizes matter.
    """
    rng = random.Random(f"series-parallel {seed} {num_ops}")
    ops: list[Op] = []
    edges: Edges = set()
    _grow(rng, ops, edges, num_ops, equal_branches, overhead)
    return _build(rng, ops, edges)


def random_dag(seed: int, num_ops: int, *, density: float | None = None, overhead: bool = True) -> OpGraph:
    """A connected graph with edges between random pairs, most of them not series-parallel.

    Args:
      seed: of everything random in it.
      num_ops: operators in it.
      density: how probable each pair's edge is; random by default, between a tree's and a half.
      overhead: as in `random_series_parallel`.
    """
    rng = random.Random(f"dag {seed} {num_ops}")
    density = rng.uniform(0, 0.5) if density is None else density
    ops = [_random_op(rng, f"op{i}", overhead) for i in range(num_ops)]
    pairs = [(i, j) for j in range(num_ops) for i in range(j)]
    edges = {pair for pair in pairs if rng.random() < density}
    for j in range(1, num_ops):  # at least one input each, so that it holds together
        if not any((i, j) in edges for i in range(j)):
            edges.add((rng.randrange(j), j))
    return _build(rng, ops, edges)


def random_cluster(seed: int, num_devices: int, graph: OpGraph | None = None, *, tightness: float = 0.5) -> ClusterSpec:
    """Equal devices on one random link.

    Args:
      seed: of the link and the memory.
      num_devices: devices in it.
      graph: what is to be trained; None for memory without limit.
      tightness: memory of a device such that all of them together hold the graph's state and gradients and one
        example's residuals `1 / tightness` to `2 / tightness` times.
    """
    rng = random.Random(f"cluster {seed} {num_devices}")
    memory = math.inf
    if graph is not None:
        whole = sum(_static_bytes(op) + op.residual_bytes for op in graph.ops)
        largest = max(_static_bytes(op) + op.residual_bytes for op in graph.ops)
        memory = max(whole / num_devices, largest) / tightness * rng.uniform(1, 2)
    device = DeviceSpec("random", {"float32": 1e13}, memory_bytes=memory, memory_bandwidth=1e12, source="made up")
    link = Link(latency=rng.choice((0.0, 1e-5)), bandwidth=rng.choice((1e10, 1e11, 1e12)))
    return ClusterSpec.homogeneous(device, num_devices, link)


def _static_bytes(op: Op) -> float:
    state = 3 * op.parameter_bytes if op.state_bytes is None else op.state_bytes
    return state + (op.parameter_bytes if op.gradient_bytes is None else op.gradient_bytes)


def _random_op(rng: random.Random, name: str, overhead: bool) -> Op:
    seconds = rng.choice((1e-3, 2e-3, rng.uniform(1e-4, 5e-3)))
    fixed = rng.choice((0.0, seconds)) if overhead else 0.0
    curve = TimeCurve(tuple((float(n), fixed + seconds * n) for n in (1, 64)))
    return Op(
        name,
        forward=curve,
        input_backward=curve.scaled(rng.choice((1.0, 0.5))),
        weight_backward=curve.scaled(rng.choice((1.0, 0.0))),
        parameter_bytes=rng.choice((0.0, 1e6, rng.uniform(1e6, 2e7))),
        residual_bytes=rng.choice((1e6, rng.uniform(1e5, 1e7))),
        output_bytes=rng.choice((1e5, rng.uniform(1e4, 1e6))),
        kind=name,
    )


def _build(rng: random.Random, ops: list[Op], edges: Edges) -> OpGraph:
    """The graph with its operators listed in a random order, so that nothing can rely on one."""
    order = list(range(len(ops)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    listed = sorted((place[i], place[j], ops[i].output_bytes) for i, j in edges)
    return OpGraph(tuple(ops[i] for i in order), tuple(OpEdge(*edge) for edge in listed))


def _grow(
    rng: random.Random, ops: list[Op], edges: Edges, count: int, equal: float, overhead: bool
) -> tuple[list[int], list[int]]:
    """Append a block of `count` operators; give its sources and its sinks."""
    if count == 1:
        ops.append(_random_op(rng, f"op{len(ops)}", overhead))
        return [len(ops) - 1], [len(ops) - 1]
    grow = lambda n: _grow(rng, ops, edges, n, equal, overhead)
    if rng.random() < 0.5 or count == 2:
        return _grow_series(rng, edges, count, grow)
    return _grow_parallel(rng, ops, edges, count, equal, grow)


def _grow_series(
    rng: random.Random, edges: Edges, count: int, grow: Callable[[int], tuple[list[int], list[int]]]
) -> tuple[list[int], list[int]]:
    first = rng.randrange(1, count)
    sources, ends = grow(first)
    middle = count - first
    if middle > 1 and len(ends) > 1 and rng.random() < 0.7:  # join the branches, as networks do
        starts, joint = grow(1)
        edges.update((i, j) for i in ends for j in starts)
        ends, middle = joint, middle - 1
    starts, sinks = grow(middle)
    edges.update((i, j) for i in ends for j in starts)
    return sources, sinks


def _grow_parallel(
    rng: random.Random,
    ops: list[Op],
    edges: Edges,
    count: int,
    equal: float,
    grow: Callable[[int], tuple[list[int], list[int]]],
) -> tuple[list[int], list[int]]:
    branches = rng.randrange(2, min(count, 4) + 1)
    sources, sinks = list[int](), list[int]()
    if count % branches == 0 and rng.random() < equal:
        begin = len(ops)
        sources, sinks = grow(count // branches)
        size = len(ops) - begin
        inner = [(i, j) for i, j in edges if i >= begin]
        one = (list(sources), list(sinks))
        for copy in range(1, branches):
            shift = copy * size
            ops.extend(replace(op, name=f"op{begin + shift + i}") for i, op in enumerate(ops[begin : begin + size]))
            edges.update((i + shift, j + shift) for i, j in inner)
            sources += [i + shift for i in one[0]]
            sinks += [i + shift for i in one[1]]
        return sources, sinks
    cuts = sorted(rng.sample(range(1, count), branches - 1))
    for size in (b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)):
        more_sources, more_sinks = grow(size)
        sources += more_sources
        sinks += more_sinks
    return sources, sinks
