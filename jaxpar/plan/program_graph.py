"""From a traced step to the graph of operators that planners work on, and from their plan back to its equations.

The graph is the stage graph at the finest cut: every block of the forward pass a stage of its own, closed under data
flow (`route_values`), with the backward cut into I and W. So edges, bytes and times are those of programs that would
really run; what a planner merges, it sums.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from jaxpar import _jax
from jaxpar.errors import PlanError
from jaxpar.plan.block_program import BlockProgram, CostModel, collect_programs, name_kind
from jaxpar.plan.blocks import Block, form_blocks
from jaxpar.plan.costs import Roofline, estimate_seconds
from jaxpar.plan.flow import Flow, analyse_flow
from jaxpar.plan.homes import find_state_roots, home_state
from jaxpar.plan.op_graph import Op, OpEdge, OpGraph
from jaxpar.plan.routing import route_values
from jaxpar.plan.stages import Node, StageGraph
from jaxpar.plan.time_curve import TimeCurve
from jaxpar.trace import Eqn, Partial, Program, Var

_EXAMPLES = 16  # in a micro-batch, where blocks are formed and residuals chosen: the same blocks for every batch size
_BALANCE = Roofline(1.5e14, 1.5e12, 1e11)  # likewise for every device: of an accelerator, 100 flop for each byte
_MOST_SIZES = 1024


@dataclass(frozen=True, eq=False)
class ProgramGraph:
    """A program's operators: `blocks[i]` holds the forward equations of `graph.ops[i]`."""

    graph: OpGraph
    blocks: tuple[Block, ...]
    flow: Flow
    stages: StageGraph  # every block a stage
    programs: Mapping[Node, BlockProgram]

    @cached_property
    def late_edges(self) -> tuple[tuple[int, int], ...]:
        """Edges of the backward that mirror no edge of the forward: (source, target) by operator."""
        forward = set(self.stages.edges(forward=True))
        return tuple((a, b) for a, b in self.stages.edges(forward=False) if (b, a) not in forward)

    def assign_stages(self, plan_graph: OpGraph, stage_of: Sequence[int]) -> dict[Eqn, int]:
        """The stage of each forward equation, for `plan_stages` and `route_values`.

        Args:
            plan_graph: the graph that the plan was made for; its operators are found by name.
            stage_of: the stage of each of its operators. Stages are numbered so that edges go to higher ones.

        Raises: PlanError where an operator is not in this program, or computes something else; it names the stages.
        """
        check_operators(plan_graph, self.graph, stage_of)
        stage = {op.name: s for op, s in zip(plan_graph.ops, stage_of, strict=True)}
        return {eqn: stage[block.name] for block in self.blocks for eqn in block.eqns}

    def __str__(self) -> str:
        kinds = len({op.kind for op in self.graph.ops})
        return (
            f"{len(self.blocks)} operators, {kinds} of them different, {len(self.graph.edges)} edges, from "
            f"{len(self.flow.forward)} equations forward and {len(self.flow.backward)} backward"
        )


def build_program_graph(
    program: Program,
    updated: Mapping[int, int],
    costs: CostModel,
    sizes: Sequence[int] | None = None,
    max_blocks: int = 256,
) -> ProgramGraph:
    """The operators of a traced step with their costs.

    Args:
        program: the step.
        updated: index of the output that is the new value of a state input, by the input's index.
        costs: asked for the time of each different program once.
        sizes: numbers of examples that times are asked for, increasing; powers of two up to the batch by default.
        max_blocks: how many operators there may be, see `form_blocks`.
    """
    flow = analyse_flow(program, updated)
    blocks = form_blocks(flow, estimate_balance(flow), max_blocks)
    block_of = {eqn: i for i, block in enumerate(blocks) for eqn in block.eqns}
    count = len(blocks)
    stages = route_values(flow, block_of, range(count), count, _EXAMPLES, split=bool(flow.backward))
    programs = collect_programs(stages)
    different = {p.digest: p for p in programs.values()}
    curves = costs.time(different, sizes or _powers_of_two(program.num_examples))
    state = _own_state(program, stages, updated)
    residuals = _residual_bytes(flow, stages, block_of)
    outputs, edges = _moved_bytes(stages)
    gradients = _gradient_bytes(stages)
    ops = []
    for i, block in enumerate(blocks):
        forward, first, whole = (
            curves[p.digest] if (p := programs.get((kind, i))) is not None else TimeCurve.per_example(0.0)
            for kind in "FIB"
        )
        parameters, owned = state[i]
        ops.append(
            Op(
                block.name,
                forward,
                *_split(first, whole),
                parameter_bytes=parameters,
                state_bytes=owned,
                gradient_bytes=gradients[i],
                residual_bytes=residuals[i],
                output_bytes=outputs[i],
                kind=name_kind(programs, i),
            )
        )
    graph = OpGraph(tuple(ops), tuple(OpEdge(a, b, x) for (a, b), x in sorted(edges.items())), costs.device)
    return ProgramGraph(graph, blocks, flow, stages, programs)


