"""Batch types through control flow: scan, while, cond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxpar.trace.failures import NestedFailures
from jaxpar.trace.ir import Body, Eqn, Size
from jaxpar.trace.types import INVARIANT, Batched, BatchType, Coupling, Incomplete, Invariant, NeedsComplete, Partial

_LOOPS = "loops over the examples of the batch"
_VMAP = "Let jax.vmap treat the examples side by side, instead of lax.map, lax.scan, or lax.fori_loop one by one."

Nested = Callable[[Body, Sequence[BatchType]], tuple[Body, list[BatchType]]]


def is_control_flow(eqn: Eqn) -> bool:
    return eqn.name in _RULES


def infer_control_flow(eqn: Eqn, types: Sequence[BatchType], nested: Nested) -> tuple[Eqn, list[BatchType]]:
    """The equation with its bodies inferred, and its outputs' types. `nested` infers a body."""
    types = [t.plain if isinstance(t, Batched) else t for t in types]
    try:
        return _RULES[eqn.name](eqn, types, nested)
    except (NeedsComplete, NestedFailures) as failure:
        partial = tuple(i for i, t in enumerate(types) if isinstance(t, Partial))
        if partial and (isinstance(failure, NeedsComplete) or failure.incomplete):
            raise Incomplete(partial) from None
        raise


def _scan(eqn: Eqn, types: Sequence[BatchType], nested: Nested) -> tuple[Eqn, list[BatchType]]:
    if isinstance(eqn.params["length"], Size):
        raise Coupling(_LOOPS, _VMAP)
    num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, xs = list(types[:num_consts]), [_shift(t, -1) for t in types[num_consts + num_carry :]]
    (body,) = eqn.bodies["jaxpr"]
    carry = list(types[num_consts : num_consts + num_carry])
    body, outputs, carry = _fixed_point(body, carry, lambda c: [*consts, *c, *xs], nested)
    return replace(eqn, bodies={"jaxpr": (body,)}), [*carry, *(_shift(t, 1) for t in outputs[num_carry:])]


def _shift(t: BatchType, by: int) -> BatchType:
    if not isinstance(t, Batched):
        return INVARIANT if isinstance(t, Invariant) else t
    if t.dim + by < 0:
        raise Coupling(_LOOPS, _VMAP)
    return t.moved(t.dim + by)


def _fixed_point(
    body: Body, carry: list[BatchType], inputs: Callable[[list[BatchType]], list[BatchType]], nested: Nested
) -> tuple[Body, list[BatchType], list[BatchType]]:
    """Grow the carry's types until the body maps them to themselves. Types only rise, so this ends."""
    while True:
        inferred, outputs = nested(body, inputs(carry))
        joined = [_join(a, b) for a, b in zip(carry, outputs[: len(carry)], strict=True)]
        if joined == carry:
            return inferred, outputs, carry
        carry = joined


def _join(a: BatchType, b: BatchType) -> BatchType:
    """The least type that holds the values of both."""
    if a == b:
        return a
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Invariant) and isinstance(other, Partial) and one.zero and other.op == "sum":
            return other
    if isinstance(a, Invariant) and isinstance(b, Invariant):
        return INVARIANT
    if isinstance(a, Batched) and isinstance(b, Batched):
        layout = a.joined(b) if a.dim == b.dim else None
        if layout is not None:
            return layout
    clause = f"gives a value that is {a} in one case and {b} in another"
    raise (NeedsComplete if isinstance(a, Partial) or isinstance(b, Partial) else Coupling)(clause)


def _while(eqn: Eqn, types: Sequence[BatchType], nested: Nested) -> tuple[Eqn, list[BatchType]]:
    num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = list(types[:num_cond]), list(types[num_cond : num_cond + num_body])
    (cond,), (body,) = eqn.bodies["cond_jaxpr"], eqn.bodies["body_jaxpr"]
    carry = list(types[num_cond + num_body :])
    body, _, carry = _fixed_point(body, carry, lambda c: [*body_consts, *c], nested)
    cond, (test,) = nested(cond, [*cond_consts, *carry])
    if not isinstance(test, Invariant):
        clause = "runs as many iterations as the examples together ask for"
        raise NeedsComplete(clause, "Run a fixed number of iterations, and select what each example keeps.")
    return replace(eqn, bodies={"cond_jaxpr": (cond,), "body_jaxpr": (body,)}), carry


def _cond(eqn: Eqn, types: Sequence[BatchType], nested: Nested) -> tuple[Eqn, list[BatchType]]:
    index, *operands = types
    if isinstance(index, Partial):
        raise Incomplete((0,))
    inferred = [nested(branch, operands) for branch in eqn.bodies["branches"]]
    outputs = inferred[0][1]
    for _, other in inferred[1:]:
        outputs = [_join(a, b) for a, b in zip(outputs, other, strict=True)]
    return replace(eqn, bodies={"branches": tuple(body for body, _ in inferred)}), outputs


_RULES = {"scan": _scan, "while": _while, "cond": _cond}
