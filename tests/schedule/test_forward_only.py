import pytest
from hypothesis import given

from jaxpar.errors import ScheduleError
from jaxpar.schedule import StageDag, forward_only, validate_timetable

from .strategies import dags, exchanges, microbatches


@given(dags(has_backward=False), microbatches, exchanges)
def test_valid_on_any_graph(dag, num_microbatches, exchange):
    timetable = validate_timetable(forward_only(dag, num_microbatches, exchange=exchange))
    assert set(timetable.peak_in_flight) == {1}


@pytest.mark.parametrize("exchange", [1, 2])
def test_ticks_on_a_chain(exchange):
    assert forward_only(StageDag.chain(4, has_backward=False), 8, exchange=exchange).num_ticks == 8 + exchange * 3


def test_refuses_backwards():
    with pytest.raises(ScheduleError, match="this step has backwards; use 'gpipe' or '1f1b'"):
        forward_only(StageDag.chain(2), 4)
