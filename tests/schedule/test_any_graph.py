"""Each schedule is valid on each stage graph that it accepts, within the memory that it states."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import ScheduleError
from jaxpar.schedule import (
    PLACEMENTS,
    SCHEDULES,
    StageDag,
    dualpipe_v,
    eager_1f1b,
    interleaved_1f1b,
    kfkb,
    looped_bfs,
    make_timetable,
    v_half,
    v_min,
    validate_timetable,
    zb_h1,
    zb_h2,
    zb_v,
)

from .strategies import dags, exchanges, microbatches, placed_dags

ROUNDS = ["interleaved_1f1b"]
VEES = [name for name, placement in PLACEMENTS.items() if placement == "v"]
ANY = [name for name in SCHEDULES if name not in ROUNDS + VEES]


@pytest.mark.parametrize("name", ANY)
@given(dag=dags(), m=microbatches, exchange=exchanges)
def test_on_any_graph(name, dag, m, exchange):
    validate_timetable(SCHEDULES[name](dag, m, exchange=exchange))


@pytest.mark.parametrize("name", ROUNDS)
@given(dag=placed_dags("round_robin"), m=microbatches, exchange=exchanges)
def test_in_rounds(name, dag, m, exchange):
    validate_timetable(SCHEDULES[name](dag, m, exchange=exchange))


@pytest.mark.parametrize("name", VEES)
@given(dag=placed_dags("v"), m=microbatches, exchange=exchanges)
def test_in_a_v(name, dag, m, exchange):
    validate_timetable(SCHEDULES[name](dag, m, exchange=exchange))


@given(dags(has_backward=True), microbatches, exchanges)
def test_bounds_from_the_depth(dag, m, exchange):
    deepest = max(dag.depth)
    eager = [min(m, 2 * depth - 1) for depth in dag.depth]
    validate_timetable(eager_1f1b(dag, m, exchange=exchange), max_in_flight=eager)
    validate_timetable(zb_h1(dag, m, exchange=exchange), max_in_flight=[min(m, deepest)] * dag.num_stages)
    validate_timetable(zb_h2(dag, m, exchange=exchange), max_in_flight=[min(m, 2 * deepest - 1)] * dag.num_stages)


@given(dags(has_backward=True), st.integers(1, 20), exchanges, st.data())
def test_kfkb_does_k_forwards_then_k_backwards(dag, m, exchange, data):
    """Of one stage: its order is F's and B's in groups, where B's of a group come after all of the group's F's."""
    k = data.draw(st.integers(1, 5) | st.tuples(*[st.integers(1, 5)] * dag.num_stages))
    timetable = validate_timetable(kfkb(dag, m, k=k, exchange=exchange))
    for stage in range(dag.num_stages):
        size = k if isinstance(k, int) else k[stage]
        order = [action for action in timetable.order(dag.rank_of[stage]) if action.stage == stage]
        for group in range(0, m, size):
            kinds = "".join(a.kind for a in order if group <= a.microbatch < group + size)
            assert kinds == "F" * (len(kinds) // 2) + "B" * (len(kinds) // 2)
        if isinstance(k, int):
            assert timetable.peak_in_flight[stage] <= min(m, k * dag.depth[stage])


@given(placed_dags("round_robin", has_backward=True), st.integers(1, 20), exchanges)
def test_interleaved_memory(dag, m, exchange):
    """(v - 1) g + 2 R - 1 - 2 r, for rounds of at most g micro-batches."""
    v, ranks = dag.num_stages // dag.num_ranks, dag.num_ranks
    largest = -(-m // max(1, m // ranks))
    for rank, peak in enumerate(interleaved_1f1b(dag, m, exchange=exchange).peak_in_flight_on_rank):
        assert peak <= (v - 1) * largest + 2 * ranks - 1 - 2 * rank


@pytest.mark.parametrize("ranks", range(1, 11))
@pytest.mark.parametrize("v", [1, 2, 3])
def test_interleaved_never_deadlocks_however_micro_batches_divide(ranks, v):
    """A chain has the most edges; a deadlock does not depend on the exchange."""
    dag = StageDag.chain(v * ranks, num_ranks=ranks)
    for m in (*range(1, 2 * ranks + 2), 3 * ranks + 2):
        validate_timetable(interleaved_1f1b(dag, m, exchange=1))


@given(placed_dags("v", has_backward=True), st.integers(1, 20), exchanges)
def test_memory_on_a_v(dag, m, exchange):
    ranks = dag.num_ranks
    bounds = {zb_v: 2 * ranks, dualpipe_v: 2 * ranks, v_half: 2 * ((ranks + 2) // 2), v_min: 2 * ((ranks + 4) // 3)}
    for schedule, bound in bounds.items():
        assert max(schedule(dag, m, exchange=exchange).peak_in_flight_on_rank) <= bound


@given(dags(has_backward=True), microbatches)
def test_looped_bfs_takes_all_micro_batches_through_a_stage_at_a_time(dag, m):
    timetable = looped_bfs(dag, m)
    for rank in range(dag.num_ranks):
        work = [(action.kind, action.stage) for action in timetable.order(rank)]
        assert all(work[i] == work[i - i % m] for i in range(len(work)))
        assert "BF" not in "".join(kind for kind, _ in work)


@pytest.mark.parametrize("name", VEES + ROUNDS)
def test_a_forward_only_graph(name):
    placement = "v" if name in VEES else "round_robin"
    dag = StageDag.chain(4, num_ranks=2, placement=placement, has_backward=False)
    timetable = validate_timetable(SCHEDULES[name](dag, 5))
    assert {action.kind for cells in timetable.grid for action in cells if action} == {"F"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_micro_batches(name):
    dag = StageDag.chain(4, num_ranks=2, placement="v" if name in VEES else "round_robin")
    with pytest.raises(ScheduleError, match="at least one micro-batch, got 0"):
        SCHEDULES[name](dag, 0)


@pytest.mark.parametrize("name", VEES)
def test_what_a_v_is(name):
    for dag in (StageDag.chain(4), StageDag.chain(4, num_ranks=2), StageDag.chain(6, num_ranks=2, placement="v")):
        with pytest.raises(ScheduleError) as error:
            make_timetable(name, dag, 4)
        assert f"schedule {name!r} needs two stages on each rank" in str(error.value)
        assert f"StageDag.chain({2 * dag.num_ranks}, num_ranks={dag.num_ranks}, placement='v')" in str(error.value)
        assert f"got {dag.num_stages} stages on ranks {' '.join(map(str, dag.rank_of))}" in str(error.value)


def test_what_rounds_are():
    message = (
        r"needs as many stages on each rank, stage s on rank s % R: for 2 ranks "
        r"StageDag.chain\(6, num_ranks=2, placement='round_robin'\) is one; got 5 stages on ranks 0 1 0 1 0"
    )
    with pytest.raises(ScheduleError, match=message):
        interleaved_1f1b(StageDag.chain(5, num_ranks=2), 4)
    with pytest.raises(ScheduleError, match="got 4 stages on ranks 0 1 1 0"):
        interleaved_1f1b(StageDag.chain(4, num_ranks=2, placement="v"), 4)


def test_stages_that_are_not_numbered_along_the_pipeline():
    crossed = StageDag(4, ((0, 1), (3, 2)), ((1, 0), (2, 3)), (0, 1, 1, 0), 2)
    with pytest.raises(ScheduleError, match=r"numbered along the pipeline.*got forward \(3, 2\), backward \(2, 3\)"):
        zb_v(crossed, 4)
    for order in permutations(range(4)):
        edges = tuple((order[i], order[i + 1]) for i in range(3))
        dag = StageDag(4, edges, tuple((b, a) for a, b in edges), (0, 1, 1, 0), 2)
        if order == (0, 1, 2, 3):
            zb_v(dag, 4)
        else:
            with pytest.raises(ScheduleError, match="numbered along the pipeline"):
                zb_v(dag, 4)
