"""From a placement of equations to closed stage programs, and the values that travel between them.

Nodes are closed in reverse order of execution, so that each one knows what is asked of it. What the backward wants of
the forward is kept, or computed again where that takes fewer bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from jaxpar.plan.flow import Flow
from jaxpar.plan.residuals import RECOMPUTED, choose_residuals
from jaxpar.plan.stages import Bundle, Node, Share, StageGraph, StageProgram
from jaxpar.trace import Eqn, Var
from jaxpar.trace.ir import alias_p


def route_values(
    flow: Flow,
    forward_stage: Mapping[Eqn, int],
    rank_of: Sequence[int],
    num_ranks: int,
    microbatch: int,
    split: bool = False,
    replicas: Sequence[int] | None = None,
    recompute: Collection[int] = (),
) -> StageGraph:
    """Close the stages under data flow.

    Args:
        flow: the micro-batch equations.
        forward_stage: stage of each forward equation; every edge goes from a lower stage to a higher one, or stays.
        rank_of: the rank of each stage.
        num_ranks: R.
        microbatch: examples in one micro-batch.
        split: cut each backward into I and W.
        replicas: of each rank, among which the examples of a micro-batch are split evenly; one by default.
        recompute: stages whose backward repeats as much of their forward as it takes to keep the least bytes; that of
            other stages repeats element-wise work only.
    """
    back = "I" if split else "B"
    routing = _Routing(flow, _place_all(flow, forward_stage, back), len(rank_of), microbatch, back, recompute)
    programs, whole = routing.run()
    shares = tuple(Share(0, microbatch // (replicas[r] if replicas else 1)) for r in rank_of)
    return StageGraph(flow.program, tuple(rank_of), num_ranks, programs, routing.bundles(), whole, shares)


def _place_all(flow: Flow, forward_stage: Mapping[Eqn, int], back: str) -> dict[Eqn, Node]:
    """The node of every placed equation; a backward one never lies downstream of its backward inputs, but for those
    that it can have from the forward."""
    place: dict[Eqn, Node] = {eqn: ("F", s) for eqn, s in forward_stage.items()}
    for eqn in flow.backward:
        stage = forward_stage[flow.forward[flow.anchor[eqn]]]
        for v in eqn.reads:
            producer = place.get(flow.program.producer.get(v))  # type: ignore[arg-type]
            if producer is not None and producer[0] != "F" and not _has_twin(flow, place, v, stage):
                stage = min(stage, producer[1])
        place[eqn] = (back, stage)
    _sum_where_wanted(flow, forward_stage, place, back)
    return place


def _sum_where_wanted(flow: Flow, forward_stage: Mapping[Eqn, int], place: dict[Eqn, Node], back: str) -> None:
    """Sums of what stages side by side make, a shared value's cotangents: done at the stage that reads the sum, so that
    branches don't wait for each other."""
    readers: dict[Var, int] = {}
    reaches = _reachable_stages(forward_stage)
    for eqn in reversed(flow.backward):
        here = place[eqn][1]
        if eqn.name in ("add_any", "add"):
            producers = [place[p] for v in eqn.reads if (p := flow.program.producer.get(v)) in place]
            made = {stage for kind, stage in producers if kind == back}
            apart = any(not reaches[a] >> b & 1 and not reaches[b] >> a & 1 for a in made for b in made)
            wanted = readers.get(eqn.outputs[0])
            if apart and wanted is not None and wanted < here:
                place[eqn], here = (back, wanted), wanted
        for v in eqn.reads:
            readers[v] = max(readers.get(v, here), here)


def _reachable_stages(forward_stage: Mapping[Eqn, int]) -> list[int]:
    """For each stage, the stages downstream of it and itself, as bits."""
    made = {v: s for eqn, s in forward_stage.items() for v in eqn.outputs}
    count = max(forward_stage.values(), default=-1) + 1
    reaches = [1 << s for s in range(count)]
    edges = {(made[v], s) for eqn, s in forward_stage.items() for v in eqn.reads if v in made}
    for a, b in sorted(edges, reverse=True):  # from lower to higher stages
        reaches[a] |= reaches[b]
    return reaches


