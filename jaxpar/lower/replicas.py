"""Replicated stages as stages of their own: what the machine runs when ranks work in groups.

A stage with d replicas gives each of them an equal share of every micro-batch. Here each replica becomes a stage, on
its own rank, with the same programs for fewer examples; where two stages differ in width, the values between them are
cut into the pieces that both ends have in common:

    piece (i, j) of a value from u to v     examples of replica i of u  ∩  examples of replica j of v
    replica i of u                          takes its pieces from the value
    replica j of v                          joins its pieces to the value

So the rest of the machine knows nothing of replicas, but for the totals, which are completed over each group, and for
the state, of which every replica keeps a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxpar.errors import LowerError
from jaxpar.plan import Bundle, Node, Share, StageGraph, StageProgram
from jaxpar.schedule import Action, Timetable
from jaxpar.trace import Batched, Eqn, Invariant, Var
from jaxpar.trace.ir import alias_p, join_examples_p, take_examples_p


@dataclass(frozen=True, eq=False)
class Replication:
    """Which stages of the machine are the replicas of a stage of the plan, in the order of their examples."""

    graph: StageGraph  # of the machine
    stages: tuple[tuple[int, ...], ...]  # by stage of the plan

    def timetable(self, planned: Timetable) -> Timetable:
        """The planned timetable with each group's actions done by all of its ranks."""
        if self.graph.dag == planned.dag:
            return planned
        rank_of = [[self.graph.rank_of[s] for s in replicas] for replicas in self.stages]
        grid = []
        for cells in planned.grid:
            row: list[Action | None] = [None] * self.graph.num_ranks
            for action in filter(None, cells):
                for stage, rank in zip(self.stages[action.stage], rank_of[action.stage], strict=True):
                    row[rank] = Action(action.kind, stage, action.microbatch)
            grid.append(tuple(row))
        return replace(planned, dag=self.graph.dag, grid=tuple(grid))


def replicate_stages(planned: StageGraph, groups: Sequence[Sequence[int]]) -> Replication:
    """Make a stage of each replica.

    Args:
        planned: stages on groups of ranks.
        groups: of each group, its ranks.
    """
    if all(tuple(group) == (g,) for g, group in enumerate(groups)):
        return Replication(planned, tuple((s,) for s in range(planned.num_stages)))
    return _Replicating(planned, groups).run()