def check_operators(planned: OpGraph, actual: OpGraph, stage_of: Sequence[int]) -> None:
    """Check that a plan's operators are those of a program: the same names, and the same kinds where the plan has any.

    Raises: PlanError that names each stage with an operator that is gone or computes something else, and each operator
        that the plan lacks.
    """
    lines = []
    for op, s in zip(planned.ops, stage_of, strict=True):
        if op.name not in actual.index:
            lines.append(f"  stage {s}: {op.name!r} is not in the step")
        elif op.kind and op.kind != actual.ops[actual.index[op.name]].kind:
            lines.append(f"  stage {s}: {op.name!r} computes something else: its operations, shapes or dtypes changed")
    lines += [f"  no stage: {op.name!r} is new" for op in actual.ops if op.name not in planned.index]
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise PlanError(
            f"the plan is for another step: of its {planned.num_ops} operators and the step's {actual.num_ops},\n"
            + "\n".join([*lines[:20], *more])
            + "\nPlan the step as it is now, or go back to the one that was planned."
        )


def replace_times(graph: OpGraph, times: Mapping[str, Sequence[TimeCurve | float]], device: str = "") -> OpGraph:
    """The graph with the times that the user knows.

    Args:
        graph: operators and bytes.
        times: forward, input-backward and weight-backward of an operator by its name, or of all operators whose name
            begins so, up to a `/`, of which each gets an equal part.
        device: what the times are for; the graph's by default.

    Raises: PlanError that lists each name that is no operator's.

    >>> graph = OpGraph.build([Op("net/a", 1.0), Op("net/b", 1.0)], [("net/a", "net/b")])
    >>> replace_times(graph, {"net": (4.0, 4.0, 2.0)}).forward_seconds(1)
    array([2., 2.])
    """
    ops, unknown = {op.name: op for op in graph.ops}, []
    for name, given in times.items():
        inside = [op for op in graph.ops if op.name == name or op.name.startswith(f"{name}/")]
        inside = [op for op in inside if op.name == name] or inside
        if not inside or len(given) != 3:
            problem = "no operator is called so" if not inside else f"{len(given)} times instead of three (F, I, W)"
            unknown.append(f"  {name!r}: {problem}")
            continue
        curves = [t if isinstance(t, TimeCurve) else TimeCurve.per_example(t) for t in given]
        for op in inside:
            f, i, w = (curve.scaled(1 / len(inside)) for curve in curves)
            ops[op.name] = replace(op, forward=f, input_backward=i, weight_backward=w)
    if unknown:
        known = ", ".join(op.name for op in graph.ops[:20])
        raise PlanError("times can't be used:\n" + "\n".join(unknown) + f"\nThe operators are: {known} ...")
    return OpGraph(tuple(ops[op.name] for op in graph.ops), graph.edges, device or graph.device)


# -- costs -------------------------------------------------------------------------------------------------------------


def estimate_balance(flow: Flow) -> list[float]:
    """Rough seconds of each forward equation and of the backward equations that belong to it."""
    seconds = [estimate_seconds(eqn, _EXAMPLES, _BALANCE) for eqn in flow.forward]
    for eqn, anchor in flow.anchor.items():
        seconds[anchor] += estimate_seconds(eqn, _EXAMPLES, _BALANCE)
    return seconds


