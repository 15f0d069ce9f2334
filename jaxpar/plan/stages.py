"""The stage graph: what each stage computes, forwards and backwards, and which values travel between stages.

`jaxpar.plan.routing` turns a placement of equations into a closed set of programs:

    F[s]: (invariants, batch rows, received values) -> (residuals, sent values, partial sums, per-example outputs)
    B[s]: (invariants, batch rows, received values, residuals) -> (sent values, partial sums, per-example outputs)

A timetable may split B into I, what other stages wait for, and W, what only gradients wait for: W[s] reads residuals of
F[s] and of I[s].

Every value that leaves a program is part of one `Bundle`: values made by one action that are held at one stage until
the same last reader. A residual is a bundle that stays; a boundary value or cotangent is one that travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxpar.schedule import StageDag
from jaxpar.trace import Eqn, Program, Var

Node = tuple[str, int]  # (F, B, I or W; stage)


@dataclass(frozen=True)
class Bundle:
    """Values made by `source`, held at `stage` until the last of `readers` has run for that micro-batch."""

    source: Node
    stage: int
    readers: tuple[Node, ...]
    values: tuple[Var, ...]

    @property
    def travels(self) -> bool:
        """To another stage, which may be on the same rank."""
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


@dataclass(frozen=True)
class Share:
    """Examples `first ... first + count - 1` of each micro-batch."""

    first: int
    count: int


@dataclass(frozen=True, eq=False)
class StageGraph:
    """Stages as a DAG, closed under data flow, and the rank that each is on.

    A stage may be replicated: then its rank stands for a group of ranks, each of which does its programs for its share
    of every micro-batch, `shares[s].count` examples. `lower` makes a stage of each replica.
    """

    program: Program
    rank_of: tuple[int, ...]
    num_ranks: int
    programs: Mapping[Node, StageProgram]
    bundles: tuple[Bundle, ...]
    whole: Mapping[int, StageProgram]  # where backwards are split: I and W of a stage as one action, B
    shares: tuple[Share, ...]  # by stage: of one replica, the first

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @property
    def has_backward(self) -> bool:
        return any(kind != "F" for kind, _ in self.programs)

    @property
    def is_split(self) -> bool:
        return bool(self.whole)

    def changes_rank(self, bundle: Bundle) -> bool:
        """Whether a bundle is sent, rather than kept where it was made."""
        return self.rank_of[bundle.source[1]] != self.rank_of[bundle.stage]

    def nodes_on(self, rank: int) -> list[Node]:
        """What one rank does, in canonical order."""
        kinds = "FBIW"
        return sorted((n for n in self.programs if self.rank_of[n[1]] == rank), key=lambda n: (n[1], kinds.index(n[0])))

    def edges(self, forward: bool) -> tuple[tuple[int, int], ...]:
        """Who sends to whom, between the forwards or between the backwards."""
        pairs = {(b.source[1], b.stage) for b in self.bundles if b.travels and (b.source[0] == "F") == forward}
        return tuple(sorted(pairs))

    @cached_property
    def partial_home(self) -> Mapping[Var, int]:
        """The stage that accumulates each partial reduction."""
        return {v: p.node[1] for p in self.programs.values() for v in p.partials}

    def share_on(self, rank: int) -> Share:
        """The examples that a rank works on; none where it has no stage."""
        return next((x for x, r in zip(self.shares, self.rank_of, strict=True) if r == rank), Share(0, 0))

    @cached_property
    def dag(self) -> StageDag:
        """What a schedule needs to know."""
        return StageDag(
            self.num_stages, self.edges(True), self.edges(False), self.rank_of, self.num_ranks, self.has_backward
        )
