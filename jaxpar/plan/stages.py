"""The stage graph: what each stage computes, forwards and backwards, and which values travel between stages.

`route_values` turns a placement of equations into a closed set of programs:

    F[s]: (invariants, batch rows, received values) -> (residuals, sent values, partial sums, per-example outputs)
    B[s]: (invariants, batch rows, received values, residuals) -> (sent values, partial sums, per-example outputs)

Every value that leaves a program is part of one `Bundle`: values made by one action that are held at one stage until
the same last reader. A residual is a bundle that stays; a boundary value or cotangent is one that travels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxpar.plan.flow import Flow
from jaxpar.plan.residuals import RECOMPUTED, choose_residuals
from jaxpar.schedule import StageDag
from jaxpar.trace import Eqn, Program, Var
from jaxpar.trace.ir import alias_p

Node = tuple[str, int]  # ("F" or "B", stage)


@dataclass(frozen=True)
class Bundle:
    """Values made by `source`, held at `stage` until the last of `readers` has run for that micro-batch."""

    source: Node
    stage: int
    readers: tuple[Node, ...]
    values: tuple[Var, ...]

    @property
    def travels(self) -> bool:
        return self.source[1] != self.stage

    @property
    def last_reader(self) -> Node:
        return self.readers[-1]


@dataclass(frozen=True, eq=False)
class StageProgram:
    """One action of one stage, for one micro-batch. Equations are in program order."""

    node: Node
    eqns: tuple[Eqn, ...]
    reads: tuple[Var, ...]  # micro-batch values from bundles
    invariants: tuple[Var, ...]
    batch: tuple[Var, ...]
    partials: tuple[Var, ...]  # added to the accumulators
    outputs: tuple[Var, ...]  # per-example outputs of the step


@dataclass(frozen=True, eq=False)
class StageGraph:
    """Stages as a DAG, closed under data flow."""

    program: Program
    num_stages: int
    programs: Mapping[Node, StageProgram]
    bundles: tuple[Bundle, ...]

    @property
    def has_backward(self) -> bool:
        return any(kind == "B" for kind, _ in self.programs)

    def edges(self, kind: str) -> tuple[tuple[int, int], ...]:
        pairs = {(b.source[1], b.stage) for b in self.bundles if b.travels and b.source[0] == kind}
        return tuple(sorted(pairs))

    @cached_property
    def partial_home(self) -> Mapping[Var, int]:
        """The stage that accumulates each partial reduction."""
        return {v: p.node[1] for p in self.programs.values() for v in p.partials}

    def dag(self, num_ranks: int) -> StageDag:
        """What a schedule needs to know. Stage s is on rank s."""
        ranks = tuple(s % num_ranks for s in range(self.num_stages))
        return StageDag(self.num_stages, self.edges("F"), self.edges("B"), ranks, num_ranks, self.has_backward)


def route_values(flow: Flow, forward_stage: Mapping[Eqn, int], num_stages: int, microbatch: int) -> StageGraph:
    """Close the stages under data flow.

    Args:
        flow: the micro-batch equations.
        forward_stage: stage of each forward equation; every edge goes from a lower stage to a higher one, or stays.
        microbatch: examples in one micro-batch, to weigh what is stored against what is recomputed.
    """
    return _Routing(flow, _place_all(flow, forward_stage), num_stages, microbatch).run()


def _place_all(flow: Flow, forward_stage: Mapping[Eqn, int]) -> dict[Eqn, Node]:
    """The node of every placed equation; a backward one never lies downstream of its backward inputs, but for those
    that it can have from the forward."""
    place: dict[Eqn, Node] = {eqn: ("F", s) for eqn, s in forward_stage.items()}
    for eqn in flow.backward:
        stage = forward_stage[flow.forward[flow.anchor[eqn]]]
        for v in eqn.reads:
            producer = place.get(flow.program.producer.get(v))  # type: ignore[arg-type]
            if producer is not None and producer[0] == "B" and not _has_twin(flow, place, v, stage):
                stage = min(stage, producer[1])
        place[eqn] = ("B", stage)
    return place


def _has_twin(flow: Flow, place: Mapping[Eqn, Node], v: Var, stage: int) -> bool:
    """Whether a stage can have the forward's value in place of one that the backward computes again."""
    if v not in flow.twins:
        return False
    source = place.get(flow.program.producer[flow.twins[v]])
    return source is None or source[1] <= stage


