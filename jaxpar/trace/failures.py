"""What keeps a step from being split into micro-batches, as a message for its author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.trace.ir import Eqn
from jaxpar.trace.types import Coupling

_SHOWN = 6
_ADVICE = "Compute it for each example on its own, or outside the pipelined step."


@dataclass(frozen=True)
class Failure:
    """`eqn` does what `clause` says.

    `incomplete`: only because a reduction isn't complete inside a loop or branch. `consequence`: likely to follow from
    another failure. `missing_rule`: nothing is known of the primitive.
    """

    eqn: Eqn
    clause: str
    advice: str = ""
    incomplete: bool = False
    consequence: bool = False
    missing_rule: bool = False


class NestedFailures(Coupling):
    """Failures inside a loop or branch."""

    def __init__(self, failures: Sequence[Failure]):
        super().__init__(failures[0].clause, failures[0].advice)
        self.failures = tuple(failures)
        self.incomplete = any(f.incomplete for f in failures)


def explain_late(eqn: Eqn, reduction: Eqn) -> tuple[str, str]:
    """Clause and advice for an operation on examples with a value that is known only when all of the batch is done."""
    place = place_of(reduction)
    if eqn.name in ("cond", "while"):
        return (
            f"a value of the whole batch (the reduction at {place}) chooses what is computed for each example",
            "Choose by each example's own values, with jnp.where, or by what is known before the step begins.",
        )
    if eqn.backward:
        return (
            f"the gradient of each example needs a value of the whole batch: the reduction at {place}, which is known "
            "only when the forward pass of every micro-batch is done",
            "Differentiate a sum or a mean over the examples (any weights that come from the batch alone are fine); "
            "what isn't linear in it, like a logarithm of the mean, can be computed and returned beside it.",
        )
    return (
        f"each example needs a statistic of the whole batch (the reduction at {place}), in the forward pass, as "
        "BatchNorm does",
        "Take statistics of single examples (LayerNorm, GroupNorm), or running averages kept in the state "
        "(use_running_average=True).",
    )


def explain_failures(failures: Sequence[Failure]) -> str:
    """One message for all: the forward pass first, without what follows from other failures."""
    causes = _causes(failures)
    if all(f.missing_rule for f in causes):
        head = "the step can't be split into micro-batches: jaxpar doesn't know whether all of it keeps examples apart."
    else:
        head = "the step can't be split into micro-batches exactly: examples of the batch are coupled."
    more = [f"... and {len(causes) - _SHOWN} more."] if len(causes) > _SHOWN else []
    return "\n\n".join([head, *map(_paragraph, causes[:_SHOWN]), *more])


def _causes(failures: Sequence[Failure]) -> list[Failure]:
    """Forward before backward, each place and clause once; consequences only where there is nothing else."""
    forward = {place_of(f.eqn) for f in failures if not f.eqn.backward}
    first = [f for f in failures if not f.consequence] or list(failures)
    kept: dict[tuple[str, str, str], Failure] = {}
    for f in sorted(first, key=lambda f: f.eqn.backward):
        if not (f.eqn.backward and place_of(f.eqn) in forward):
            kept.setdefault((place_of(f.eqn), f.eqn.name, f.clause), f)
    return list(kept.values())


def _paragraph(failure: Failure) -> str:
    eqn = failure.eqn
    moment = ", in the backward pass" if eqn.backward else ""
    shapes = ", ".join(str(v) for v in eqn.reads[:3]) + (", ..." if len(eqn.reads) > 3 else "")
    of = f" of {shapes}" if shapes else ""
    return f"{place_of(eqn)}{moment}:\n    {eqn.name}{of}\n    {failure.clause}.\n    {failure.advice or _ADVICE}"


def place_of(eqn: Eqn) -> str:
    return eqn.where or "unknown line"
