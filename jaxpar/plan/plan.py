"""The plan: from a program to stages, and what they cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxpar.errors import PlanError
from jaxpar.plan.costs import Roofline, count_flops, estimate_seconds
from jaxpar.plan.cuts import (
    ForwardOrder,
    balance_stages,
    cut_at_modules,
    depth_first_order,
    order_forward,
    program_order,
)
from jaxpar.plan.flow import Flow, analyse_flow
from jaxpar.plan.homes import Homes, home_state, state_read_by
from jaxpar.plan.routing import route_values
from jaxpar.plan.stages import StageGraph, StageProgram
from jaxpar.schedule import StageCosts, StageDag
from jaxpar.text import format_bytes, format_table
from jaxpar.trace import Eqn, Program, Var


@dataclass(frozen=True)
class StageSummary:
    """What one stage is and costs, per micro-batch on one of its replicas."""

    modules: str
    replicas: int
    parameters: int  # elements of the state that its programs read and it owns
    state_bytes: int  # of all the state that it owns
    forward_flops: float
    backward_flops: float
    forward_seconds: float
    backward_seconds: float
    input_backward_seconds: float | None  # of I, where the backward is split into I and W
    residual_bytes: int  # kept from the forward to the backward, per micro-batch in flight
    weight_residual_bytes: int  # kept for W after I, per micro-batch; 0 where the backward isn't split
    sent_bytes: int  # per micro-batch, forwards and backwards


@dataclass(frozen=True, eq=False)
class Plan:
    """Stages, what each costs, and where the state lives. Printable."""

    graph: StageGraph
    homes: Homes
    summaries: tuple[StageSummary, ...]
    microbatch: int
    groups: tuple[tuple[int, ...], ...]  # of the graph's ranks: the positions on the stage axis that are its replicas
    flow: Flow = field(repr=False)
    forward_stage: Mapping[Eqn, int] = field(repr=False)
    device: Roofline = field(repr=False)
    recompute: frozenset[int] = frozenset()  # stages whose backward repeats their forward

    @property
    def costs(self) -> StageCosts:
        """Seconds and bytes of each stage and edge, of one replica; without links, so transfers are free."""
        sent: Counter[tuple[int, int]] = Counter()
        for b in self.graph.bundles:
            if b.travels:
                rows = max(self.graph.shares[s].count for s in (b.source[1], b.stage))
                sent[b.source[1], b.stage] += sum(v.bytes_at(rows) for v in b.values)
        parts = [s.input_backward_seconds for s in self.summaries if s.input_backward_seconds is not None]
        return StageCosts(
            forward=tuple(s.forward_seconds for s in self.summaries),
            backward=tuple(s.backward_seconds for s in self.summaries),
            input_backward=tuple(parts) if parts else None,
            residual_bytes=tuple(s.residual_bytes for s in self.summaries),
            weight_residual_bytes=tuple(s.weight_residual_bytes for s in self.summaries) if parts else None,
            sent_bytes=sent,
        )

    def with_backwards(self, split: bool) -> Plan:
        """The same stages with each backward cut into I and W, or whole."""
        if split == self.graph.is_split or not self.graph.has_backward:
            return self
        rank_of, replicas = self.graph.rank_of, tuple(map(len, self.groups))
        graph = route_values(
            self.flow, self.forward_stage, rank_of, len(replicas), self.microbatch, split, replicas, self.recompute
        )
        assert graph.dag == self.graph.dag
        stages = range(graph.num_stages)
        summaries = tuple(_summarise(graph, self.homes, s, replicas[rank_of[s]], self.device) for s in stages)
        return replace(self, graph=graph, summaries=summaries)

    def __str__(self) -> str:
        count, rows_each = len(self.summaries), self.microbatch
        examples = f"{rows_each} example{'s' * (rows_each != 1)}"
        wide = any(s.replicas > 1 for s in self.summaries)
        per = " on one replica" if wide else ""
        head = f"Plan: {count} stages, micro-batches of {examples} (analytic costs per micro-batch{per})"
        for_w = ("for W",) if self.graph.is_split else ()
        columns = ("parameters", "state", "F flop", "B flop", "time", "residuals", *for_w, "sent", "to")
        rows = [("stage", "modules", *(("ranks",) if wide else ()), *columns)]
        whole = sum(s.forward_seconds + s.backward_seconds for s in self.summaries) or 1.0
        for i, s in enumerate(self.summaries):
            following = ",".join(str(b) for a, b in self.graph.edges(forward=True) if a == i) or "-"
            share = (s.forward_seconds + s.backward_seconds) / whole
            flops = (f"{s.forward_flops:.3g}", f"{s.backward_flops:.3g}")
            waits = (format_bytes(s.weight_residual_bytes),) if for_w else ()
            moved = (format_bytes(s.residual_bytes), *waits, format_bytes(s.sent_bytes))
            state = (f"{s.parameters:,}", format_bytes(s.state_bytes))
            ranks = (name_ranks(self.groups[self.graph.rank_of[i]]),) if wide else ()
            rows.append((str(i), s.modules, *ranks, *state, *flops, f"{share:.1%}", *moved, following))
        return head + "\n" + format_table(rows)


def name_ranks(ranks: Sequence[int]) -> str:
    """
    >>> name_ranks((3,)), name_ranks((4, 5, 6)), name_ranks((1, 3))
    ('3', '4-6', '1,3')
    """
    first, last = ranks[0], ranks[-1]
    if len(ranks) > 1 and tuple(ranks) == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, ranks))


Judge = Callable[[StageDag, StageCosts], float]
"""Seconds of the whole step for a stage graph: the simulated makespan."""


def plan_stages(
    program: Program,
    rank_of: Sequence[int],
    groups: Sequence[Sequence[int]],
    microbatch: int,
    device: Roofline,
    judge: Judge,
    updated: Mapping[int, int],
    cuts: Sequence[str] | None = None,
    owners: Mapping[int, int | None] | None = None,
    forward_stage: Mapping[Eqn, int] | None = None,
    recompute: Collection[int] = (),
) -> Plan:
    """Cut the program into stages.

    Args:
        program: the traced step.
        rank_of: the rank of each of the S stages.
        groups: of each rank, the positions on the stage axis that are its replicas.
        microbatch: examples in one micro-batch, over all replicas of a stage.
        device: what the stages run on.
        judge: the simulated step time of a stage graph; the fastest of the candidates wins.
        cuts: names of the modules at which stages 1 ... S-1 begin; None lets the planner choose.
        updated: index of the output that is the new value of a state input, by the input's index.
        owners: where the state lies already: stage by index of the program's input, None for every stage. The stages
            follow it, unless `forward_stage` says where they are.
        forward_stage: the stage of each forward equation, for a cut that is settled; edges go to higher stages.
        recompute: stages whose backward repeats their forward.

    Raises: PlanError where the program has fewer places to cut than stages, or a named module isn't there.
    """
    flow = analyse_flow(program, updated)
    num_stages, num_ranks = len(rank_of), len(groups)
    replicas = tuple(map(len, groups))
    _check_shares(microbatch, replicas)

    def make(forward_stage: Mapping[Eqn, int]) -> Plan:
        graph = route_values(flow, forward_stage, rank_of, num_ranks, microbatch, False, replicas, recompute)
        homes = Homes(owners, {}) if owners is not None else home_state(program, graph, updated)
        summaries = tuple(_summarise(graph, homes, s, replicas[rank_of[s]], device) for s in range(num_stages))
        members = tuple(map(tuple, groups))
        return Plan(graph, homes, summaries, microbatch, members, flow, forward_stage, device, frozenset(recompute))

    if forward_stage is not None:
        return make(forward_stage)
    if owners is not None:
        return make(_follow_owners(flow, owners, num_stages))
    orders = [order_forward(flow, order, microbatch, device) for order in _distinct_orders(flow)]
    if cuts is not None:
        if len(cuts) + 1 != num_stages:
            each = f"{num_stages // num_ranks} stage{'s' * (num_stages != num_ranks)} each"
            raise PlanError(
                f"{len(cuts)} cuts make {len(cuts) + 1} stages, but the mesh has {num_ranks} ranks, {each}."
            )
        candidates = [make(_stages_of(orders[0], cut_at_modules(orders[0], cuts)))]
    else:
        wide = [replicas[r] for r in rank_of]
        candidates = [make(_stages_of(order, balance_stages(order, wide, device))) for order in orders]
    return min(candidates, key=lambda p: judge(p.graph.dag, p.costs))


def _check_shares(microbatch: int, replicas: Sequence[int]) -> None:
    if wrong := sorted({d for d in replicas if microbatch % d}):
        raise PlanError(
            f"a micro-batch of {microbatch} examples doesn't split evenly among a stage's "
            f"{' or '.join(map(str, wrong))} replicas: use fewer micro-batches, a larger batch, or other replicas."
        )


def _distinct_orders(flow: Flow) -> list[list[int]]:
    first, second = program_order(flow), depth_first_order(flow)
    return [first] if first == second else [first, second]


def _stages_of(order: ForwardOrder, starts: Sequence[int]) -> dict[Eqn, int]:
    bounds = [*starts, len(order.eqns)]
    return {eqn: s for s in range(len(starts)) for eqn in order.eqns[bounds[s] : bounds[s + 1]]}


def _follow_owners(flow: Flow, owners: Mapping[int, int | None], num_stages: int) -> dict[Eqn, int]:
    """Stages such that equations lie with the state that they read, for a program whose state is placed: each at the
    last of the stages of its state and of its inputs, or, if it reads neither, at the first that reads it.
    """
    program = flow.program
    behind: dict[Var, set[int]] = {program.inputs[i]: {s} for i, s in owners.items() if s is not None}
    for eqn in program.eqns:
        if program.phase[eqn] == "before":
            found = set().union(*(behind.get(v, set()) for v in eqn.reads)) if eqn.reads else set()
            for v in eqn.outputs:
                behind[v] = found
    stage: dict[Eqn, int] = {}
    made: dict[Var, int] = {}
    for eqn in flow.forward:
        homes = set().union(*(behind.get(v, set()) for v in eqn.reads)) if eqn.reads else set()
        inputs = {made[v] for v in eqn.reads if v in made}
        if not homes and not inputs:
            continue
        own = homes if len(homes) == 1 else set()  # of several stages' state: where its inputs are
        stage[eqn] = max(own | inputs, default=0)
        made.update(dict.fromkeys(eqn.outputs, stage[eqn]))
    readers: dict[Var, int] = {}
    for eqn in reversed(flow.forward):
        if eqn not in stage:
            stage[eqn] = min((readers[v] for v in eqn.outputs if v in readers), default=0)
        for v in eqn.reads:
            readers[v] = min(readers.get(v, num_stages), stage[eqn])
    return stage


def _summarise(graph: StageGraph, homes: Homes, stage: int, replicas: int, device: Roofline) -> StageSummary:
    n = graph.shares[stage].count
    forward = graph.programs["F", stage]
    backward = graph.whole.get(stage) or graph.programs.get(("B", stage))
    first_half = graph.programs.get(("I", stage))
    back_eqns = backward.eqns if backward is not None else ()
    kept = [b for b in graph.bundles if b.stage == stage and b.last_reader[0] != "F" and not b.travels]
    stays = [v for b in kept if b.source[0] == "F" for v in b.values]
    waits = [v for b in kept if b.last_reader[0] == "W" for v in b.values]
    sent = [v for b in graph.bundles if b.travels and b.source[1] == stage for v in b.values]
    owned = [graph.program.inputs[i] for i, s in homes.stage.items() if s == stage]
    read = state_read_by(graph, stage)
    return StageSummary(
        modules=name_modules(forward),
        replicas=replicas,
        parameters=sum(math.prod(v.shape_at(1)) for v in owned if v in read),
        state_bytes=sum(v.bytes_at(1) for v in owned),
        forward_flops=sum(count_flops(e, n) for e in forward.eqns),
        backward_flops=sum(count_flops(e, n) for e in back_eqns),
        forward_seconds=sum(estimate_seconds(e, n, device) for e in forward.eqns),
        backward_seconds=sum(estimate_seconds(e, n, device) for e in back_eqns),
        input_backward_seconds=(
            sum(estimate_seconds(e, n, device) for e in first_half.eqns) if first_half is not None else None
        ),
        residual_bytes=sum(v.bytes_at(n) for v in stays),
        weight_residual_bytes=sum(v.bytes_at(n) for v in waits),
        sent_bytes=sum(v.bytes_at(n) for v in sent),
    )


def name_modules(program: StageProgram) -> str:
    """The modules of a stage, for people: `GPT/embed … block_1`; `3 operations` where nothing has a name."""
    paths = list(dict.fromkeys(eqn.path for eqn in program.eqns if eqn.path))
    if not paths:
        kinds = [
            eqn.name for eqn in program.eqns if eqn.name in ("dot_general", "conv_general_dilated", "gather", "scan")
        ]
        return f"{len(program.eqns)} operations ({len(kinds)} products)"
    depth = max(len(p) for p in paths)
    shared = 0
    while shared < depth and len({p[: shared + 1] for p in paths if len(p) > shared}) == 1:
        shared += 1
    names = list(dict.fromkeys(p[shared] for p in paths if len(p) > shared))
    if not names:
        return "/".join(paths[0])
    head = "/".join(next(p for p in paths if len(p) > shared)[:shared])
    label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    return f"{head}/{label}" if head else label
