import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import (
    Action,
    Link,
    Simulation,
    StageCosts,
    StageDag,
    Timetable,
    compare_lockstep,
    forward_only,
    gpipe,
    one_f_one_b,
    simulate,
    zb_h1,
    zb_h2,
)

from .strategies import dags, exchanges, microbatches

seconds = st.floats(0, 10)


@st.composite
def simulated(draw):
    dag = draw(dags())
    options = {"exchange": draw(exchanges)}
    split = dag.has_backward and draw(st.booleans())
    make, options = (zb_h1, options) if split else (one_f_one_b, options | {"extra": draw(st.integers(0, 2))})
    timetable = make(dag, draw(microbatches), **options)
    forward, backward = (tuple(draw(seconds) for _ in range(dag.num_stages)) for _ in range(2))
    edges = st.dictionaries(st.sampled_from(sorted({*dag.forward, *dag.backward, (0, 0)})), seconds)
    by_edge = draw(edges.map(lambda d: {edge: x for edge, x in d.items() if edge != (0, 0)}))
    sent = draw(st.one_of(seconds, st.just(by_edge)))
    if draw(st.booleans()):
        return timetable, StageCosts(forward, backward, sent)
    link = Link(draw(seconds), draw(st.floats(0.1, 100)))
    return timetable, StageCosts(forward, backward, sent_bytes=sent, link=link)


@given(simulated())
def test_invariants(case):
    timetable, costs = case
    executor, free, blocking = (simulate(timetable, costs, mode=mode) for mode in ("executor", "free", "blocking"))
    assert free.makespan <= executor.makespan * (1 + 1e-9)
    assert free.makespan <= blocking.makespan * (1 + 1e-9)
    for simulation in (executor, free, blocking):
        assert simulation.busy == pytest.approx(executor.busy)
        assert max(simulation.span) <= simulation.makespan * (1 + 1e-9)
        assert simulation.makespan >= max(simulation.busy) * (1 - 1e-9)
        assert -1e-9 <= simulation.bubble_fraction <= 1
        assert len(simulation.start) == sum(len(timetable.order(rank)) for rank in range(timetable.dag.num_ranks))


@given(simulated(), st.sampled_from(["executor", "free", "blocking"]))
def test_no_action_starts_before_its_inputs_are_there_or_its_rank_is_free(case, mode):
    timetable, costs = case
    dag, run = timetable.dag, simulate(timetable, costs, mode=mode)
    backward = "I" if Action("I", 0, 0) in run.start else "B"
    for kind, edges in (("F", dag.forward), (backward, dag.backward)):
        for src, dst in edges:
            for m in range(timetable.num_microbatches):
                arrives = run.end[Action(kind, src, m)] + costs.transfer_of(dag, src, dst)
                assert run.start[Action(kind, dst, m)] >= arrives - 1e-9
    for rank in range(dag.num_ranks):
        order = timetable.order(rank)
        assert all(run.start[b] >= run.end[a] - 1e-9 for a, b in pairwise(order))


def test_by_hand_one_micro_batch_with_transfers():
    """F0 0-1, half a second on the way, F1 1.5-2.5, B1 2.5-4.5, half a second, B0 5-7."""
    timetable = one_f_one_b(StageDag.chain(2), 1, exchange=1)
    for mode in ("executor", "free"):
        run = simulate(timetable, StageCosts.uniform(2, transfer=0.5), mode=mode)
        assert [run.start[a] for a in map(Action.from_text, ("0F0", "1F0", "1B0", "0B0"))] == [0, 1.5, 2.5, 5]
        assert (run.makespan, run.busy, run.idle) == (7.0, (3.0, 3.0), (4.0, 4.0))
        assert run.bubble_fraction == pytest.approx(1 - 6 / 14)


def test_by_hand_a_forward_beside_a_backward_waits_for_it():
    """Rank 0's third forward needs nothing, but in lockstep waits for rank 1's long first backward."""
    text = """x  microbatches=3 exchange=1
    rank 0 | 0F0 0F1 .   0F2 0B0 0B1 .   . 0B2
    rank 1 | .   1F0 1B0 1F1 1B1 1F2 1B2 . ."""
    timetable = Timetable.from_text(text, dag=StageDag.chain(2))
    costs = StageCosts((1, 1), (1, 5))
    assert simulate(timetable, costs).start[Action("F", 0, 2)] == 7
    assert simulate(timetable, costs, mode="free").start[Action("F", 0, 2)] == 2


def test_ranks_that_share_no_edge_do_not_wait_for_each_other():
    dag = StageDag(2, (), (), (0, 1), 2, has_backward=False)
    timetable = Timetable.from_text("x  microbatches=2 exchange=1\nrank 0 | 0F0 0F1\nrank 1 | 1F0 1F1", dag=dag)
    assert simulate(timetable, StageCosts((1, 10))).start[Action("F", 0, 1)] == 1


