"""Graphs with the shapes of GraphPipe's models, for tests of structure and speed; the numbers are made up."""

from itertools import pairwise

from jaxpar.plan import Op, OpGraph, TimeCurve


def join_branches(branches: int, depth: int, top: int, fixed: float = 2e-4, parameter_bytes: float = 4e6) -> OpGraph:
    """Equal branches of equal layers, joined, then more layers: CANDLE-Uno's shape; MMT's without a top."""
    curve = TimeCurve(((1.0, fixed + 1e-5), (64.0, fixed + 64e-5)))

    def layer(name: str) -> Op:
        costs = {"parameter_bytes": parameter_bytes, "residual_bytes": 2e5, "output_bytes": 1e5}
        return Op(name, curve, curve, curve, kind="layer", **costs)

    names = [[f"branch{b}.{i}" for i in range(depth)] for b in range(branches)]
    above = [f"top.{i}" for i in range(top)]
    ops = [layer(name) for branch in names for name in branch]
    ops += [Op("join", 1e-6, 1e-6, output_bytes=1e5, kind="join"), *map(layer, above)]
    edges = [pair for branch in names for pair in pairwise(branch)]
    edges += [(branch[-1], "join") for branch in names] + list(pairwise(["join", *above]))
    return OpGraph.build(ops, edges)
