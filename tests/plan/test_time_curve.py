import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import TimeCurve

from .strategies import curves

examples = st.floats(0.01, 1000)


def test_below_between_and_above_its_points():
    curve = TimeCurve(((2, 1.0), (4, 3.0), (8, 4.0)))
    assert [curve(n) for n in (0.5, 2, 3, 4, 5, 8, 16, 24)] == [1.0, 1.0, 2.0, 3.0, 3.25, 4.0, 8.0, 12.0]


@given(st.lists(curves(), max_size=4), examples)
def test_a_sum_is_exact_everywhere(several, n):
    assert TimeCurve.sum(several)(n) == pytest.approx(math.fsum(curve(n) for curve in several), rel=1e-9)


@given(curves(), st.floats(0, 100), examples)
def test_scaling(curve, factor, n):
    assert curve.scaled(factor)(n) == pytest.approx(curve(n) * factor)


@given(curves(), examples)
def test_a_curve_that_never_takes_time_is_false(curve, n):
    assert bool(curve) or curve(n) == 0


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ((), "it has no points"),
        (((1, -1.0),), "-1 s for 1 examples"),
        (((1, math.nan), (2, math.inf)), "nan s for 1 examples, inf s for 2 examples"),
        (((4, 1.0), (2, 1.0)), "2 examples after 4"),
        (((0, 1.0),), "0 examples"),
    ],
)
def test_bad_points(points, message):
    with pytest.raises(PlanError, match=message):
        TimeCurve(points)