def _powers_of_two(most: int) -> list[int]:
    return [2**k for k in range(min(most, _MOST_SIZES).bit_length())]


def _split(first: TimeCurve, whole: TimeCurve) -> tuple[TimeCurve, TimeCurve]:
    """I and W that sum to the whole backward: W is the rest, since both repeat some of the forward's cheap work."""
    sizes = [n for n, _ in whole.points]
    i = TimeCurve(tuple((n, min(first(n), whole(n))) for n in sizes))
    return i, TimeCurve(tuple((n, whole(n) - i(n)) for n in sizes))


def _own_state(program: Program, stages: StageGraph, updated: Mapping[int, int]) -> list[tuple[float, float]]:
    """(parameter bytes, state bytes) of each block: each piece of state belongs to one."""
    homes, roots = home_state(program, stages, updated), find_state_roots(program)
    read: dict[int, set[Var]] = defaultdict(set)
    for (_, s), node in stages.programs.items():
        for v in node.invariants:
            read[s].update(roots.get(v, ()))
    parameters, owned = np.zeros(stages.num_stages), np.zeros(stages.num_stages)
    for i, home in homes.stage.items():
        if home is not None:
            size = program.inputs[i].bytes_at(1)
            owned[home] += size
            parameters[home] += size if program.inputs[i] in read[home] else 0
    return list(zip(parameters.tolist(), owned.tolist(), strict=True))


def _gradient_bytes(stages: StageGraph) -> list[float]:
    """Of the accumulators of each block; sums of half-precision values are kept in single precision."""
    found = [0.0] * stages.num_stages
    for v, s in stages.partial_home.items():
        kind = stages.program.types[v]
        floats = isinstance(kind, Partial) and kind.op == "sum" and v.dtype.kind not in "iub"
        half = floats and _jax.dtype_bytes(v.dtype) == 2
        found[s] += v.bytes_at(1) * (2 if half else 1)
    return found


def _residual_bytes(flow: Flow, stages: StageGraph, block_of: Mapping[Eqn, int]) -> list[float]:
    """Per example, what each block keeps: of the values that the uncut program keeps, those that its backward reads.

    A block on its own keeps more: what it receives from the block before, where that could have been recomputed.
    Counted for every block, that would be up to twice what a stage of several blocks keeps.
    """
    whole = route_values(flow, dict.fromkeys(block_of, 0), (0,), 1, _EXAMPLES)
    kept = {v for bundle in whole.bundles if bundle.source[0] == "F" for v in bundle.values}
    held: dict[Var, set[int]] = defaultdict(set)
    for bundle in stages.bundles:
        if bundle.source[0] == "F" and bundle.last_reader[0] != "F":
            for v in bundle.values:
                held[v].add(bundle.stage)
    found = [0.0] * stages.num_stages
    for v in kept:
        for s in held.get(v) or {block_of[flow.program.producer[v]]}:
            found[s] += _bytes_per_example(v)
    return found


def _moved_bytes(stages: StageGraph) -> tuple[list[float], dict[tuple[int, int], float]]:
    """Per example: the values that each block gives to others, and what each edge carries."""
    outputs = [0.0] * stages.num_stages
    edges: Counter[tuple[int, int]] = Counter()
    sent: dict[int, set[Var]] = defaultdict(set)
    for bundle in stages.bundles:
        kind, source = bundle.source
        if kind != "F":
            continue
        size = math.fsum(map(_bytes_per_example, bundle.values))
        if bundle.travels:
            edges[source, bundle.stage] += size  # type: ignore[assignment]
            sent[source].update(bundle.values)
    for s, values in sent.items():
        outputs[s] = math.fsum(map(_bytes_per_example, values))
    return outputs, dict(edges)


def _bytes_per_example(v: Var) -> float:
    return (v.bytes_at(2 * _EXAMPLES) - v.bytes_at(_EXAMPLES)) / _EXAMPLES
