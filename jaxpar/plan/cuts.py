"""Where the forward pass may be cut, what each cut costs, and the cuts that balance the stages best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxpar.errors import PlanError
from jaxpar.plan.costs import HEAVY, Roofline, estimate_seconds
from jaxpar.plan.flow import Flow
from jaxpar.plan.partition import partition_sequence
from jaxpar.trace import Eqn, Var

_MAX_BLOCKS = 400
_MODULE_PENALTY = 0.01  # of the mean stage time, for each level of modules that a cut goes through
_FUSION_PENALTY = 0.002  # likewise, for a cut between a product and element-wise work on its result
_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class ForwardOrder:
    """The forward equations in an order in which contiguous runs are stages, with costs per equation."""

    eqns: tuple[Eqn, ...]
    seconds: np.ndarray  # of each equation and of the backward equations that belong to it
    crossing: np.ndarray  # crossing[i]: bytes alive between equations i-1 and i


def order_forward(flow: Flow, order: Sequence[int], microbatch: int, device: Roofline) -> ForwardOrder:
    seconds = np.array([estimate_seconds(e, microbatch, device) for e in flow.forward])
    for eqn, anchor in flow.anchor.items():
        seconds[anchor] += estimate_seconds(eqn, microbatch, device)
    eqns = tuple(flow.forward[i] for i in order)
    return ForwardOrder(eqns, seconds[list(order)], _crossing_bytes(eqns, microbatch))


def _crossing_bytes(eqns: Sequence[Eqn], microbatch: int) -> np.ndarray:
    made: dict[Var, int] = {}
    last: dict[Var, int] = {}
    for i, eqn in enumerate(eqns):
        for v in eqn.reads:
            if v in made:
                last[v] = i
        for v in eqn.outputs:
            made[v] = i
    change = np.zeros(len(eqns) + 2)
    for v, end in last.items():
        change[made[v] + 1] += v.bytes_at(microbatch)
        change[end + 1] -= v.bytes_at(microbatch)
    return np.cumsum(change)[: len(eqns)]


def program_order(flow: Flow) -> list[int]:
    return list(range(len(flow.forward)))


def depth_first_order(flow: Flow) -> list[int]:
    """Each branch of the graph in one piece: an equation comes as late as the first one that needs it allows."""
    producer = {v: i for i, eqn in enumerate(flow.forward) for v in eqn.outputs}
    read = {v for eqn in flow.forward for v in eqn.reads}
    order: list[int] = []
    done: set[int] = set()
    for sink, eqn in enumerate(flow.forward):
        if not read.isdisjoint(eqn.outputs):
            continue
        stack = [sink]
        while stack:
            i = stack[-1]
            waiting = [producer[v] for v in flow.forward[i].reads if v in producer and producer[v] not in done]
            if waiting:
                stack.append(waiting[0])
                continue
            stack.pop()
            if i not in done:
                done.add(i)
                order.append(i)
    return order


def balance_stages(seq: ForwardOrder, replicas: Sequence[int], device: Roofline) -> tuple[int, ...]:
    """The starts of the stages, as indices into the sequence; a stage with d replicas gets d times the work."""
    num_stages = len(replicas)
    candidates = _cut_candidates(seq, num_stages)
    if len(candidates) < num_stages:
        raise PlanError(
            f"{num_stages} stages were asked for, but the step's forward pass has only {len(candidates)} "
            f"place{'s' * (len(candidates) != 1)} where a stage can begin. Use a mesh with at most {len(candidates)} "
            "stages, or a deeper model."
        )
    bounds = np.append(candidates, len(seq.eqns))
    prefix = np.concatenate([[0.0], np.cumsum(seq.seconds)])
    times = np.diff(prefix[bounds])
    mean = prefix[-1] / sum(replicas)
    cut_costs = [seq.crossing[i] / device.link + mean * _clumsiness(seq, i) for i in candidates]
    starts = partition_sequence(list(times), cut_costs, num_stages, _TOLERANCE, replicas)
    return tuple(int(candidates[i]) for i in starts)


def _cut_candidates(seq: ForwardOrder, num_stages: int) -> np.ndarray:
    """Blocks begin where few bytes are alive: at the local minima; everywhere if these are too few."""
    n = len(seq.eqns)
    crossing = seq.crossing
    minima = [i for i in range(1, n) if crossing[i] <= min(crossing[max(1, i - 2) : i + 3])]
    if len(minima) + 1 < min(4 * num_stages, n):
        minima = list(range(1, n))
    if len(minima) > _MAX_BLOCKS:
        narrowest = np.argsort(crossing[minima], kind="stable")[:_MAX_BLOCKS]
        minima = sorted(np.asarray(minima)[narrowest].tolist())
    return np.array([0, *minima], dtype=int)


def _clumsiness(seq: ForwardOrder, i: int) -> float:
    """What speaks against a cut before equation i besides its bytes, as a share of a stage's time."""
    return _MODULE_PENALTY * _levels_cut(seq, i) + _FUSION_PENALTY * (seq.eqns[i].name not in HEAVY)


def _levels_cut(seq: ForwardOrder, i: int) -> int:
    """How many modules a cut before equation i goes through."""
    if i == 0:
        return 0
    before, after = seq.eqns[i - 1].path, seq.eqns[i].path
    return next(
        (k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def cut_at_modules(seq: ForwardOrder, names: Sequence[str]) -> tuple[int, ...]:
    """Stages that begin at the first equation of each named module.

    A name is a module's own (`block_3`) or a part of its path (`GPT/block_3`).
    """
    starts = [0]
    unknown = []
    for name in names:
        wanted = tuple(name.strip("/").split("/"))
        start = next((i for i, eqn in enumerate(seq.eqns) if _contains(eqn.path, wanted)), None)
        if start is None:
            unknown.append(name)
        else:
            starts.append(start)
    if unknown:
        known = list(dict.fromkeys("/".join(eqn.path[:3]) for eqn in seq.eqns if eqn.path))
        raise PlanError(
            f"no equation of the forward pass belongs to {', '.join(map(repr, unknown))}. The step's modules are: "
            f"{', '.join(known[:40]) or 'none: name parts of the model with jax.named_scope'}."
        )
    if any(a >= b for a, b in pairwise(starts)):
        order = [name for _, name in sorted(zip(starts[1:], names, strict=True))]
        raise PlanError(
            f"the cuts {list(names)} don't split the forward pass into one stage each: in the program's order they "
            f"begin at {dict(zip(names, starts[1:], strict=True))}. Give each its own place, in this order: {order}; "
            "the first module can't be a cut, since the first stage begins there."
        )
    return tuple(starts)


def _contains(path: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return any(path[i : i + len(wanted)] == wanted for i in range(len(path) - len(wanted) + 1))
