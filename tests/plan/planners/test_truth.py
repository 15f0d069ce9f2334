"""The planners against `exact`, which tries everything: they have to find as good a plan on every small graph."""

import pytest

from jaxpar.plan.planners import auto, exact, graphpipe
from tests.plan.planners.truth import draw_cases, print_ratios, try_plan

TOLERANCE = 1.01
TEXTBOOK = [("1f1b", {"extra": 0})]


def compare_bottlenecks(cases):
    """Of computation alone, which is what `exact` counts in a bottleneck."""
    ratios = []
    for case in cases:
        best = try_plan(exact, case, objective="bottleneck")
        plan = try_plan(graphpipe, case, transfers=False)
        assert (best is None) == (plan is None), case.name
        if best is not None:
            ratios.append(plan.bottleneck / best.bottleneck)
    return ratios


def compare_steps(cases):
    """With the timetable and the memory that `exact` has."""
    ratios = []
    for case in cases:
        best = try_plan(exact, case, mode="free", schedules=TEXTBOOK, max_plans=3_000_000)
        plan = try_plan(auto, case, mode="free", schedules=TEXTBOOK, recompute=False)
        assert (best is None) == (plan is None), case.name
        if best is not None:
            ratios.append(plan.predict("free").step_seconds / best.predict("free").step_seconds)
    return ratios


@pytest.mark.parametrize(("form", "seeds"), [("series-parallel", range(24)), ("any", range(12))])
def test_graphpipe_has_the_least_bottleneck(form, seeds):
    ratios = compare_bottlenecks(draw_cases(form, seeds, most_ops=8, batches=(8, 12)))
    assert max(ratios) <= TOLERANCE
    assert min(ratios) >= 1 / TOLERANCE  # `exact` is exact


@pytest.mark.parametrize(("form", "seeds"), [("series-parallel", range(8)), ("any", range(5))])
def test_auto_has_the_least_step(form, seeds):
    ratios = compare_steps(draw_cases(form, seeds, most_ops=7, batches=(6, 8)))
    assert max(ratios) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("form", "seeds"), [("series-parallel", range(1000, 1200)), ("any", range(1000, 1100))])
def test_graphpipe_has_the_least_bottleneck_on_many_graphs(form, seeds):
    ratios = compare_bottlenecks(draw_cases(form, seeds, most_ops=12, batches=(8, 12, 16)))
    print_ratios(f"graphpipe, bottleneck, {form} graphs", ratios)
    assert max(ratios) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("form", "seeds"), [("series-parallel", range(2000, 2200)), ("any", range(2000, 2100))])
def test_auto_has_the_least_step_on_many_graphs(form, seeds):
    ratios = compare_steps(draw_cases(form, seeds, most_ops=9, batches=(4, 6, 8)))
    print_ratios(f"auto, step, {form} graphs", ratios)
    assert max(ratios) <= TOLERANCE
