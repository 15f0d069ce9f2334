import json

from jaxpar.schedule import Action, Simulation, StageCosts, StageDag, one_f_one_b, simulate


def events_of(run, path, phase):
    run.write_chrome_trace(path)
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == phase]


def test_a_trace_has_each_action_once_on_its_rank_in_microseconds(tmp_path):
    costs = StageCosts((1e-3, 1e-3), (2e-3, 2e-3), transfer=5e-4)
    run = simulate(one_f_one_b(StageDag.chain(2), 3), costs, mode="free")
    events = events_of(run, tmp_path / "trace.json", "X")
    assert len(events) == 12
    for event in events:
        action = Action.from_text(event["name"])
        assert event["tid"] == action.stage
        assert (event["ts"], event["ts"] + event["dur"]) == (1e6 * run.start[action], 1e6 * run.end[action])
        assert event["args"] == {"kind": action.kind, "stage": action.stage, "microbatch": action.microbatch}


def test_memory_is_a_counter_of_bytes_where_sizes_are_known_and_of_micro_batches_else(tmp_path):
    timetable = one_f_one_b(StageDag.chain(1), 1)
    counted = events_of(simulate(timetable, StageCosts.uniform(1)), tmp_path / "a.json", "C")
    assert [(event["ts"], event["args"]) for event in counted] == [
        (0, {"micro-batches": 0}),
        (0, {"micro-batches": 1}),
        (3e6, {"micro-batches": 0}),
    ]
    sized = events_of(simulate(timetable, StageCosts((1,), (2,), residual_bytes=(8,))), tmp_path / "b.json", "C")
    assert [event["args"] for event in sized] == [{"bytes": 0}, {"bytes": 8}, {"bytes": 0}]


def test_measured_times_and_names(tmp_path):
    timetable = one_f_one_b(StageDag.chain(1), 1)
    run = Simulation.from_times(timetable, {Action("F", 0, 0): (3.0, 4.0), Action("B", 0, 0): (4.0, 6.0)})
    assert [(e["ts"], e["dur"]) for e in events_of(run, tmp_path / "t.json", "X")] == [(0, 1e6), (1e6, 2e6)]
    names = [event["args"]["name"] for event in events_of(run, tmp_path / "t.json", "M")]
    assert names == ["1f1b (measured)", "rank 0"]
