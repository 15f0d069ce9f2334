"""The traced step: what the other rooms work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import Literal as OneOf

import jax

from jaxpar.errors import TraceError
from jaxpar.trace.capture import pair_jaxprs
from jaxpar.trace.infer import infer_types
from jaxpar.trace.ir import Atom, Body, Eqn, Var, drop_dead_eqns
from jaxpar.trace.types import INVARIANT, Batched, BatchType, Invariant, Partial

Role = OneOf["state", "batch", "other"]
Phase = OneOf["before", "microbatch", "linear", "complete", "after"]


@dataclass(frozen=True, eq=False)
class Program:
    """A step as one flat typed program.

    Every equation belongs to one phase:
        before       invariant, known before the first micro-batch (including totals that depend on the batch alone)
        microbatch   examples' values, and partial reductions of them: run once per micro-batch
        linear       linear in partial reductions: run per micro-batch or once, as is cheaper
        complete     the reduction over the whole batch
        after        the update: invariant, but known only when all micro-batches are done
    """

    inputs: tuple[Var, ...]
    roles: tuple[Role, ...]
    eqns: tuple[Eqn, ...]
    outputs: tuple[Atom, ...]
    consts: Mapping[Var, Any]
    types: Mapping[Var, BatchType]
    late: frozenset[Var]
    num_examples: int

    def type_of(self, atom: Atom) -> BatchType:
        return self.types[atom] if isinstance(atom, Var) else INVARIANT

    def is_batched(self, atom: Atom) -> bool:
        return isinstance(self.type_of(atom), Batched)

    def is_partial(self, atom: Atom) -> bool:
        return isinstance(self.type_of(atom), Partial)

    @cached_property
    def phase(self) -> Mapping[Eqn, Phase]:
        return {eqn: self._phase(eqn) for eqn in self.eqns}

    def _phase(self, eqn: Eqn) -> Phase:
        if eqn.name == "complete":
            return "complete"
        if any(map(self.is_batched, (*eqn.inputs, *eqn.outputs))):
            return "microbatch"
        if any(map(self.is_partial, (*eqn.inputs, *eqn.outputs))):
            return "linear"
        return "after" if any(v in self.late for v in eqn.reads) else "before"

    @cached_property
    def producer(self) -> Mapping[Var, Eqn]:
        return {v: eqn for eqn in self.eqns for v in eqn.outputs}

    @cached_property
    def backward(self) -> frozenset[Eqn]:
        """Micro-batch equations of the backward pass: made by transposition, or reading what such ones made."""
        found: set[Eqn] = set()
        made: set[Var] = set()
        for eqn in self.eqns:
            if self.phase[eqn] == "microbatch" and (eqn.backward or not made.isdisjoint(eqn.reads)):
                found.add(eqn)
                made.update(v for v in eqn.outputs if not isinstance(self.types[v], Invariant))
        return frozenset(found)

    def carries_over(self, output: int, state_input: int) -> bool:
        """Whether an output is computed from a state input other than through the micro-batches."""
        atom, source = (
            self.outputs[output],
            [v for v, r in zip(self.inputs, self.roles, strict=True) if r == "state"][state_input],
        )
        stack, seen = [atom], set()
        while stack:
            v = stack.pop()
            if v is source:
                return True
            producer = self.producer.get(v) if isinstance(v, Var) else None
            if producer is not None and producer not in seen and self.phase[producer] in ("before", "after"):
                seen.add(producer)
                stack.extend(producer.reads)
        return False

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for phase in self.phase.values():
            counts[phase] = counts.get(phase, 0) + 1
        forward = counts.get("microbatch", 0) - len(self.backward)
        return (
            f"Program: {len(self.eqns)} equations for {self.num_examples} examples: {counts.get('before', 0)} before "
            f"the pipeline, {forward} forward, {len(self.backward)} backward, {counts.get('complete', 0)} totals over "
            f"the batch, {counts.get('linear', 0) + counts.get('after', 0)} in the update"
        )


def make_program(
    whole: Any, small: Any, sizes: tuple[int, int], names: Sequence[str], roles: Sequence[Role]
) -> Program:
    """Pair and type a step's two traces.

    Args:
        whole, small: closed jaxprs of the step, whose inputs are the flat arguments.
        sizes: the numbers of examples that they were traced with; the first is the whole batch's.
        names: the user's name of each input.
        roles: what each input is.

    Raises: TraceError where the traces differ in more than sizes, or examples are coupled.
    """
    num_examples = sizes[0]
    body = pair_jaxprs(whole, small, sizes, names)
    types: list[BatchType] = []
    for var, role in zip(body.inputs, roles, strict=True):
        types.append(Batched(0) if role == "batch" and var.batch_dims else INVARIANT)
    body = Body(body.inputs, drop_dead_eqns(list(body.eqns), body.outputs), body.outputs, body.consts)
    typed = infer_types(
        body, types, [role == "state" and not v.is_replicated for v, role in zip(body.inputs, roles, strict=True)]
    )
    inferred = typed.body
    eqns = drop_dead_eqns(list(inferred.eqns), inferred.outputs)
    read = {v for eqn in eqns for v in eqn.reads} | {v for v in inferred.outputs if isinstance(v, Var)}
    consts = {v: value for v, value in inferred.consts.items() if v in read}
    program = Program(
        inferred.inputs, tuple(roles), eqns, inferred.outputs, consts, typed.types, typed.late, num_examples
    )
    _check_touches_batch(program)
    return program


def trace_size(num_examples: int, microbatch: int) -> int:
    """The second size: the micro-batch's, unless it is one (at size 1 JAX traces other equations) or the whole."""
    if 1 < microbatch < num_examples:
        return microbatch
    return 2 if num_examples > 2 else num_examples + 1


def _check_touches_batch(program: Program) -> None:
    if not any(phase == "microbatch" for phase in program.phase.values()):
        names = [v.name for v, role in zip(program.inputs, program.roles, strict=True) if role == "batch"]
        raise TraceError(
            f"nothing that the step returns depends on the batch ({', '.join(names)}), so there are no micro-batches "
            "to run. Check batch_argnums, and that the loss uses the batch."
        )


def abstract_args(args: Any) -> Any:
    """The arguments' shapes and dtypes, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(_abstract, args)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
