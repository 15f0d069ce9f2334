import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageCosts, StageDag, make_timetable, simulate
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.search import find_timetable

CHAIN = StageDag.chain(4)
COSTS = StageCosts(
    (1.0,) * 4, (2.0,) * 4, residual_bytes=(8.0, 8.0, 8.0, 20.0), weight_residual_bytes=(3.0, 8.0, 0.0, 5.0)
)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_h2"])
def test_peaks_are_those_of_the_simulation(name):
    timetable = make_timetable(name, CHAIN, 8)
    limit = MemoryLimit.in_bytes(CHAIN, COSTS, 100.0)
    assert limit.peaks(timetable) == simulate(timetable, COSTS).peak_bytes_on_rank
    in_flight = MemoryLimit.in_microbatches(CHAIN, 8)
    assert in_flight.peaks(timetable) == timetable.peak_in_flight_on_rank


def test_a_search_keeps_a_limit_in_bytes():
    result = find_timetable(
        CHAIN, 8, COSTS, memory_limit=MemoryLimit.in_bytes(CHAIN, COSTS, (24.0, 24.0, 24.0, 20.0)), cache=False
    )
    peaks = simulate(result.timetable, COSTS).peak_bytes_on_rank
    assert all(peak <= most for peak, most in zip(peaks, (24.0, 24.0, 24.0, 20.0), strict=True))
    assert result.lower_bound <= result.makespan <= 8 * 3 * 4


def test_fits_up_to_rounding():
    timetable = make_timetable("gpipe", CHAIN, 3)
    limit = MemoryLimit((0.3,) * 4, (0.1,) * 4)
    assert limit.fits(timetable)  # 0.1 + 0.1 + 0.1 is more than 0.3 in floating point
    assert not MemoryLimit((0.29,) * 4, (0.1,) * 4).fits(timetable)


def test_bytes_need_sizes():
    with pytest.raises(ScheduleError, match="a memory limit in bytes needs StageCosts"):
        MemoryLimit.in_bytes(CHAIN, StageCosts.uniform(4), 1e9)


def test_limits_that_make_no_sense():
    with pytest.raises(ScheduleError, match=r"per_rank\[0\] = -1 < 0; kept\[0\] = 2.0 is more than held\[0\] = 1.0"):
        MemoryLimit((-1,), (1.0,), (2.0,))
    with pytest.raises(ScheduleError, match="kept is for 1 stages, held for 2"):
        MemoryLimit((1,), (1.0, 1.0), (1.0,))
