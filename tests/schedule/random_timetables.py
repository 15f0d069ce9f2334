"""Problems to search, and valid timetables for them drawn blindly: any ready micro-batch, any order, idle at will."""

import random

from jaxpar.schedule import Action, Link, StageCosts, StageDag, Timetable
from jaxpar.schedule.memory import MemoryLimit
from jaxpar.schedule.problem import SearchProblem


def draw_dag(rng: random.Random, max_stages: int, max_ranks: int) -> StageDag:
    """A chain, or any acyclic graph; backwards are the mirror or edges of their own; ranks may share or be empty."""
    stages = rng.randint(1, max_stages)
    pairs = [(a, b) for b in range(stages) for a in range(b)]
    chain = tuple((s, s + 1) for s in range(stages - 1))
    forward = chain if rng.random() < 0.5 else tuple(edge for edge in pairs if rng.random() < 0.5)
    has_backward = rng.random() < 0.9
    mirror = forward if rng.random() < 0.8 else tuple(edge for edge in pairs if rng.random() < 0.5)
    backward = tuple((b, a) for a, b in mirror) if has_backward else ()
    ranks = rng.randint(1, max_ranks)
    rank_of = tuple(rng.randrange(ranks) for _ in range(stages)) if ranks < stages else tuple(range(stages))
    return StageDag(stages, forward, backward, rank_of, max(ranks, max(rank_of) + 1), has_backward)


def draw_problem(
    seed: int, *, max_stages: int = 4, max_ranks: int = 3, max_microbatches: int = 4, in_bytes: bool = True
) -> SearchProblem:
    """Costs equal, small integers or any; transfers none, late, or on busy links; memory tight, loose or none."""
    rng = random.Random(seed)
    dag = draw_dag(rng, max_stages, max_ranks)
    draw = rng.choice([lambda: 1.0, lambda: float(rng.randint(1, 3)), lambda: rng.uniform(0.1, 2)])
    forward = tuple(draw() for _ in range(dag.num_stages))
    backward = tuple(2 * draw() for _ in range(dag.num_stages))
    part = tuple(rng.uniform(0, 1) * b for b in backward) if rng.random() < 0.5 else None
    edges = dag.forward + dag.backward
    transfers = {edge: rng.uniform(0, 1.5) for edge in edges if rng.random() < 0.7}
    ways: list[dict] = [{}, {"transfer": 0.3}, {"transfer": transfers}]
    ways += [{"sent_bytes": sent, "link": Link(rng.choice([0.0, 0.2]), 1.0)} for sent in (0.4, transfers)]
    memory = None
    if rng.random() < 0.6:
        held = tuple(float(rng.randint(1, 3)) if in_bytes else 1.0 for _ in range(dag.num_stages))
        kept = tuple(h * rng.choice([0.0, 0.5, 1.0]) for h in held) if in_bytes else held
        least = [sum(held[s] for s in dag.stages_on(rank)) for rank in range(dag.num_ranks)]
        memory = MemoryLimit(tuple(x + rng.randint(0, 3) for x in least), held, kept)
    costs = StageCosts(forward, backward, input_backward=part, **rng.choice(ways))
    return SearchProblem(dag, rng.randint(1, max_microbatches), costs, memory, rng.random() < 0.6)


def draw_timetable(problem: SearchProblem, seed: int) -> Timetable:
    """A valid timetable within the memory limit."""
    rng = random.Random(seed)
    for exchange in (rng.choice([1, 2]), 1, 2, 1, 2, 1, 2):
        drawn = _draw(problem, rng, exchange)
        if drawn is not None:
            return drawn
    raise AssertionError("random orders always run out of memory here")


def _draw(problem: SearchProblem, rng: random.Random, exchange: int) -> Timetable | None:
    dag, most, idle = problem.dag, problem.num_microbatches, rng.choice([0.0, 0.1, 0.4])
    at: dict[Action, int] = {}
    left = {
        Action(kind, s, m)
        for kind in ("FB" if dag.has_backward else "F")
        for s in range(dag.num_stages)
        for m in range(most)
    }
    grid: list[list[Action | None]] = []
    quiet = 0
    while left and quiet < 30:
        tick, row = len(grid), []
        for rank in range(dag.num_ranks):
            ready = [a for a in left if dag.rank_of[a.stage] == rank and _is_ready(problem, a, at, tick, exchange)]
            ready = sorted(ready, key=str)
            if problem.split_backward:
                ready += [Action("I", a.stage, a.microbatch) for a in ready if a.kind == "B"]
            ready = [a for a in ready if a.kind != "F" or _has_room(problem, rank, a.stage, at)]
            row.append(rng.choice(ready) if ready and rng.random() >= idle else None)
        for action in filter(None, row):
            at[action] = tick
            if action.kind == "I":
                left.remove(Action("B", action.stage, action.microbatch))
                left.add(Action("W", action.stage, action.microbatch))
            else:
                left.remove(action)
        quiet = 0 if any(row) else quiet + 1
        grid.append(row)
    return None if left else Timetable("drawn", dag, most, tuple(map(tuple, grid)), exchange)


def _is_ready(problem: SearchProblem, action: Action, at: dict[Action, int], tick: int, exchange: int) -> bool:
    dag, stage, m = problem.dag, action.stage, action.microbatch

    def came(kinds: str, source: int) -> bool:
        return any(at.get(Action(k, source, m), tick) + dag.lag(source, stage, exchange) <= tick for k in kinds)

    if action.kind == "F":
        return all(came("F", p) for p in dag.forward_sources[stage])
    if action.kind == "W":
        return came("I", stage)
    return came("F", stage) and all(came("BI", p) for p in dag.backward_sources[stage])


def _has_room(problem: SearchProblem, rank: int, stage: int, at: dict[Action, int]) -> bool:
    memory = problem.memory
    if memory is None or not problem.dag.has_backward:
        return True
    taken = memory.held[stage]
    for action in at:
        s = action.stage
        if problem.dag.rank_of[s] == rank:
            change = {
                "F": memory.held[s],
                "B": -memory.held[s],
                "I": memory.kept[s] - memory.held[s],
                "W": -memory.kept[s],
            }
            taken += change[action.kind]
    return taken <= memory.per_rank[rank]