def _has_twin(flow: Flow, place: Mapping[Eqn, Node], v: Var, stage: int) -> bool:
    """Whether a stage can have the forward's value in place of one that the backward computes again."""
    if v not in flow.twins:
        return False
    source = place.get(flow.program.producer[flow.twins[v]])
    return source is None or source[1] <= stage


class _Routing:
    """Nodes in reverse order of execution, so that each one knows what is asked of it: B[0] ... B[S-1] (or W[0], I[0],
    W[1] ...), F[S-1] ... F[0]."""

    def __init__(
        self,
        flow: Flow,
        place: dict[Eqn, Node],
        num_stages: int,
        microbatch: int,
        back: str,
        recompute: Collection[int],
    ):
        self.flow, self.program, self.microbatch, self.recompute = flow, flow.program, microbatch, recompute
        self.place, self.num_stages, self.back = place, num_stages, back
        self.order = {eqn: i for i, eqn in enumerate(self.program.eqns)}
        self.aliases: dict[Var, Eqn] = {}  # of values computed again, from the forward's
        self.exports: dict[Node, set[Var]] = defaultdict(set)
        self.held: dict[tuple[Var, Node, int], set[Node]] = defaultdict(set)  # (value, source, stage) -> readers
        self.partials = self._accumulate_partials()
        self.outputs = self._place_outputs()

    def run(self) -> tuple[dict[Node, StageProgram], dict[int, StageProgram]]:
        """All programs, in order of execution; where backwards are split, also I and W of a stage as one."""
        self.members: dict[Node, set[Eqn]] = defaultdict(set)
        for eqn, node in self.place.items():
            self.members[node].add(eqn)
        programs: dict[Node, StageProgram] = {}
        for s in range(self.num_stages) if self.flow.backward else ():
            programs.update(self._close_backward(s))
        for s in reversed(range(self.num_stages)):
            programs["F", s] = self._close(("F", s), *self._open(("F", s)))
        whole = {s: self._join(programs["I", s], programs["W", s]) for kind, s in programs if kind == "I"}
        return dict(reversed(programs.items())), whole

    def _move_weights(self, stage: int) -> None:
        """Leave in I what other stages wait for, and move the rest of the backward to W.

        Where no other stage waits, I is what more than one gradient waits for: the way down through the layers.
        """
        here = sorted(self.members["I", stage], key=self.order.__getitem__)
        asked = self.exports["I", stage]
        if asked:
            awaited, _ = self._needed(set(asked), self.members["I", stage], ("I", stage))
        else:
            awaited = _shared_by_totals(here, {v for v, home in self.partials.items() if home == ("I", stage)})
        for eqn in here:
            if eqn not in awaited:
                self.place[eqn] = ("W", stage)
                self.members["I", stage].remove(eqn)
                self.members["W", stage].add(eqn)
        for found in (self.partials, self.outputs):
            for v, home in found.items():
                if home == ("I", stage) and self._source(v) == ("W", stage):
                    found[v] = ("W", stage)

    def _join(self, first: StageProgram, second: StageProgram) -> StageProgram:
        """I and W of a stage as one action."""
        eqns = tuple(sorted({*first.eqns, *second.eqns}, key=self.order.__getitem__))
        made = {v for eqn in eqns for v in eqn.outputs}
        either = lambda a, b: tuple(dict.fromkeys((*a, *b)))
        reads = sorted({v for v in either(first.reads, second.reads) if v not in made}, key=self._rank)
        return StageProgram(
            ("B", first.node[1]),
            eqns,
            tuple(reads),
            either(first.invariants, second.invariants),
            either(first.batch, second.batch),
            either(first.partials, second.partials),
            either(first.outputs, second.outputs),
        )

    # -- one node --------------------------------------------------------------------------------------------------

    def _close_backward(self, stage: int) -> dict[Node, StageProgram]:
        if self.back == "I":
            self._move_weights(stage)
        nodes = [("W", stage), ("I", stage)] if self.back == "I" else [("B", stage)]
        opened = {}
        for node in nodes:
            opened[node] = self._open(node)
            for v in opened[node][1]:
                if self._source(v) != ("F", stage):
                    self._request(v, node)  # W's, before I is closed
        kept: set[Var] = set()
        for node in reversed(nodes):  # what I keeps is at hand for W
            kept |= self._recompute_cheap(node, *opened[node], kept)
        return {node: self._close(node, *opened[node]) for node in nodes}

    def _open(self, node: Node) -> tuple[set[Eqn], set[Var]]:
        """What a node computes and reads, by what is asked of it."""
        wanted = set(self.exports[node])
        wanted.update(v for found in (self.partials, self.outputs) for v, home in found.items() if home == node)
        return self._needed(wanted, self.members[node], node)

    def _close(self, node: Node, eqns: set[Eqn], reads: set[Var]) -> StageProgram:
        partials = [v for v, home in self.partials.items() if home == node]
        outputs = [v for v, home in self.outputs.items() if home == node]
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
            node[0] != "F"
            and source is not None
            and source[0] != "F"
            and source[1] != node[1]
            and _has_twin(self.flow, self.place, v, node[1])
        )

    def _alias(self, v: Var) -> Eqn:
        if v not in self.aliases:
            producer = self.program.producer[v]
            alias = Eqn(alias_p, (self.flow.twins[v],), (v,), {}, path=producer.path, backward=True)
            self.aliases[v] = alias
            self.order[alias] = self.order[producer]
        return self.aliases[v]

    def _recompute_cheap(self, node: Node, eqns: set[Eqn], reads: set[Var], at_hand: set[Var]) -> set[Var]:
        """Keep fewer bytes of the forward by repeating equations in the backward: element-wise ones, or any.

        Returns: what is kept; values that are kept anyway, `at_hand`, cost nothing.
        """
        stage = node[1]

        def producer_of(v: Var) -> Eqn | None:
            producer = self.program.producer[v]
            if self.place.get(producer) != ("F", stage):
                return None
            cheap = producer.form == "local" and not producer.bodies and producer.name in RECOMPUTED
            return producer if cheap or stage in self.recompute else None

        def is_stored_value(v: Var) -> bool:
            return self._source(v) is not None

        wanted = sorted((v for v in reads if self._source(v) == ("F", stage)), key=self._rank)
        if not wanted:
            return set()
        size = lambda v: 0 if v in at_hand else v.bytes_at(self.microbatch)
        kept, repeated = choose_residuals(wanted, producer_of, is_stored_value, size)
        reads.difference_update(wanted)
        reads.update(kept)
        for eqn in repeated:
            more, _ = self._needed({*eqn.outputs}, {eqn}, node)
            eqns.update(more)
        return kept

    def _request(self, v: Var, node: Node) -> None:
        """Let `v` reach `node`: as a residual, on a forward edge, or with the backward of the stage that made it."""
        source = self._source(v)
        assert source is not None
        kind, stage = node
        if source[1] > stage and kind != "F" and source[0] == "F":
            carrier = (self.back, source[1])
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

    def bundles(self) -> tuple[Bundle, ...]:
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


def _execution_order(node: Node) -> tuple[int, int, int]:
    kind, stage = node
    return (0, stage, 0) if kind == "F" else (1, -stage, kind == "W")


def _shared_by_totals(eqns: Sequence[Eqn], totals: set[Var]) -> set[Eqn]:
    """The equations that at least two of `totals` need."""
    behind: dict[Var, set[Var]] = {v: {v} for v in totals}
    shared = set()
    for eqn in reversed(eqns):
        found = set().union(*(behind.get(v, set()) for v in eqn.outputs))
        if len(found) > 1:
            shared.add(eqn)
        for v in eqn.reads:
            behind.setdefault(v, set()).update(found)
    return shared