def test_zero_bubble_h1_by_hand_runs_free_of_lockstep_costs():
    """With F = I = W every tick takes the same time, so ticks are time: 3 m + p - 1 at p = 2."""
    text = """zb-h1  microbatches=3 exchange=1
    rank 0 | 0F0 0F1 .   0I0 0F2 0I1 0W0 0I2 0W1 0W2
    rank 1 | .   1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2"""
    timetable = Timetable.from_text(text, dag=StageDag.chain(2))
    both = compare_lockstep(timetable, StageCosts.uniform(2))
    assert (both.executor.makespan, both.ratio) == (3 * 3 + 2 - 1, 1.0)


def test_compare_lockstep_prints_both():
    both = compare_lockstep(one_f_one_b(StageDag.chain(4), 16, extra=0, exchange=1), StageCosts.uniform(4))
    assert both.ratio == pytest.approx(72 / 57)
    assert (
        str(both)
        == """\
           makespan   bubble
executor         72    33.3%
free             57    15.8%
ratio         1.263

rank  busy  idle  idle (free)  in flight
   0    48    24            9          4
   1    48    24            9          3
   2    48    24            9          2
   3    48    24            9          1"""
    )


TWO_SENDS = """x  microbatches=2 exchange=2
    rank 0 | 0F0 0F1 . . .
    rank 1 | . . 1F0 1F1 ."""


def test_by_hand_messages_of_one_pair_of_ranks_queue():
    """Sent at 1 and 2, 3 s each on the link and 0.5 s more: there at 4.5 and 7.5. The executor sends in each tick."""
    timetable = Timetable.from_text(TWO_SENDS, dag=StageDag.chain(2, has_backward=False))
    costs = StageCosts((1, 1), sent_bytes=6, link=Link(0.5, 2))
    second = [Action("F", 1, m) for m in range(2)]
    free, executor = simulate(timetable, costs, mode="free"), simulate(timetable, costs)
    assert [free.start[a] for a in second] == [4.5, 7.5]
    assert [executor.start[a] for a in second] == [4.5, 7.5]
    plain = simulate(timetable, StageCosts((1, 1), transfer=3.5), mode="free")
    assert [plain.start[a] for a in second] == [4.5, 5.5], "with a plain transfer nothing queues"


def test_by_hand_a_rank_that_blocks_does_nothing_else_until_what_it_sends_has_arrived():
    """Rank 0 works in 0-1, sends in 1-3, works in 3-4, sends in 4-6; rank 1 starts at 3 and 6."""
    timetable = Timetable.from_text(TWO_SENDS, dag=StageDag.chain(2, has_backward=False))
    actions = [Action.from_text(text) for text in ("0F0", "0F1", "1F0", "1F1")]
    for costs in (StageCosts((1, 1), transfer=2), StageCosts((1, 1), sent_bytes=6, link=Link(0.5, 4))):
        run = simulate(timetable, costs, mode="blocking")
        assert [run.start[a] for a in actions] == [0, 3, 3, 6]
    run = simulate(timetable, StageCosts((1, 10), transfer=2), mode="blocking")
    assert run.start[actions[-1]] == 3 + 10, "what was sent meanwhile is there"


@pytest.mark.parametrize("make", [one_f_one_b, zb_h1, zb_h2])
@pytest.mark.parametrize("mode", ["free", "blocking"])
def test_steps_without_a_barrier_between_them_take_the_longest_span_each(make, mode):
    dag, costs = StageDag.chain(4), StageCosts((3.0,) * 4, (5.0,) * 4, 0.25, (2.5,) * 4)
    step = make(dag, 12)
    orders = [step.order(rank) for rank in range(4)]
    later = [[replace(action, microbatch=action.microbatch + 12) for action in order] for order in orders]
    both = Timetable.from_orders("two steps", dag, 24, [[*a, *b] for a, b in zip(orders, later, strict=True)])
    alone = simulate(step, costs, mode=mode)
    more = simulate(both, costs, mode=mode).makespan - alone.makespan
    send = 0.25 if mode == "blocking" else 0.0  # after its last action a rank may send
    assert max(alone.span) <= more <= max(alone.span) + send


