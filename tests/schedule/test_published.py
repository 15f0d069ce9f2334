"""The figures that the papers state, as equations over a range of p ranks and m micro-batches.

At unit costs: F = I = W = 1 for what a rank does with one micro-batch in a stage, so B = 2, transfers free, and ranks
that run freely. On ranks with v stages a unit is 1 / v of a rank's forward. The source of each figure stands beside it.
"""

from itertools import pairwise

import pytest

from jaxpar.schedule import (
    SCHEDULES,
    StageCosts,
    StageDag,
    Timetable,
    dualpipe_v,
    eager_1f1b,
    gpipe,
    interleaved_1f1b,
    kfkb,
    looped_bfs,
    one_f_one_b,
    simulate,
    v_half,
    v_min,
    validate_timetable,
    zb_h1,
    zb_h2,
    zb_v,
)
from jaxpar.schedule.needs import find_needs

RANKS = [1, 2, 3, 4, 5, 8, 12]


def counts(p: int) -> list[int]:
    """Numbers of micro-batches below, at and above each that matters for p ranks."""
    return sorted({1, 2, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p + 1, 4 * p} - {0})


CASES = [(p, m) for p in RANKS for m in counts(p)]
FULL = [(p, m) for p, m in CASES if m >= p]
LONG = [(p, m) for p, m in CASES if m >= 2 * p - 1]


def run_freely(timetable: Timetable):
    return simulate(validate_timetable(timetable), StageCosts.uniform(timetable.dag.num_stages), mode="free")


def find_gaps(timetable: Timetable) -> list[float]:
    """For each rank, its idle time between its first action and its last."""
    run = run_freely(timetable)
    orders = [timetable.order(rank) for rank in range(timetable.dag.num_ranks)]
    return [run.end[o[-1]] - run.start[o[0]] - busy for o, busy in zip(orders, run.busy, strict=True)]


def rounds(p: int, v: int) -> StageDag:
    return StageDag.chain(v * p, num_ranks=p, placement="round_robin")


def vee(p: int) -> StageDag:
    return StageDag.chain(2 * p, num_ranks=p, placement="v")


# One stage a rank, whole backwards


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(("p", "m"), CASES)
def test_gpipe(p, m, exchange):
    """https://arxiv.org/abs/1811.06965, section 2.3: bubble (p - 1) / (m + p - 1)."""
    timetable = gpipe(StageDag.chain(p), m, exchange=exchange)
    assert run_freely(timetable).makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == (m,) * p


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(("p", "m"), CASES)
def test_1f1b(p, m, exchange):
    """https://arxiv.org/abs/2104.04473, section 2.2.1: GPipe's bubble, at most p micro-batches in flight."""
    timetable = one_f_one_b(StageDag.chain(p), m, extra=0, exchange=exchange)
    assert run_freely(timetable).makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == tuple(min(m, p - r) for r in range(p))


@pytest.mark.parametrize("exchange", [1, 2])
@pytest.mark.parametrize(("p", "m"), CASES)
def test_eager_1f1b(p, m, exchange):
    """https://arxiv.org/abs/2211.05322: 2 (p - r) - 1 forwards before a rank starts to alternate."""
    timetable = eager_1f1b(StageDag.chain(p), m, exchange=exchange)
    assert run_freely(timetable).makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == tuple(min(m, 2 * (p - r) - 1) for r in range(p))


@pytest.mark.parametrize(("k", "exchange"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (4, 2)])
@pytest.mark.parametrize(("p", "m"), CASES)
def test_kfkb(p, m, k, exchange):
    """https://arxiv.org/abs/2303.01675: 1F1B of groups of k."""
    timetable = kfkb(StageDag.chain(p), m, k=k, exchange=exchange)
    assert run_freely(timetable).makespan == 3 * (m + p - 1)
    assert timetable.peak_in_flight == tuple(min(m, k * (p - r)) for r in range(p))


