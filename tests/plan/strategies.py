"""Random operator graphs, clusters and plans."""

import math
from dataclasses import replace

from hypothesis import strategies as st

from jaxpar.plan import (
    ClusterSpec,
    DeviceSpec,
    Level,
    LinkMatrix,
    Op,
    OpEdge,
    OpGraph,
    PipelinePlan,
    PlannedStage,
    TimeCurve,
)
from jaxpar.schedule import Link

seconds = st.floats(0, 10)
sizes = st.floats(0, 1e9)


@st.composite
def curves(draw) -> TimeCurve:
    examples = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=3)))
    return TimeCurve(tuple((n, draw(seconds)) for n in examples))


@st.composite
def op_graphs(draw, max_ops: int = 8, has_backward: bool = True) -> OpGraph:
    """Edges from lower to higher operators, which are then shuffled."""
    count = draw(st.integers(1, max_ops))
    backward = curves() if has_backward else st.just(TimeCurve.per_example(0.0))
    ops = [
        Op(
            f"net/layer_{i}",
            draw(curves()),
            draw(backward),
            draw(backward),
            parameter_bytes=draw(sizes),
            state_bytes=draw(st.none() | sizes),
            residual_bytes=draw(sizes),
            output_bytes=draw(sizes),
            kind=draw(st.sampled_from(["", "mlp", "attention"])),
        )
        for i in range(count)
    ]
    pairs = [(a, b) for b in range(count) for a in range(b)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    place = draw(st.permutations(range(count)))
    shuffled = [ops[place.index(i)] for i in range(count)]
    return OpGraph(tuple(shuffled), tuple(OpEdge(place[a], place[b], draw(sizes)) for a, b in edges))


links = st.builds(Link, st.floats(0, 1), st.floats(1, 1e9) | st.just(math.inf))
devices = st.builds(
    DeviceSpec,
    st.just("toy"),
    st.fixed_dictionaries({"float32": st.floats(1e9, 1e12)}, optional={"bfloat16": st.floats(1e9, 1e12)}),
    st.floats(1e6, 1e12),
    st.floats(1e6, 1e12),
)


@st.composite
def clusters(draw, num_devices: int) -> ClusterSpec:
    """Equal or two kinds of devices; links of a hierarchy, shared or not, or of a matrix."""
    toy = draw(devices)
    other = draw(devices.map(lambda d: DeviceSpec("other", d.flops, d.memory_bytes, d.memory_bandwidth)))
    kinds = tuple(draw(st.sampled_from([toy, other])) for _ in range(num_devices))
    if draw(st.booleans()):
        size = draw(st.integers(1, num_devices))
        outer = size * math.ceil(num_devices / size)
        levels = Level(size, draw(links)), Level(outer, draw(links), draw(st.booleans()))
        return ClusterSpec(kinds, levels)
    matrix = [[draw(links) for _ in range(num_devices)] for _ in range(num_devices)]
    matrix = [[matrix[min(a, b)][max(a, b)] for b in range(num_devices)] for a in range(num_devices)]
    latency, bandwidth = ([[getattr(x, what) for x in row] for row in matrix] for what in ("latency", "bandwidth"))
    return ClusterSpec(kinds, LinkMatrix.of(latency, bandwidth))


_SCHEDULES = [
    ("1f1b", {}),
    ("1f1b", {"extra": 0}),
    ("1f1b", {"extra": 1, "exchange": 1}),
    ("eager_1f1b", {}),
    ("gpipe", {}),
    ("kfkb", {"k": 2}),
    ("zb_h1", {}),
    ("zb_h2", {}),
]


@st.composite
def plans(draw, max_ops: int = 8, has_backward: bool = True) -> PipelinePlan:
    """Stages in a topological order, of 1 to 3 replicas each; some share their devices."""
    graph = draw(op_graphs(max_ops, has_backward))
    cuts = draw(st.sets(st.integers(1, graph.num_ops - 1), max_size=5)) if graph.num_ops > 1 else set()
    ends = [0, *sorted(cuts), graph.num_ops]
    groups: list[tuple[int, ...]] = []
    taken = 0
    for _ in ends[1:]:
        if groups and draw(st.integers(0, 4)) == 0:
            groups.append(draw(st.sampled_from(groups)))
            continue
        replicas = draw(st.integers(1, 3))
        groups.append(tuple(range(taken, taken + replicas)))
        taken += replicas
    stages = [
        PlannedStage(graph.order[a:b], devices, draw(st.booleans()))
        for a, b, devices in zip(ends, ends[1:], groups, strict=False)
    ]
    microbatch = math.lcm(*map(len, groups)) * draw(st.integers(1, 2))
    schedule, options = draw(st.sampled_from(_SCHEDULES))
    plan = PipelinePlan(
        graph, draw(clusters(taken)), tuple(stages), microbatch, draw(st.integers(1, 9)), schedule, options
    )
    return replace(plan, chain=draw(st.booleans()))
