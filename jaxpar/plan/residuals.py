"""What the forward keeps for the backward: the least bytes from which the rest can be recomputed element by element.

A minimum cut (as in the min-cut recomputation of PyTorch's AOTAutograd; Ford and Fulkerson 1956): storing a value
costs its bytes; a value made by an element-wise operation needs not be stored where the operation's inputs are at
hand. Products, reductions, draws and values from other stages are never made twice. Among the least cuts the one
nearest to the backward is taken: it recomputes least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from jaxpar.plan.flow import CHEAP
from jaxpar.trace import Eqn, Var

RECOMPUTED = CHEAP | frozenset(
    """
    acos asin atan atan2 cbrt ceil cos cosh div erf erf_inv erfc exp exp2 expm1 floor log log1p logistic nextafter
    one_minus_square pow reciprocal rem round rsqrt sin sinh split sqrt tan tanh unstack bitcast_convert_type
    """.split()
)
_INFINITE = np.iinfo(np.int32).max // 4


def choose_residuals(
    wanted: Iterable[Var],
    producer_of: Callable[[Var], Eqn | None],
    is_stored_value: Callable[[Var], bool],
    size: Callable[[Var], int],
) -> tuple[set[Var], set[Eqn]]:
    """The values to keep, and the equations to repeat, so that all of `wanted` is at hand.

    Args:
        wanted: forward values that the backward reads.
        producer_of: the equation that may be repeated to make a value, or None.
        is_stored_value: whether an input of a repeated equation has to be kept or recomputed, rather than being at
        hand anyway. size: bytes of a value.
    """
    values = _reach_back(wanted, producer_of, is_stored_value)
    number = {v: i for i, v in enumerate(values)}
    unit = max(1, sum(map(size, values)) // (_INFINITE // 2) + 1)
    source, sink = 2 * len(values), 2 * len(values) + 1
    edges: dict[tuple[int, int], int] = {}
    for v, i in number.items():
        edges[2 * i, 2 * i + 1] = -(-size(v) // unit)
        producer = producer_of(v)
        inputs = [u for u in producer.reads if is_stored_value(u)] if producer is not None else []
        if producer is None:
            edges[source, 2 * i] = _INFINITE
        for u in inputs:
            edges[2 * number[u] + 1, 2 * i] = _INFINITE
    for v in wanted:
        edges[2 * number[v] + 1, sink] = _INFINITE
    needed = _sink_side(edges, source, sink)
    kept = {v for v, i in number.items() if 2 * i + 1 in needed and 2 * i not in needed}
    return kept, _repeat(wanted, kept, producer_of, is_stored_value)


def _reach_back(
    wanted: Iterable[Var], producer_of: Callable[[Var], Eqn | None], is_stored_value: Callable[[Var], bool]
) -> dict[Var, None]:
    values: dict[Var, None] = {}
    stack = list(wanted)
    while stack:
        v = stack.pop()
        if v in values:
            continue
        values[v] = None
        if (producer := producer_of(v)) is not None:
            stack.extend(u for u in producer.reads if is_stored_value(u))
    return values


def _sink_side(edges: dict[tuple[int, int], int], source: int, sink: int) -> set[int]:
    """The nodes from which the sink can still be reached once the flow is at its maximum."""
    (rows, columns), capacity = zip(*edges, strict=True), list(edges.values())
    size = sink + 1
    graph = csr_matrix((np.array(capacity, np.int32), (rows, columns)), shape=(size, size))
    flow = maximum_flow(graph, source, sink).flow
    residual = (graph - flow).T.tocsr()  # reversed, so that a walk from the sink finds who reaches it
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    return set(breadth_first_order(residual, sink, return_predecessors=False).tolist())


def _repeat(
    wanted: Iterable[Var],
    kept: set[Var],
    producer_of: Callable[[Var], Eqn | None],
    is_stored_value: Callable[[Var], bool],
) -> set[Eqn]:
    eqns: set[Eqn] = set()
    stack = [v for v in wanted if v not in kept]
    while stack:
        producer = producer_of(stack.pop())
        assert producer is not None
        if producer not in eqns:
            eqns.add(producer)
            stack.extend(u for u in producer.reads if is_stored_value(u) and u not in kept)
    return eqns