# Several stages a rank, whole backwards


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize(("p", "m"), FULL)
def test_interleaved_1f1b(p, m, v):
    """https://arxiv.org/abs/2104.04473, section 2.2.2, for m a multiple of p: 1 / v of 1F1B's bubble."""
    timetable = interleaved_1f1b(rounds(p, v), m)
    run = run_freely(timetable)
    assert run.makespan == 3 * (v * m + p - 1)
    assert run.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))
    if m % p == 0 and m >= 2 * p:  # fewer don't fill the first rank's warm-up
        assert timetable.peak_in_flight_on_rank == tuple(p * (v + 1) - 1 - 2 * r for r in range(p))


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in CASES if m < p])
def test_interleaved_1f1b_with_few_micro_batches_takes_no_longer_than_the_way_of_one(p, m, v):
    """The first micro-batch's forwards and backwards take 3 v p; the others follow one after the other."""
    assert run_freely(interleaved_1f1b(rounds(p, v), m)).makespan == 3 * (v * p + m - 1)


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize(("p", "m"), FULL)
def test_looped_bfs(p, m, v):
    """https://arxiv.org/abs/2211.05953: the bubble of the depth-first loop, which is interleaved 1F1B."""
    timetable = looped_bfs(rounds(p, v), m)
    assert run_freely(timetable).makespan == 3 * (v * m + p - 1)
    assert timetable.peak_in_flight_on_rank == (v * m,) * p


# Split backwards


@pytest.mark.parametrize(("p", "m"), FULL)
def test_zb_h1(p, m):
    """https://arxiv.org/abs/2401.10241, table 1: a bubble of (p - 1)(F + I - W), with 1F1B's peak."""
    timetable = zb_h1(StageDag.chain(p), m)
    assert run_freely(timetable).makespan == 3 * m + p - 1
    assert timetable.peak_in_flight == (p,) * p


@pytest.mark.parametrize(("p", "m"), LONG)
def test_zb_h2(p, m):
    """https://arxiv.org/abs/2401.10241, table 1: a bubble of (p - 1)(F + I - 2 W), with a peak of 2 p - 1."""
    timetable = zb_h2(StageDag.chain(p), m)
    assert find_gaps(timetable) == [0] * p
    assert timetable.peak_in_flight == (2 * p - 1,) * p


@pytest.mark.parametrize(("p", "m"), LONG)
def test_zb_v(p, m):
    """https://arxiv.org/abs/2401.10241, section 6: no bubble, with the memory of 1F1B: p micro-batches in each half."""
    timetable = zb_v(vee(p), m)
    assert find_gaps(timetable) == [0] * p
    assert timetable.peak_in_flight_on_rank == (2 * p,) * p


