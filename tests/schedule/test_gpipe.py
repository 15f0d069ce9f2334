import pytest
from hypothesis import given

from jaxpar.schedule import StageCosts, StageDag, gpipe, simulate, validate_timetable

from .strategies import dags, exchanges, microbatches


@given(dags(), microbatches, exchanges)
def test_valid_on_any_graph(dag, num_microbatches, exchange):
    validate_timetable(gpipe(dag, num_microbatches, exchange=exchange))


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 8), (4, 1), (4, 3), (4, 16), (8, 32)])
def test_published_time_and_memory(p, m, exchange):
    timetable = gpipe(StageDag.chain(p), m, exchange=exchange)
    assert simulate(timetable, StageCosts.uniform(p), mode="free").makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == (m,) * p
