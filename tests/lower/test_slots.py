"""Slots: as few as possible, and never two values in one."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpar
from jaxpar.lower.slots import colour_intervals
from jaxpar.schedule import Action
from tests.equality.grid import SCHEDULES, small_case

_INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=40)


def overlap(a, b):
    return a[0] < b[1] and b[0] < a[1]


@given(_INTERVALS)
def test_proper_and_minimal(intervals):
    """An interval graph needs as many colours as there are intervals at the busiest point."""
    slots = colour_intervals(intervals)
    for (a, i), (b, j) in itertools.combinations(list(zip(intervals, slots, strict=True)), 2):
        assert i != j or not overlap(a, b)
    busiest = max((sum(a <= t < b for a, b in intervals) for t in range(30)), default=0)
    assert set(slots) == set(range(busiest))


def test_an_empty_interval_still_takes_a_slot():
    """A value that is read in the tick in which it arrives."""
    assert sorted(colour_intervals([(3, 3), (3, 3), (4, 5)])) in ([0, 0, 1], [0, 1, 1])


@pytest.fixture(scope="module", params=SCHEDULES)
def machine(request):
    """Of a U-Net, whose skips pass over stages and wait for long."""
    schedule, options = SCHEDULES[request.param]
    case = small_case("unet", batch_size=12)
    step = jaxpar.parallelize(
        case.step,
        mesh=jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4]),
        num_microbatches=6,
        schedule=schedule,
        schedule_options=options,
    )
    step.plan(case.state, case.batch)
    return step._last.machine


def ticks_of(machine, bundle, microbatch):
    """When a bundle is written (at the end of that tick, if it travels) and last read."""
    tick = lambda node: machine.timetable.tick_of(Action(*node, microbatch))
    wait = machine.timetable.exchange - 1 if bundle.travels else 0
    return tick(bundle.source) + wait, tick(bundle.last_reader)


def test_no_two_residuals_share_a_row(machine):
    """Of one ring on one rank, while both are alive."""
    residuals, dag = machine.residuals, machine.timetable.dag
    held = {}
    for bundle, places in residuals.places.items():
        for m in range(machine.timetable.num_microbatches):
            interval = ticks_of(machine, bundle, m)
            for place in places:
                first = residuals.columns[bundle, m][place.column] + (place.offset or 0)
                last = first + (1 if place.offset is None else int(np.prod(place.shape)))
                assert 0 <= first < last <= residuals.rings[place.ring].shape[0]
                held.setdefault((place.ring, dag.rank_of[bundle.stage]), []).append(((first, last), interval))
    for spans in held.values():
        for (rows, alive), (other_rows, other_alive) in itertools.combinations(spans, 2):
            assert not (overlap(rows, other_rows) and overlap(alive, other_alive))


def test_no_two_payloads_share_a_row(machine):
    """Nor does anything else arrive in a row while it waits to be read."""
    mail, timetable = machine.mail, machine.timetable
    for bundle, k in mail.box_of.items():
        box, rank = mail.boxes[k], timetable.dag.rank_of[bundle.stage]
        for m in range(timetable.num_microbatches):
            written, read = ticks_of(machine, bundle, m)
            row = mail.row[bundle, m]
            assert box.arrival[written, rank] == row < box.rows
            assert row not in box.arrival[written + 1 : read, rank]


def test_rings_are_as_deep_as_the_timetable_says(machine):
    """Memory is what is in flight at the worst rank, within the slack of uniform rings."""
    assert max(machine.residuals.used_bytes) <= machine.residuals.bytes <= 1.05 * max(machine.residuals.used_bytes)
