"""The least bottleneck for which a search finds stages, by bisection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxpar.plan.planners.base import Stage
from jaxpar.plan.planners.stage_prices import ROUNDING, Pricing, StageSets

PRECISION = 1e-4  # of the bottleneck, relative


class StageSearch(Protocol):
    """Finds stages whose seconds, depth and devices are within limits."""

    pricing: Pricing

    def solve(self, limit: float, deepest: int | None = None) -> Sequence[Stage] | None:
        """Stages of at most `limit` seconds a micro-batch, at most `deepest` in a row; None if there are none."""


@dataclass(frozen=True)
class Found:
    """Stages for one micro-batch size.

    Args:
      pricing: by which they were found.
      stages: operators, and how they are run.
      seconds: of the slowest stage, for a micro-batch, by the planner's own measure.
    """

    pricing: Pricing
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def per_example(self) -> float:
        """Seconds of the slowest stage for an example."""
        return self.seconds / self.pricing.microbatch

    @property
    def devices(self) -> int:
        """How many it uses."""
        return sum(variant.devices for _, variant in self.stages)


def measure(pricing: Pricing, stages: Sequence[Stage]) -> Found:
    """With the seconds of the slowest."""
    table = pricing.price(StageSets.of(pricing.graph, [ops for ops, _ in stages]))
    rows = [pricing.variants.index(variant) for _, variant in stages]
    return Found(pricing, tuple(stages), float(table.seconds[rows, np.arange(len(stages))].max()))


def bisect_bottleneck(search: StageSearch, below: float = float("inf"), precision: float = PRECISION) -> Found | None:
    """The stages with the least bottleneck, to within `precision`; None if there are none below `below`.

    Args:
      search: for one micro-batch size.
      below: seconds per example that are to be beaten by at least `precision`.
      precision: relative.
    """
    pricing = search.pricing
    high = below * pricing.microbatch / (1 + precision)
    low = pricing.least_work / pricing.num_devices
    low = max(low, float(pricing.op_seconds.min(axis=1).max()))
    if high < low:
        return None
    best = _try(search, high)
    while best and best.seconds > low * (1 + precision):
        middle = (low * best.seconds) ** 0.5 if best.seconds > 1.5 * low else (low + best.seconds) / 2
        found = _try(search, middle)
        low, best = (low, found) if found else (middle, best)
    return best


def _try(search: StageSearch, limit: float) -> Found | None:
    stages = search.solve(limit * ROUNDING)
    return measure(search.pricing, stages) if stages else None
