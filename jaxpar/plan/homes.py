"""Which stage keeps each piece of the training state.

A parameter lives at the first stage that reads it. What the update computes together with it (its moments, its
average) lives with it: the same number of elements first, then whatever the update's equations connect. Scalars,
counters and PRNG keys are kept by every rank.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxpar.plan.stages import StageGraph
from jaxpar.trace import Program, Var


@dataclass(frozen=True)
class Homes:
    """`stage[i]`: the stage that keeps input i of the program, None for every rank. `order`: a canonical order of the
    inputs at their stage (parameters by first use, then what belongs to them), so that equal stages list equal state.
    """

    stage: Mapping[int, int | None]
    order: Mapping[int, tuple[int, int]]


def home_state(program: Program, graph: StageGraph, updated: Mapping[int, int]) -> Homes:
    """Find a home for each state input.

    Args:
        program: the step.
        graph: its stages.
        updated: index of the output that is the new value of a state input, by the input's index.
    """
    state = [i for i, role in enumerate(program.roles) if role == "state"]
    owned = [i for i in state if not program.inputs[i].is_replicated]
    first_use = _first_use(program, graph)
    stage: dict[int, int | None] = {i: None for i in state if i not in set(owned)}
    origin: dict[int, int] = {}
    for i in owned:
        if program.inputs[i] in first_use:
            stage[i], origin[i] = first_use[program.inputs[i]][0], i
    by_size = _neighbours(program, lambda a, b: math.prod(a.shape) == math.prod(b.shape))  # type: ignore[arg-type]
    any_size = _neighbours(program, lambda a, b: True)
    for graph_of_vars in (by_size, any_size):
        _spread(program, owned, updated, graph_of_vars, stage, origin)
    _place_unconnected(program, owned, stage, origin, graph.num_stages)
    order = {}
    for i in owned:
        position = first_use.get(program.inputs[origin[i]], (0, len(program.eqns) + origin[i]))[1]
        order[i] = (position, 0 if origin[i] == i else i - state[0] + 1)
    return Homes(stage, order)


def state_read_by(graph: StageGraph, stage: int) -> set[Var]:
    """The state inputs that a stage's programs read, through what is computed from them beforehand."""
    roots = find_state_roots(graph.program)
    nodes = [p for (_, s), p in graph.programs.items() if s == stage]
    return {root for node in nodes for v in node.invariants for root in roots.get(v, ())}


def find_state_roots(program: Program) -> dict[Var, tuple[Var, ...]]:
    """The state inputs behind each value that is known before the pipeline starts."""
    roots: dict[Var, tuple[Var, ...]] = {
        v: (v,) for v, role in zip(program.inputs, program.roles, strict=True) if role == "state"
    }
    for eqn in program.eqns:
        if program.phase[eqn] == "before":
            behind = tuple(dict.fromkeys(r for v in eqn.reads for r in roots.get(v, ())))
            for v in eqn.outputs:
                roots[v] = behind
    return roots


def _first_use(program: Program, graph: StageGraph) -> dict[Var, tuple[int, int]]:
    """(stage, position) of the first stage that reads each state input."""
    roots = find_state_roots(program)
    found: dict[Var, tuple[int, int]] = {}
    for (_, stage), node in sorted(graph.programs.items(), key=lambda item: (item[0][0] != "F", item[0][1])):
        for v in node.invariants:
            for root in roots.get(v, ()):
                found.setdefault(root, (stage, len(found)))
    return found


Graph = Mapping[Var, list[Var]]


def _neighbours(program: Program, connects: object) -> Graph:
    """Values joined by an equation of the update."""
    graph: dict[Var, list[Var]] = defaultdict(list)
    for eqn in program.eqns:
        if program.phase[eqn] not in ("after", "linear"):
            continue
        large = [v for v in (*eqn.reads, *eqn.outputs) if math.prod(v.shape) > 1]  # type: ignore[arg-type]
        for a in large:
            for b in large:
                if a is not b and connects(a, b):  # type: ignore[operator]
                    graph[a].append(b)
    return graph


def _spread(
    program: Program,
    owned: Iterable[int],
    updated: Mapping[int, int],
    graph: Graph,
    stage: dict[int, int | None],
    origin: dict[int, int],
) -> None:
    """Breadth-first from the state that has a home, through the update, to the state that has none."""
    index: dict[Var, int] = {}
    reached: dict[Var, int] = {}
    for i in owned:
        ends = [program.inputs[i]]
        if i in updated and isinstance(out := program.outputs[updated[i]], Var):
            ends.append(out)
        for v in ends:
            index[v] = i
            if i in stage:
                reached[v] = i
    queue = deque(reached)
    while queue:
        v = queue.popleft()
        source = reached[v]
        leaf = index.get(v)
        if leaf is not None and leaf not in stage:
            stage[leaf], origin[leaf] = stage[source], origin[source]
        for other in graph.get(v, ()):
            if other not in reached:
                reached[other] = source
                queue.append(other)


def _place_unconnected(
    program: Program, owned: Iterable[int], stage: dict[int, int | None], origin: dict[int, int], num_stages: int
) -> None:
    """State that nothing connects to a stage goes where least is."""
    load = [0] * num_stages
    for i, home in stage.items():
        if home is not None:
            load[home] += program.inputs[i].bytes_at(1)
    for i in owned:
        if i not in stage:
            lightest = min(range(num_stages), key=load.__getitem__)
            stage[i], origin[i] = lightest, i
            load[lightest] += program.inputs[i].bytes_at(1)