def test_memory_in_bytes_by_hand():
    """I frees what W does not need, W the rest; two stages of one rank add up."""
    dag = StageDag(2, ((0, 1),), ((1, 0),), (0, 0), 1)
    text = "x  microbatches=1 exchange=1\nrank 0 | 0F0 1F0 1I0 1W0 0B0"
    costs = StageCosts((1, 1), (2, 2), residual_bytes=(100.0, 10.0), weight_residual_bytes=(40.0, 4.0))
    run = simulate(Timetable.from_text(text, dag=dag), costs)
    assert run.memory_curve(0) == ((0, 0), (0, 100), (1, 110), (3, 104), (4, 100), (6, 0))
    assert run.in_flight_curve(0) == ((0, 0), (0, 1), (1, 2), (4, 1), (6, 0))
    assert run.peak_bytes_on_rank == (110,)


@given(simulated())
def test_memory_curves_end_empty_and_their_peaks_are_those_of_the_order(case):
    timetable, costs = case
    run = simulate(timetable, replace(costs, residual_bytes=(1.0,) * timetable.dag.num_stages), mode="free")
    assert run.peak_bytes_on_rank == timetable.peak_in_flight_on_rank
    for rank in range(timetable.dag.num_ranks):
        assert run.memory_curve(rank)[-1][1] == 0
        if timetable.dag.has_backward:
            assert run.memory_curve(rank) == run.in_flight_curve(rank)


def test_gpipe_holds_all_micro_batches_1f1b_its_depth_and_a_forward_only_step_one():
    costs = StageCosts((1,) * 4, (2,) * 4, residual_bytes=(5,) * 4)
    assert simulate(gpipe(StageDag.chain(4), 8), costs).peak_bytes_on_rank == (40,) * 4
    assert simulate(one_f_one_b(StageDag.chain(4), 8, extra=0), costs).peak_bytes_on_rank == (20, 15, 10, 5)
    inference = forward_only(StageDag.chain(4, has_backward=False), 8)
    assert simulate(inference, costs).peak_bytes_on_rank == (5,) * 4


def test_memory_in_bytes_needs_sizes():
    run = simulate(one_f_one_b(StageDag.chain(2), 2), StageCosts.uniform(2))
    with pytest.raises(ScheduleError, match=r"give StageCosts\(residual_bytes="):
        run.memory_curve(0)


def test_measured_times_are_moved_to_start_at_zero_and_must_be_complete():
    timetable = one_f_one_b(StageDag.chain(2), 1)
    times = {Action.from_text(text): (10.0 + i, 11.5 + i) for i, text in enumerate(("0F0", "1F0", "1B0", "0B0"))}
    run = Simulation.from_times(timetable, times)
    assert (run.mode, run.makespan, run.busy) == ("measured", 4.5, (3.0, 3.0))
    assert run.start[Action("F", 0, 0)] == 0
    with pytest.raises(ScheduleError, match=r"1 actions: 0F0"):
        Simulation.from_times(timetable, {a: t for a, t in times.items() if str(a) != "0F0"})


def test_nothing_takes_time():
    run = simulate(one_f_one_b(StageDag.chain(2), 2), StageCosts.uniform(2, forward=0, backward=0))
    assert (run.makespan, run.bubble_fraction) == (0, 0)


def test_unknown_mode():
    with pytest.raises(ScheduleError, match="no simulation mode 'fast'; known: executor, free, blocking"):
        simulate(one_f_one_b(StageDag.chain(2), 2), StageCosts.uniform(2), mode="fast")


def test_quick_enough_to_search_with():
    timetable, costs = one_f_one_b(StageDag.chain(16), 64), StageCosts.uniform(16)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        simulate(timetable, costs)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.1


@given(simulated(), st.sampled_from(["executor", "free"]))
def test_costs_of_a_simulation_are_those_that_it_was_made_with(case, mode):
    timetable, costs = case
    found = simulate(timetable, costs, mode=mode).median_costs()
    assert found.forward == pytest.approx(costs.forward)
    assert found.sent_bytes == costs.sent_bytes
    if timetable.dag.has_backward:
        assert found.backward == pytest.approx(costs.backward)
    if timetable.is_split:
        assert found.input_backward == pytest.approx([b / 2 for b in costs.backward])


def test_median_costs_of_measured_times():
    """F takes 1, 2, 9; micro-batch 1 has its backward in two halves of 3 and 4, the others a whole of 5 and 8."""
    actions = "0F0 0B0 0F1 0I1 0W1 0F2 0B2".split()
    timetable = Timetable.from_orders("mixed", StageDag.chain(1), 3, [[Action.from_text(a) for a in actions]])
    ends = np.cumsum([1, 5, 2, 3, 4, 9, 8]).tolist()
    times = {a: (begin, end) for a, begin, end in zip(timetable.order(0), [0, *ends], ends, strict=False)}
    found = Simulation.from_times(timetable, times).median_costs()
    assert (found.forward, found.backward, found.input_backward) == ((2,), (7,), (3,))
