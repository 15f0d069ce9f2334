"""Seconds as a function of the number of examples: small batches don't use a device to the full."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from jaxpar.errors import PlanError


@dataclass(frozen=True)
class TimeCurve:
    """Seconds of one evaluation for n examples at once, piecewise linear through measured or computed points.

    With points `(n_0, t_0) ... (n_k, t_k)`:

        curve(n) = t_0                  n <= n_0: a smaller batch takes as long
                 = linear between points
                 = t_k * n / n_k        n >= n_k: in proportion

    Args:
      points: (examples, seconds), the sizes increasing and more than 0, the seconds at least 0 and finite.

    Raises:
      PlanError: names each point that is not so.

    >>> curve = TimeCurve(((1, 2e-3), (8, 4e-3)))
    >>> curve(0.5), curve(8), curve(16)
    (0.002, 0.004, 0.008)
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((float(n), float(seconds)) for n, seconds in self.points)
        problems = [] if points else ["it has no points"]
        problems += [f"{n:g} examples" for n, _ in points if not 0 < n < math.inf]
        problems += [f"{seconds:g} s for {n:g} examples" for n, seconds in points if not 0 <= seconds < math.inf]
        problems += [f"{b:g} examples after {a:g}" for (a, _), (b, _) in pairwise(points) if not a < b]
        if problems:
            raise PlanError(
                "a time curve has finite seconds of at least 0 for increasing numbers of examples above 0, "
                f"got {', '.join(problems)}"
            )
        object.__setattr__(self, "points", points)

    @classmethod
    def per_example(cls, seconds: float) -> TimeCurve:
        """In proportion to the examples, with no fewer than one.

        >>> TimeCurve.per_example(0.5)(4)
        2.0
        """
        return cls(((1.0, seconds),))

    @classmethod
    def sum(cls, curves: Iterable[TimeCurve]) -> TimeCurve:
        """The curve of one evaluation after the other: exactly the sum at each n.

        >>> TimeCurve.sum([TimeCurve.per_example(1.0), TimeCurve(((4, 2.0),))])
        TimeCurve(points=((1.0, 3.0), (4.0, 6.0)))
        """
        different: dict[TimeCurve, int] = {}
        for curve in curves:
            different[curve] = different.get(curve, 0) + 1
        sizes = sorted({n for curve in different for n, _ in curve.points}) or [1.0]
        return cls(tuple((n, math.fsum(count * curve(n) for curve, count in different.items())) for n in sizes))

    def __call__(self, n: float) -> float:
        sizes, points = self._sizes, self.points
        at = bisect_left(sizes, n)
        if at == 0:
            return points[0][1]
        if at == len(points):
            return points[-1][1] * (n / sizes[-1])
        (below, start), (above, end) = points[at - 1], points[at]
        if n == above:
            return end
        return start + (end - start) * ((n - below) / (above - below))

    def scaled(self, factor: float) -> TimeCurve:
        """All seconds times `factor`."""
        return TimeCurve(tuple((n, seconds * factor) for n, seconds in self.points))

    @cached_property
    def _sizes(self) -> list[float]:
        return [n for n, _ in self.points]

    def __bool__(self) -> bool:
        """Whether it ever takes any time."""
        return any(seconds > 0 for _, seconds in self.points)