class _Routing:
    """Nodes in reverse order of execution, so that each one knows what is asked of it: B[0] ... B[S-1], F[S-1] ...
    F[0]."""

    def __init__(self, flow: Flow, place: dict[Eqn, Node], num_stages: int, microbatch: int):
        self.flow, self.program, self.microbatch = flow, flow.program, microbatch
        self.place = place
        self.num_stages = num_stages
        self.order = {eqn: i for i, eqn in enumerate(self.program.eqns)}
        self.aliases: dict[Var, Eqn] = {}  # of values computed again, from the forward's
        self.exports: dict[Node, set[Var]] = defaultdict(set)
        self.held: dict[tuple[Var, Node, int], set[Node]] = defaultdict(set)  # (value, source, stage) -> readers
        self.partials = self._accumulate_partials()
        self.outputs = self._place_outputs()

    def run(self) -> StageGraph:
        nodes = [("B", s) for s in range(self.num_stages)] if self.flow.backward else []
        nodes += [("F", s) for s in reversed(range(self.num_stages))]
        members: dict[Node, list[Eqn]] = defaultdict(list)
        for eqn, node in self.place.items():
            members[node].append(eqn)
        programs = {node: self._close(node, members[node]) for node in nodes}
        return StageGraph(self.program, self.num_stages, dict(reversed(programs.items())), self._bundles())

    # -- one node --------------------------------------------------------------------------------------------------

    def _close(self, node: Node, members: list[Eqn]) -> StageProgram:
        partials = [v for v, home in self.partials.items() if home == node]
        outputs = [v for v, home in self.outputs.items() if home == node]
        eqns, reads = self._needed({*self.exports[node], *partials, *outputs}, set(members), node)
        if node[0] == "B":
            self._recompute_cheap(node[1], eqns, reads)
        for v in sorted(reads, key=self._rank):
            self._request(v, node)
        ordered = tuple(sorted(eqns, key=self.order.__getitem__))
        inside = {v for eqn in ordered for v in eqn.outputs}
        outer = dict.fromkeys(v for eqn in ordered for v in eqn.reads if v not in inside and v not in reads)
        outer.update(dict.fromkeys(v for v in (*outputs, *partials) if v not in inside and v not in reads))
        batch = tuple(v for v in outer if self.program.is_batched(v))
        invariants = tuple(v for v in outer if not self.program.is_batched(v))
        passed = self.exports[node] - inside  # forwarded as they came
        return StageProgram(
            node,
            ordered,
            tuple(sorted({*reads, *passed}, key=self._rank)),
            invariants,
            batch,
            tuple(partials),
            tuple(outputs),
        )

    def _needed(self, wanted: set[Var], members: set[Eqn], node: Node) -> tuple[set[Eqn], set[Var]]:
        """The equations behind `wanted` that run in this node, and the values that must come from other nodes."""
        eqns: set[Eqn] = set()
        reads: set[Var] = set()
        stack = list(wanted)
        seen: set[Var] = set()
        while stack:
            v = stack.pop()
            if v in seen:
                continue
            seen.add(v)
            producer = self.program.producer.get(v)
            if producer is not None and (producer in members or producer in self.flow.free):
                if producer not in eqns:
                    eqns.add(producer)
                    stack.extend(producer.reads)
            elif self._computed_again_elsewhere(v, node):
                alias = self._alias(v)
                eqns.add(alias)
                stack.extend(alias.reads)
            elif self._source(v) is not None:
                reads.add(v)
        return eqns, reads

    def _computed_again_elsewhere(self, v: Var, node: Node) -> bool:
        source = self._source(v)
        return (
            node[0] == "B"
            and source is not None
            and source[0] == "B"
            and source != node
            and _has_twin(self.flow, self.place, v, node[1])
        )

    def _alias(self, v: Var) -> Eqn:
        if v not in self.aliases:
            producer = self.program.producer[v]
            alias = Eqn(alias_p, (self.flow.twins[v],), (v,), {}, path=producer.path, backward=True)
            self.aliases[v] = alias
            self.order[alias] = self.order[producer]
        return self.aliases[v]

    def _recompute_cheap(self, stage: int, eqns: set[Eqn], reads: set[Var]) -> None:
        """Keep fewer bytes of the forward by repeating element-wise equations in the backward."""

        def producer_of(v: Var) -> Eqn | None:
            producer = self.program.producer[v]
            here = self.place.get(producer) == ("F", stage) and producer.form == "local" and not producer.bodies
            return producer if here and producer.name in RECOMPUTED else None

        def is_stored_value(v: Var) -> bool:
            return self._source(v) is not None

        wanted = sorted((v for v in reads if self._source(v) == ("F", stage)), key=self._rank)
        if not wanted:
            return
        kept, repeated = choose_residuals(wanted, producer_of, is_stored_value, lambda v: v.bytes_at(self.microbatch))
        reads.difference_update(wanted)
        reads.update(kept)
        for eqn in repeated:
            more, _ = self._needed({*eqn.outputs}, {eqn}, ("B", stage))
            eqns.update(more)

    def _request(self, v: Var, node: Node) -> None:
        """Let `v` reach `node`: as a residual, on a forward edge, or with the backward of the stage that made it."""
        source = self._source(v)
        assert source is not None
        kind, stage = node
        if source[1] > stage and kind == "B" and source[0] == "F":
            carrier = ("B", source[1])
            self._hold(v, source, source[1], carrier)
            self._hold(v, carrier, stage, node)
            return
        self._hold(v, source, stage, node)

    def _hold(self, v: Var, source: Node, stage: int, reader: Node) -> None:
        self.held[v, source, stage].add(reader)
        self.exports[source].add(v)

    # -- what everything hangs from --------------------------------------------------------------------------------

    def _source(self, v: Var) -> Node | None:
        """The node that makes a micro-batch value; None for invariants, batch inputs and free values."""
        return self.place.get(self.program.producer.get(v))  # type: ignore[arg-type]

    def _accumulate_partials(self) -> dict[Var, Node]:
        """Partial reductions that get an accumulator, and where. A sum of several partial ones that are made at one
        node, and not otherwise used, is taken per micro-batch: one accumulator instead of several."""
        program = self.program
        readers: dict[Var, list[Eqn]] = defaultdict(list)
        for eqn in program.eqns:
            for v in eqn.reads:
                readers[v].append(eqn)
        for eqn in program.eqns:
            if program.phase[eqn] != "linear" or eqn.name == "complete":
                continue
            partial = [v for v in eqn.reads if program.is_partial(v)]
            nodes = {self._source(v) for v in partial}
            alone = all(len(readers[v]) == 1 for v in partial) and len(set(partial)) > 1
            smaller = sum(v.bytes_at(1) for v in eqn.outputs) <= sum(v.bytes_at(1) for v in partial)
            early = not any(v in program.late for v in eqn.reads)
            if alone and smaller and early and len(nodes) == 1 and None not in nodes:
                self.place[eqn] = nodes.pop()  # type: ignore[assignment]
        found: dict[Var, Node] = {}
        for eqn in program.eqns:
            ends = program.phase[eqn] == "linear" or (
                program.phase[eqn] == "complete" and eqn.outputs[0] in program.late
            )
            if ends and eqn not in self.place:
                for v in eqn.reads:
                    if program.is_partial(v) and (source := self._source(v)) is not None:
                        found[v] = source
        return found

    def _place_outputs(self) -> dict[Var, Node]:
        outputs: dict[Var, Node] = {}
        for v in self.program.outputs:
            if isinstance(v, Var) and self.program.is_batched(v):
                outputs[v] = self._source(v) or ("F", self.num_stages - 1)
        return outputs

    def _rank(self, v: Var) -> tuple[int, int]:
        """Program order: the same in every process, and alike for equal stages."""
        producer = self.program.producer[v]
        return self.order[producer], producer.outputs.index(v)

    def _bundles(self) -> tuple[Bundle, ...]:
        """Values of one source, held at one stage until the same last reader, make one bundle."""
        groups: dict[tuple[Node, int, Node], tuple[set[Node], list[Var]]] = {}
        for (v, source, stage), readers in self.held.items():
            last = max(readers, key=_execution_order)
            all_readers, values = groups.setdefault((source, stage, last), (set(), []))
            all_readers.update(readers)
            values.append(v)
        bundles = [
            Bundle(source, stage, tuple(sorted(readers, key=_execution_order)), tuple(sorted(values, key=self._rank)))
            for (source, stage, _), (readers, values) in groups.items()
        ]
        return tuple(
            sorted(bundles, key=lambda b: (_execution_order(b.source), b.stage, _execution_order(b.last_reader)))
        )


def _execution_order(node: Node) -> tuple[int, int]:
    return (0, node[1]) if node[0] == "F" else (1, -node[1])
