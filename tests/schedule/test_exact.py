import itertools

import pytest

from jaxpar.errors import ScheduleError
from jaxpar.schedule import Action, StageCosts, StageDag, Timetable, one_f_one_b, simulate, validate_timetable
from jaxpar.schedule.bounds import bound_makespan
from jaxpar.schedule.exact import find_optimum
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.problem import SearchProblem

from .random_timetables import draw_problem, draw_timetable


def least_by_force(problem: SearchProblem, ticks: int) -> float:
    """The least makespan of all grids of so many ticks, each checked by the validator."""
    dag, most = problem.dag, problem.num_microbatches
    rows = []
    for rank in range(dag.num_ranks):
        ways = set()
        stages = dag.stages_on(rank)
        for splits in itertools.product((False, True), repeat=len(stages) * most):
            if any(splits) and not problem.split_backward:
                continue
            actions = [Action("F", s, m) for s in stages for m in range(most)]
            for split, (s, m) in zip(splits, itertools.product(stages, range(most)), strict=True):
                actions += [Action(kind, s, m) for kind in ("IW" if split else "B")]
            if len(actions) <= ticks:
                cells = [*actions, *[None] * (ticks - len(actions))]
                ways |= {way for way in _permute(cells) if _keeps_order(way)}
        rows.append(ways)
    best = float("inf")
    for exchange in (1, 2):
        for grid in itertools.product(*rows):
            timetable = Timetable("forced", dag, most, tuple(zip(*grid, strict=True)), exchange)
            if not problem.accepts(timetable):
                continue
            makespan = simulate(timetable, problem.costs).makespan
            if makespan < best and _is_valid(timetable):
                best = makespan
    return best


def _permute(cells):
    """Distinct orders: which cells are idle, then an order of the actions."""
    actions = [cell for cell in cells if cell is not None]
    for places in itertools.combinations(range(len(cells)), len(actions)):
        for order in itertools.permutations(actions):
            way = [None] * len(cells)
            for place, action in zip(places, order, strict=True):
                way[place] = action
            yield tuple(way)


def _keeps_order(way) -> bool:
    """F before B or I before W on the rank itself, and micro-batches in order; only to try fewer grids."""
    at = {(a.kind, a.stage, a.microbatch): t for t, a in enumerate(way) if a is not None}
    ranks = {"F": 0, "B": 1, "I": 1, "W": 2}
    if any(at[k, s, m] < at.get((k, s, m - 1), -1) for (k, s, m) in at):
        return False
    return all(
        at[k, s, m] < at[k2, s, m] for (k, s, m) in at for k2 in "BIW" if ranks[k] < ranks[k2] and (k2, s, m) in at
    )


def _is_valid(timetable) -> bool:
    try:
        validate_timetable(timetable)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize(
    ("dag", "m", "ticks", "split"),
    [
        (StageDag.chain(1), 2, 6, True),
        (StageDag.chain(2), 1, 7, True),
        (StageDag.chain(2), 2, 8, False),
        (StageDag(2, ((0, 1),), ((1, 0),), (0, 0), 1), 1, 6, True),
        (StageDag(2, ((0, 1),), (), (0, 1), 2), 1, 5, True),
    ],
)
@pytest.mark.parametrize(
    "costs",
    [
        StageCosts((1.0, 1.0), (2.0, 2.0)),
        StageCosts((1.0, 2.5), (0.7, 3.0), 0.4, (0.5, 1.0)),
        StageCosts((2.0, 0.5), (1.5, 0.25), {(1, 0): 2.0}, (0.0, 0.25)),
    ],
)
def test_equals_all_grids(dag, m, ticks, split, costs):
    """Over every grid of as many ticks as could be of use."""
    edges = costs.transfer if (1, 0) in dag.backward or not isinstance(costs.transfer, dict) else 0.0
    costs = StageCosts(
        costs.forward[: dag.num_stages],
        costs.backward[: dag.num_stages],
        edges,
        costs.input_backward and costs.input_backward[: dag.num_stages],
    )
    problem = SearchProblem(dag, m, costs, None, split)
    best = find_optimum(problem)
    validate_timetable(best)
    assert simulate(best, costs).makespan == pytest.approx(least_by_force(problem, ticks))


def check_below_drawn(seeds):
    for seed in seeds:
        problem = draw_problem(seed, max_stages=3, max_ranks=3, max_microbatches=3)
        best = find_optimum(problem)
        validate_timetable(best)
        assert problem.accepts(best)
        makespan = simulate(best, problem.costs).makespan
        assert makespan >= bound_makespan(problem).best * (1 - 1e-9)
        for other in range(20):
            try:
                drawn = draw_timetable(problem, other)
            except AssertionError:
                break  # blind orders block each other in tight memory
            assert simulate(drawn, problem.costs).makespan >= makespan * (1 - 1e-9), seed


def test_nothing_drawn_blindly_is_better():
    check_below_drawn(range(30))


@pytest.mark.slow
def test_nothing_drawn_blindly_is_better_on_many():
    check_below_drawn(range(100, 600))


def test_lockstep_at_textbook_memory():
    """With S - s in flight and B = 2F, ticks cost a little over the free 3 (M + S - 1) = 24, greedy ones more."""
    dag = StageDag.chain(4)
    memory = MemoryLimit((4, 3, 2, 1), (1.0,) * 4)
    problem = SearchProblem(dag, 5, StageCosts.uniform(4), memory, split_backward=False)
    best = find_optimum(problem)
    assert simulate(best, problem.costs).makespan == 25
    assert memory.peaks(best) == (4, 3, 2, 1)
    greedy = [one_f_one_b(dag, 5, extra=0, exchange=exchange) for exchange in (1, 2)]
    assert min(simulate(timetable, problem.costs).makespan for timetable in greedy) == 27


def test_an_optimal_incumbent_comes_back():
    dag, costs = StageDag.chain(3), StageCosts.uniform(3)
    known = one_f_one_b(dag, 3, extra=3)
    assert simulate(known, costs).makespan == 15
    assert find_optimum(SearchProblem(dag, 3, costs, None, split_backward=False), incumbent=known) is known


def test_too_large():
    problem = SearchProblem(StageDag.chain(6), 12, StageCosts((1, 2, 1, 1.5, 1, 1), (2, 2.2, 2, 2, 2.1, 2), 0.2))
    with pytest.raises(ScheduleError, match=r"too large .* 6 stages on 6 ranks and 12 micro-batches .* more than 50"):
        find_optimum(problem, most=50)
