"""Measured costs: blocks that really run, each different one once, and a cache on disk that says when it is no good."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxpar.measure
from jaxpar.errors import PlanError
from jaxpar.measure import MeasuredCosts, measure_device, measure_program
from jaxpar.planning import graph_step
from tests.equality.grid import small_case
from tests.zoo import CASES


def graph_of(case, costs, sizes=(1, 4)):
    return graph_step(case.step, case.state, case.batch, *case.extra, costs=costs, sizes=sizes)


def test_each_different_block_is_measured_once_at_each_size(tmp_path, monkeypatch):
    calls = []

    def count(program, n, device, num_examples):
        calls.append((program.digest, n))
        return 1e-3 * n

    monkeypatch.setattr(jaxpar.measure, "measure_program", count)
    case, seen = CASES["mlp"](depth=8), []
    graph = graph_of(case, MeasuredCosts(cache=tmp_path, progress=seen.append)).graph
    assert len(calls) == len(set(calls)) == 2 * 9  # first, middle and last layer; F, I and B; two sizes
    assert (seen[-1].done, seen[-1].total) == (18, 18)
    again = graph_of(case, MeasuredCosts(cache=tmp_path)).graph
    assert len(calls) == 18
    assert again == graph
    assert again.forward_seconds(4)[3] == 4e-3
    graph_of(case, MeasuredCosts(cache=tmp_path), sizes=(1, 4, 8))
    assert {n for _, n in calls[18:]} == {8}
    graph_of(case, MeasuredCosts(cache=False, progress=False))
    assert len(calls) == 18 + 9 + 18


def test_a_cache_for_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxpar.measure, "measure_program", lambda *_: 1e-3)
    case = CASES["mlp"](depth=2)
    graph_of(case, MeasuredCosts(cache=tmp_path))
    path = next(tmp_path.iterdir())
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"setting": kept["setting"] | {"jax": "0.1"}}))
    with pytest.raises(PlanError, match=rf"{path.name} can't be used, delete the file: it is for another program"):
        graph_of(case, MeasuredCosts(cache=tmp_path))
    path.write_text(path.read_text()[:20])
    with pytest.raises(PlanError, match="delete the file"):
        graph_of(case, MeasuredCosts(cache=tmp_path))


def test_noise_is_smoothed_to_times_that_rise(monkeypatch):
    noisy = {1: 3e-3, 2: 2e-3, 4: 5e-3}
    monkeypatch.setattr(jaxpar.measure, "measure_program", lambda program, n, *_: noisy[n])
    op = graph_of(CASES["mlp"](depth=2), MeasuredCosts(cache=False), sizes=(1, 2, 4)).graph.ops[0]
    assert op.forward.points == ((1, 2e-3), (2, 2e-3), (4, 5e-3))


def test_a_measured_product_was_really_computed_each_time():
    """No machine does 2 * 512^3 operations in a time that says otherwise: the loop was not emptied by the compiler."""
    case = CASES["mlp"](depth=2, width=512, outputs=512, batch_size=512)
    found = graph_step(case.step, case.state, case.make_batch(512, 0), sizes=[512])
    for kind in "FIB":
        program = found.programs[kind, 1]
        assert measure_program(program, 512, jax.devices()[0]) > 2 * 512**3 / 2e12


@pytest.mark.parametrize("name", ["gpt", "cond", "scan_layers", "integers_and_keys"])
def test_all_kinds_of_programs_can_be_measured(name, monkeypatch):
    """Random numbers, tables, branches, loops, keys; one run each."""
    runs = []
    monkeypatch.setattr(jaxpar.measure, "_seconds_of_round", lambda run: runs.append(jax.device_get(run(1))) or 1.0)
    case = small_case(name)
    costs = MeasuredCosts(cache=False, num_examples=32, progress=False)
    found = graph_step(case.step, case.state, case.batch, *case.extra, costs=costs, sizes=(2,), max_blocks=2)
    assert np.all(found.graph.forward_seconds(2) == 1.0)
    assert len(runs) == len({p.digest for p in found.programs.values()})


def test_the_device_is_measured():
    spec = measure_device(name="here", size=128)
    assert spec.name == "here"
    assert spec.peak("float32") > 1e8
    assert spec.memory_bandwidth > 1e7
