"""The chain of stages with the least bottleneck: a dynamic programme over cuts, stages and devices.

PipeDream's programme (Narayanan et al., SOSP 2019, https://doi.org/10.1145/3341301.3359646, section 3.1) asks for the
least bottleneck with a given number of devices. Here it is turned round, with the same result: for a bottleneck T, the
least number of devices, and then the least T by bisection. A synchronous 1F1B keeps as many micro-batches in flight as
there are stages from this one to the last, so the number of stages is in the state:

    h_T[0, last] = 0                                        all else infinite
    h_T[s, cut]  = min over stages p from `cut`, variants v of devices(v) + h_T[s - 1, end(p)]
                   where seconds[v, p] <= T and max_depth[v, p] >= s
    T*           = least T with  min_s h_T[s, empty] <= D

It is vectorised over the stages, which are the pairs of cuts. Those that can be in no chain of D devices, as what is
before and after needs too many by its work alone, are left out for each T.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxpar.plan.down_sets import members_of
from jaxpar.plan.planners.chain_stages import NEVER, StageChoices, Variant

PRECISION = 1e-5  # of the bottleneck, relative
SLACKS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
_FAR = np.int16(NEVER)


@dataclass(frozen=True)
class Chain:
    """Stages in order: the operators of each, and how it is run.

    `bottleneck` is the seconds of the slowest one for a micro-batch, by the planner's measure.
    """

    stages: tuple[tuple[tuple[int, ...], Variant], ...]
    bottleneck: float


def search_chains(choices: StageChoices, num_devices: int, slacks: Sequence[float] = SLACKS) -> list[Chain]:
    """Chains with the least bottleneck, and with fewer stages for a bottleneck up to so many times as much.

    Fewer stages fill and drain faster, which the bottleneck doesn't tell. For each of `slacks`, the chain has as few
    stages as there can be within that bottleneck; those that come out the same are given once. None if nothing fits.
    """
    deepest = min(num_devices, len(choices.spans.graph.ops))
    least = _bisect_bottleneck(choices, num_devices, deepest)
    if least is None:
        return []
    found: dict[tuple, Chain] = {}
    for slack in slacks:
        table = _Table.make(choices, least * slack, num_devices, deepest)
        chain = table.read_chain(table.first_depth)
        found.setdefault(chain.stages, chain)
    return list(found.values())


def _bisect_bottleneck(choices: StageChoices, num_devices: int, deepest: int) -> float | None:
    """The least bottleneck, up to `PRECISION`; None if no chain fits into memory."""
    usable = choices.max_depth > 0
    if not usable.any():
        return None
    high = float(choices.seconds[usable].max())
    if not _Table.make(choices, high, num_devices, deepest).first_depth:
        return None
    low = max(float(choices.work[-1]) / num_devices, high * 1e-9)  # as if all devices were always busy
    high = max(high, low)
    while high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5 if high > 2 * low else (low + high) / 2
        table = _Table.make(choices, middle, num_devices, deepest)
        if table.first_depth:
            high = min(middle, table.read_chain(table.first_depth).bottleneck)
            choices = _narrow(choices, table.stages)  # what can't be used at this bottleneck can't at a smaller one
        else:
            low = middle
    return high


def _narrow(choices: StageChoices, stages: np.ndarray) -> StageChoices:
    spans = replace(choices.spans, start=choices.spans.start[stages], end=choices.spans.end[stages])
    return replace(choices, spans=spans, seconds=choices.seconds[:, stages], max_depth=choices.max_depth[:, stages])


@dataclass(frozen=True)
class _Table:
    """h_T for one T, with the stages that may be used."""

    choices: StageChoices
    limit: float
    stages: np.ndarray  # int[K]: indices of the stages that some chain may use
    depth: np.ndarray  # int[V, K]: max_depth of these; 0 if the variant can't be used
    devices: tuple[np.ndarray, ...]  # h[s], int[cuts]
    num_devices: int

    @classmethod
    def make(cls, choices: StageChoices, limit: float, num_devices: int, deepest: int) -> "_Table":
        stages, depth = _usable_stages(choices, limit, num_devices)
        start, end = choices.spans.start[stages], choices.spans.end[stages]
        firsts = np.flatnonzero(np.diff(start, prepend=-1)) if len(start) else np.zeros(0, int)
        h = np.full(len(choices.spans.cuts), _FAR)
        h[-1] = 0
        rows = [h]
        for s in range(1, deepest + 1):
            if not len(stages):
                break
            reached = _needed_devices(choices.variants, depth, s) + h[end]
            new = h.copy()
            cuts = start[firsts]
            new[cuts] = np.minimum(h[cuts], np.minimum.reduceat(reached, firsts))
            if (new == h).all():  # what didn't help at this depth helps at none
                break
            rows.append(new)
            h = new
        return cls(choices, limit, stages, depth, tuple(rows), num_devices)

    @property
    def first_depth(self) -> int:
        """The least number of stages with which the devices are enough; 0 if none."""
        return next((s for s, h in enumerate(self.devices) if h[0] <= self.num_devices), 0)

    def read_chain(self, depth: int) -> Chain:
        """A chain of at most `depth` stages: of those with the fewest devices, each stage the shortest in time."""
        return Chain(*_collect(self._walk(depth)))

    def _walk(self, depth: int) -> Iterator[tuple[tuple[int, ...], Variant, float]]:
        spans = self.choices.spans
        start, end = spans.start[self.stages], spans.end[self.stages]
        cut, last = 0, len(spans.cuts) - 1
        for s in range(depth, 0, -1):
            if cut == last:
                return
            if self.devices[s][cut] == self.devices[s - 1][cut]:  # it takes no more stages
                continue
            mine = slice(*np.searchsorted(start, (cut, cut + 1)))
            totals = np.array([v.devices for v in self.choices.variants])[:, None] + self.devices[s - 1][end[mine]]
            fits = (self.depth[:, mine] >= s) & (totals == self.devices[s][cut])
            seconds = np.where(fits, self.choices.seconds[:, self.stages[mine]], np.inf)
            variant, place = np.unravel_index(np.argmin(seconds), seconds.shape)
            into = int(end[mine][place])
            members = members_of(spans.cuts[into] & ~spans.cuts[cut])
            yield members, self.choices.variants[variant], float(seconds[variant, place])
            cut = into


def _collect(
    walk: Iterator[tuple[tuple[int, ...], Variant, float]],
) -> tuple[tuple[tuple[tuple[int, ...], Variant], ...], float]:
    steps = list(walk)
    return tuple((ops, variant) for ops, variant, _ in steps), max(seconds for *_, seconds in steps)


def _usable_stages(choices: StageChoices, limit: float, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """The stages that take at most `limit` in some variant and leave enough devices for the rest, and their depths."""
    spans, work = choices.spans, choices.work
    others = (work[spans.start] + work[-1] - work[spans.end]) / limit
    depth = np.empty_like(choices.max_depth)
    for v, variant in enumerate(choices.variants):
        usable = (choices.seconds[v] <= limit) & (variant.devices + others <= num_devices * (1 + 1e-9))
        np.multiply(choices.max_depth[v], usable, out=depth[v])
    stages = np.flatnonzero(depth.any(axis=0))
    return stages, depth[:, stages]


def _needed_devices(variants: Sequence[Variant], depth: np.ndarray, s: int) -> np.ndarray:
    """int[K]: the fewest devices with which each stage can be the s-th from the end."""
    needed = np.full(depth.shape[1], _FAR)
    for variant, reach in zip(reversed(variants), depth[::-1], strict=True):
        needed[reach >= s] = variant.devices
    return needed