class _Replicating:
    def __init__(self, planned: StageGraph, groups: Sequence[Sequence[int]]):
        self.planned, self.groups = planned, groups
        self.stages: list[tuple[int, ...]] = []
        self.rank_of: list[int] = []
        self.shares: list[Share] = []
        for stage, group in enumerate(planned.rank_of):
            ranks, share = groups[group], planned.shares[stage]
            self.stages.append(tuple(range(len(self.rank_of), len(self.rank_of) + len(ranks))))
            self.rank_of += ranks
            self.shares += [Share(j * share.count, share.count) for j in range(len(ranks))]
        self.joined: dict[Node, list[Eqn]] = defaultdict(list)  # what a replica's program does first
        self.taken: dict[Node, list[Eqn]] = defaultdict(list)  # and last
        self.pieces: dict[tuple[Node, Var], list[Var]] = {}  # what a program reads instead of a value

    def run(self) -> Replication:
        bundles = [b for planned in self.planned.bundles for b in self._bundles_of(planned)]
        programs = {
            (kind, stage): self._program(program, (kind, stage))
            for (kind, s), program in self.planned.programs.items()
            for stage in self.stages[s]
        }
        whole = {
            stage: self._program(program, ("B", stage))
            for s, program in self.planned.whole.items()
            for stage in self.stages[s]
        }
        graph = StageGraph(
            self.planned.program,
            tuple(self.rank_of),
            sum(map(len, self.groups)),
            programs,
            tuple(bundles),
            whole,
            tuple(self.shares),
        )
        return Replication(graph, tuple(self.stages))

    # -- values ----------------------------------------------------------------------------------------------------

    def _bundles_of(self, b: Bundle) -> Iterator[Bundle]:
        """The bundles between the replicas of both ends, receiver by receiver."""
        kind, source = b.source
        senders, receivers = self.stages[source], self.stages[b.stage]
        if len(senders) == len(receivers):
            for i, j in zip(senders, receivers, strict=True):
                yield Bundle((kind, i), j, self._readers(b, j), b.values)
            return
        for j in receivers:
            meeting = [(i, common) for i in senders if (common := self._common(i, j)) is not None]
            pieces = {v: self._cut(v, kind, [i for i, _ in meeting], [c for _, c in meeting]) for v in b.values}
            for v, parts in pieces.items():
                self._join(b, v, j, [p for p in parts if p is not None])
            for k, (i, _) in enumerate(meeting):
                if mine := tuple(part for v in b.values if (part := pieces[v][k]) is not None):
                    yield Bundle((kind, i), j, self._readers(b, j), mine)

    def _readers(self, b: Bundle, replica: int) -> tuple[Node, ...]:
        at = self.stages[b.stage].index(replica)
        return tuple((kind, self.stages[s][at]) for kind, s in b.readers)

    def _common(self, i: int, j: int) -> Share | None:
        a, b = self.shares[i], self.shares[j]
        first, end = max(a.first, b.first), min(a.first + a.count, b.first + b.count)
        return Share(first, end - first) if first < end else None

    def _cut(self, v: Var, kind: str, senders: Sequence[int], common: Sequence[Share]) -> list[Var | None]:
        """Take the pieces of one value for one receiver from the senders that have some."""
        layout = self.planned.program.types[v]
        if isinstance(layout, Invariant):  # the same on all of them: the first one sends it
            piece = Var(v.shape_at(1), v.dtype)
            self.taken[kind, senders[0]].append(Eqn(alias_p, (v,), (piece,), {}))
            return [piece, *[None] * (len(senders) - 1)]
        if not isinstance(layout, Batched):
            raise LowerError(
                f"a value of type {layout} travels between stages with different numbers of replicas, which can't "
                "be: give both stages as many replicas, or cut the step elsewhere."
            )
        pieces: list[Var | None] = []
        for i, share in zip(senders, common, strict=True):
            piece = Var(v.shape_at(share.count), v.dtype)
            first = share.first - self.shares[i].first
            params = {"first": first, "count": share.count, "dim": layout.dim, "inner": layout.inner}
            params["outer"] = layout.outer
            self.taken[kind, i].append(Eqn(take_examples_p, (v,), (piece,), params))
            pieces.append(piece)
        return pieces

    def _join(self, b: Bundle, v: Var, receiver: int, pieces: list[Var]) -> None:
        layout = self.planned.program.types[v]
        for node in self._readers(b, receiver):
            self.pieces[node, v] = pieces
            if isinstance(layout, Batched):
                params = {"dim": layout.dim, "outer": layout.outer, "inner": layout.inner}
                self.joined[node].append(Eqn(join_examples_p, tuple(pieces), (v,), params))
            else:
                self.joined[node].append(Eqn(alias_p, tuple(pieces), (v,), {}))

    # -- programs --------------------------------------------------------------------------------------------------

    def _program(self, program: StageProgram, node: Node) -> StageProgram:
        kind, stage = node
        parts: list[Node] = [("I", stage), ("W", stage)] if kind == "B" and self.planned.is_split else [node]
        # Not all readers of a bundle read all of it; what I and W both read is joined once where they are one action.
        wanted = set(program.reads)
        joined = {eqn.outputs: eqn for part in parts for eqn in self.joined[part] if wanted.issuperset(eqn.outputs)}
        taken = [eqn for part in parts for eqn in self.taken[part]]
        pieces = {v: self.pieces[part, v] for part in parts for v in program.reads if (part, v) in self.pieces}
        reads = tuple(p for v in program.reads for p in pieces.get(v, [v]))
        return replace(program, node=node, eqns=(*joined.values(), *program.eqns, *taken), reads=reads)