@pytest.mark.parametrize(
    ("schedule", "peak", "bubble"),
    [(v_half, lambda p: (p + 2) // 2, 3), (v_min, lambda p: (p + 4) // 3, 4)],
)
@pytest.mark.parametrize(("p", "m"), [(p, m) for p in [*RANKS, 6, 7, 16] for m in (p, 2 * p, 3 * p + 1) if m > 1])
def test_v_half_and_v_min(schedule, peak, bubble, p, m):
    """https://arxiv.org/abs/2405.15362; https://huggingface.co/spaces/sail/pipeline-parallelism-with-controllable-memory

    Peaks are in micro-batches, of which a stage holds a half. The bubble rate is about 1/2 and 2/3 of 1F1B's p / m; a
    micro-batch takes a rank 6 units here.
    """
    timetable = schedule(vee(p), m)
    assert max(timetable.peak_in_flight_on_rank) == min(2 * peak(p), 2 * m)
    assert run_freely(timetable).makespan <= 6 * m + bubble * p


# DualPipeV. A pair of F and B is one action there, and two here.

PAIR_COSTS = [(1, 1, 1, 3), (1, 1, 1, 2.5), (1, 1, 1, 2), (2, 2, 1, 5), (1, 2, 1, 3.5), (2, 3, 3, 7), (1, 1.5, 0.5, 2)]
SPANS = [(p, m) for p in (1, 2, 3, 4, 8) for m in (2 * p, 2 * p + 3, 4 * p)]


@pytest.mark.parametrize(("f", "i", "w", "_pair"), PAIR_COSTS)
@pytest.mark.parametrize(("ranks", "m"), SPANS)
def test_dualpipe_v(ranks, m, f, i, w, _pair):
    """With a pair's B before its F, and what the B made sent at once: the published bubble at F&B = B."""
    timetable = dualpipe_v(vee(ranks), m)
    costs = StageCosts((f,) * 2 * ranks, (i + w,) * 2 * ranks, input_backward=(i,) * 2 * ranks)
    run = simulate(validate_timetable(timetable), costs, mode="free")
    b = i + w
    assert run.idle == pytest.approx([(ranks - 1) * (b + b - 3 * w)] * ranks)
    assert max(timetable.peak_in_flight_on_rank) == 2 * ranks


@pytest.mark.parametrize(("f", "i", "w", "pair"), PAIR_COSTS)
@pytest.mark.parametrize(("ranks", "m"), SPANS)
def test_dualpipe_v_with_pairs_as_one_action(ranks, m, f, i, w, pair):
    """https://github.com/deepseek-ai/DualPipe: a bubble of (pp / 2 - 1)(F&B + B - 3 W), pp stages on pp / 2 ranks."""
    makespan, busy = run_pairs(dualpipe_v(vee(ranks), m), {"F": f, "B": i + w, "I": i, "W": w}, pair)
    assert makespan - min(busy) == pytest.approx((ranks - 1) * (pair + i + w - 3 * w))


def run_pairs(timetable: Timetable, cost: dict[str, float], pair: float) -> tuple[float, list[float]]:
    """The makespan and each rank's busy time if a B and the F behind it are one action, which gives all at its end."""
    ranks = range(timetable.dag.num_ranks)
    blocks = [join_pairs(timetable.order(rank)) for rank in ranks]
    times = [[pair if len(block) == 2 else cost[block[0].kind] for block in row] for row in blocks]
    known = {action for row in blocks for block in row for action in block}
    end: dict = {}
    free_at = [0.0] * len(ranks)
    done = [0] * len(ranks)
    while any(done[r] < len(blocks[r]) for r in ranks):
        before = list(done)
        for r in ranks:
            while done[r] < len(blocks[r]):
                block = blocks[r][done[r]]
                needs = {n for action in block for n in find_needs(timetable.dag, action, known)} - set(block)
                if not needs <= end.keys():
                    break
                free_at[r] = max([free_at[r], *(end[n] for n in needs)]) + times[r][done[r]]
                end |= dict.fromkeys(block, free_at[r])
                done[r] += 1
        assert done != before, "deadlock"
    return max(free_at), [sum(row) for row in times]


def join_pairs(order) -> list[tuple]:
    blocks: list[tuple] = []
    for action in order:
        if action.kind == "F" and blocks and [a.kind for a in blocks[-1]] == ["B"]:
            blocks[-1] += (action,)
        else:
            blocks.append((action,))
    return blocks


# Stages that are not a chain


@pytest.mark.parametrize(
    ("a", "b", "m", "makespan", "in_flight", "of_chain"),
    [(2, 2, 8, 33, 17, 39), (3, 2, 8, 36, 27, 45), (4, 2, 16, 63, 39, 75), (4, 4, 16, 69, 62, 81)],
)
@pytest.mark.parametrize("exchange", [1, 2])
def test_two_towers_and_a_trunk(a, b, m, makespan, in_flight, of_chain, exchange):
    """1F1B bounded by depth (GraphPipe, https://arxiv.org/abs/2406.17145): the towers run side by side.

    3 (m + a + b - 1) against 3 (m + 2 a + b - 1) for a chain of the same stages; worked out by hand.
    """
    graph = one_f_one_b(towers(a, b), m, extra=0, exchange=exchange)
    assert run_freely(graph).makespan == makespan
    assert sum(graph.peak_in_flight) == in_flight
    assert run_freely(one_f_one_b(StageDag.chain(2 * a + b), m, extra=0, exchange=exchange)).makespan == of_chain


def towers(a: int, b: int) -> StageDag:
    """Two towers of a stages each, which join in a trunk of b stages; a rank for each stage."""
    first, second, trunk = range(a), range(a, 2 * a), range(2 * a, 2 * a + b)
    ways = [[*first, *trunk], [*second, *trunk]]
    forward = tuple(sorted({edge for way in ways for edge in pairwise(way)}))
    return StageDag(2 * a + b, forward, tuple((y, x) for x, y in forward), tuple(range(2 * a + b)), 2 * a + b)


# The executor's ticks


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "zb_v", "v_half", "v_min"])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p in (2, 4, 8) for m in (3, p, 4 * p)])
def test_zero_bubble_schedules_lose_nothing_to_lockstep(name, p, m):
    """With F = I = W all ticks take the same time, so that at `exchange=1` lockstep is free."""
    timetable = SCHEDULES[name](StageDag.chain(p) if name in ("zb_h1", "zb_h2") else vee(p), m)
    costs = StageCosts.uniform(timetable.dag.num_stages)
    assert simulate(timetable, costs).makespan == simulate(timetable, costs, mode="free").makespan
