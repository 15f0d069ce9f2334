"""Zero-bubble orders for measured times under a memory limit: what the paper's ZB-1p and ZB-2p are.

Qi et al. 2024, Zero Bubble Pipeline Parallelism, https://arxiv.org/abs/2401.10241, section 3, finds them by a heuristic
and an integer programme. Here it is a search over two numbers; `benchmarks.measured` prints how close it comes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from jaxpar.schedule import Action, StageCosts, StageDag, Timetable, simulate
from jaxpar.schedule.action import Kind

SLOPES = (1.0, 2.0, 2.125, 2.25)
SHARES = (0.5, 0.6, 0.75)


def search_zero_bubble(costs: StageCosts, num_microbatches: int, limit: float) -> Timetable:
    """The timetable whose ranks have the shortest span, of a few that hold at most `limit`.

    Rank r of p does `1 + floor(slope (p - 1 - r))` forwards, or as many as fit, then I and F in turn. A W is done when
    the next F needs its memory, and from the last F on after each I. The slopes tried run from 1F1B's warm-up to that
    of ZB-H2 and a little beyond, as far as the limit goes. Doing W's as late as the memory allows is not always best:
    W's are also spread by counting each as holding a larger share of its residuals than it does.

    Args:
      costs: of a chain, one stage per rank, with `residual_bytes` and `weight_residual_bytes`.
      num_microbatches: M.
      limit: bytes of residuals that a rank may hold.
    """
    reach = len(costs.forward) - 1
    slopes = [slope for slope in SLOPES if math.floor(slope * reach) * costs.residual_bytes[0] <= limit]
    tried = [
        make_zero_bubble(_count_share(costs, share), num_microbatches, limit, slope)
        for slope in slopes
        for share in SHARES
    ]
    return min(tried, key=lambda timetable: max(simulate(timetable, costs, mode="free").span))


def make_zero_bubble(costs: StageCosts, num_microbatches: int, limit: float, slope: float) -> Timetable:
    """One candidate of `search_zero_bubble`."""
    dag = StageDag.chain(len(costs.forward))
    warm_ups = [1 + math.floor(slope * (dag.num_ranks - 1 - rank)) for rank in range(dag.num_ranks)]
    orders = [_order_rank(rank, costs, num_microbatches, limit, warm_up) for rank, warm_up in enumerate(warm_ups)]
    return Timetable.from_orders(f"zero bubble, slope {slope}", dag, num_microbatches, orders, exchange=1)


def _count_share(costs: StageCosts, share: float) -> StageCosts:
    """The costs with what W needs raised to at least that share of the residuals."""
    kept = costs.weight_residual_bytes or costs.residual_bytes
    raised = (max(part, round(share * whole)) for part, whole in zip(kept, costs.residual_bytes, strict=True))
    return replace(costs, weight_residual_bytes=tuple(raised))


def _order_rank(stage: int, costs: StageCosts, num_microbatches: int, limit: float, warm_up: int) -> list[Action]:
    order: list[Action] = []
    done = Counter[Kind]()
    held, whole = 0.0, costs.residual_bytes[stage]

    def do(kind: Kind) -> None:
        nonlocal held
        order.append(action := Action(kind, stage, done[kind]))
        done[kind] += 1
        held += whole if kind == "F" else -costs.released_by(action)

    while done["F"] < min(warm_up, num_microbatches) and held + whole <= limit:
        do("F")
    while done["I"] < num_microbatches:
        do("I")
        if done["F"] == num_microbatches:
            do("W")
            continue
        while held + whole > limit:
            do("W")
        do("F")
    while done["W"] < num_microbatches:
        do("W")
    return order
