"""The simulator against the measurements of Qi et al. 2024 (benchmarks/data)."""

from statistics import median

import pytest

from benchmarks.measured import (
    Prediction,
    add_scaled,
    count_ranked_pairs,
    make_costs,
    make_schedule,
    predict,
    read_rows,
)
from jaxpar.schedule import simulate, validate_timetable

ROWS = read_rows()
SMALL = [row for row in ROWS if row.ranks <= 8]


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    return [predict(row) for row in SMALL]


def test_free_running_bubbles_are_those_that_the_authors_computed(predictions):
    """As exactly as they are printed; but ZB-2p's order is from a search of our own, and 1F1B-I's differs a little."""
    apart = {"ZB-2p": 0.009, "1F1B-I": 0.004}
    for p in predictions:
        assert p.bubble == pytest.approx(p.row.bubble, abs=apart.get(p.row.schedule, 1e-4)), p.row


def test_throughput_is_within_5_percent_at_the_median_and_ranked_as_measured(predictions):
    measured = add_scaled([p for p in predictions if p.row.throughput is not None])
    assert len(measured) == 24
    assert median(abs(p.error("textbook")) for p in measured if p.row.schedule == "1F1B") > 0.05
    assert median(abs(p.error("scaled")) for p in measured) < 0.05
    right, total = count_ranked_pairs(measured, "blocking")
    assert right == total == 35


@pytest.mark.slow
def test_all_48_measured_rows():
    measured = add_scaled([predict(row) for row in ROWS if row.throughput is not None])
    assert len(measured) == 48
    assert median(abs(p.error("scaled")) for p in measured) < 0.025
    assert max(abs(p.error("scaled")) for p in measured) < 0.07
    assert count_ranked_pairs(measured, "blocking") == (71, 71)


def test_searched_orders_are_valid_and_keep_to_their_memory():
    for schedule, multiple in (("ZB-1p", 1), ("ZB-2p", 2)):
        row = next(row for row in SMALL if row.schedule == schedule)
        costs = make_costs(row, row.ranks)
        timetable = validate_timetable(make_schedule(row, costs))
        peaks = simulate(timetable, costs, mode="free").peak_bytes_on_rank
        limit = multiple * row.ranks * costs.residual_bytes[0]
        assert 0.9 * limit < max(peaks) <= limit * (1 + 1e-9)
