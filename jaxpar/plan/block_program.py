"""What one block computes in one action, as a function of its inputs: what a cost model is asked the time of.

Equal blocks have equal digests, whatever their values, modules and lines are called, and whatever the size of the whole
batch is, so each is estimated or measured once. The `kind` of an operator is made of its blocks' digests: it says, in a
saved plan, whether the operator still computes the same.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jaxpar.plan.stages import Node, StageGraph
from jaxpar.plan.time_curve import TimeCurve
from jaxpar.trace import Eqn, Literal, Var
from jaxpar.trace.fingerprint import fingerprint_eqns


@dataclass(frozen=True, eq=False)
class BlockProgram:
    """`inputs -> outputs` by `eqns`, for any number of examples; equal digests compute the same.

    `partials`, some of the outputs, are added to accumulators.
    """

    inputs: tuple[Var, ...]
    eqns: tuple[Eqn, ...]
    outputs: tuple[Var, ...]
    partials: tuple[Var, ...]
    digest: str


class CostModel(Protocol):
    """How long programs take on some device."""

    @property
    def device(self) -> str:
        """The device's name, as that of a `DeviceSpec`."""
        ...

    def time(self, programs: Mapping[str, BlockProgram], sizes: Sequence[int]) -> Mapping[str, TimeCurve]:
        """Seconds of each program, by its digest, for the numbers of examples in `sizes`, increasing."""
        ...


def collect_programs(stages: StageGraph) -> dict[Node, BlockProgram]:
    """The programs F, I and B of each block, every block being a stage; B is the whole backward, I and W in one."""
    sent: dict[Node, dict[Var, None]] = defaultdict(dict)
    for bundle in stages.bundles:
        sent[bundle.source].update(dict.fromkeys(bundle.values))
    programs = dict(stages.programs) | {("B", s): whole for s, whole in stages.whole.items()}
    found = {}
    for (kind, s), program in programs.items():
        if kind == "W":
            continue
        asked = sent["I", s] | sent["W", s] if kind == "B" else sent[kind, s]
        made = {v for eqn in program.eqns for v in eqn.outputs}
        outputs = tuple(dict.fromkeys(v for v in (*asked, *program.partials, *program.outputs) if v in made))
        inputs = tuple(dict.fromkeys((*program.reads, *program.invariants, *program.batch)))
        partials = tuple(v for v in program.partials if v in made)
        digest = _digest(inputs, program.eqns, (*outputs, *partials))
        found[kind, s] = BlockProgram(inputs, program.eqns, outputs, partials, digest)
    return found


def _digest(inputs: Sequence[Var], eqns: Sequence[Eqn], outputs: Sequence[Var]) -> str:
    return fingerprint_eqns(inputs, [_without_normalisers(eqn) for eqn in eqns], outputs)[:32]


def _without_normalisers(eqn: Eqn) -> Eqn:
    """The equation with its factors of the whole batch's size, such as 1 / B of a mean, replaced by one."""
    if not any(isinstance(a, Literal) and a.normaliser for a in eqn.inputs):
        return eqn
    inputs = tuple(Literal(1, a.dtype) if isinstance(a, Literal) and a.normaliser else a for a in eqn.inputs)
    return replace(eqn, inputs=inputs)


def name_kind(programs: Mapping[Node, BlockProgram], block: int) -> str:
    """The kind of a block's operator."""
    digests = [p.digest if (p := programs.get((kind, block))) is not None else "" for kind in "FIB"]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
