"""Batch-type inference: one walk over the program, one rule per primitive.

    infer_types(body, input types) -> body', types

body' is the program with `complete` inserted where a partial reduction meets an operation that is not linear in it
(that is where gradient accumulation ends), `global_positions` where an iota along the batch is used as data, and each
equation that makes examples' values out of invariant ones marked with the form in which a micro-batch gets its rows.

What holds of every typed equation:
    its outputs grow with the batch exactly as their types say (rules/sizes.py)
    none but the late ones depends on a value that is known only when all micro-batches are done, and no late one is
    `Batched` or `Partial`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpar import _jax
from jaxpar.errors import TraceError
from jaxpar.trace import control
from jaxpar.trace.created import constant_rows, constant_type, created_form, type_created
from jaxpar.trace.failures import Failure, NestedFailures, explain_failures, explain_late
from jaxpar.trace.ir import Atom, Body, Eqn, Literal, Var, complete_p, global_positions_p, has_size
from jaxpar.trace.rules import check_outputs, check_params, find_rule, is_builtin, keeps_positions, refused
from jaxpar.trace.types import (
    INVARIANT,
    Batched,
    BatchType,
    Coupling,
    Incomplete,
    Invariant,
    NeedsComplete,
    Partial,
    UsesPositions,
)

_KEEPS_ZERO = {"broadcast_in_dim", "reshape", "convert_element_type", "transpose", "squeeze", "copy", "neg"}

_Inferred = tuple[Eqn, Sequence[BatchType]]


@dataclass(frozen=True, eq=False)
class Typed:
    """A typed program. `late`: invariant values that are known only when all micro-batches are done."""

    body: Body
    types: Mapping[Var, BatchType]
    late: frozenset[Var]


def infer_types(body: Body, input_types: Sequence[BatchType], state: Sequence[bool]) -> Typed:
    """Types of a whole step. `state[i]`: input i is part of the training state.

    Raises: TraceError with every operation that couples examples, or has no rule.
    """
    stateful = {v for v, is_state in zip(body.inputs, state, strict=True) if is_state}
    walk = _Walk(stateful)
    inferred, _ = walk.run(body, input_types)
    if walk.failures:
        raise TraceError(explain_failures(walk.failures))
    # What must be complete for one reader is so for all, that no sum is accumulated twice: g and 0.1 g, for Adam.
    again = _Walk(stateful, walk.completed)
    inferred, _ = again.run(body, input_types)
    if again.failures:
        raise TraceError(explain_failures(again.failures))
    return Typed(inferred, again.types, frozenset(again.late))


class _Walk:
    """One pass over a body. Only the step's own body (`top`) may complete reductions.

    stateful: its inputs that are part of the training state.
    to_complete: partial values that other equations than those on examples read complete.
    """

    def __init__(self, stateful: set[Var], to_complete: Set[Var] = frozenset(), top: bool = True):
        self.top = top
        self.stateful = set(stateful)
        self._to_complete = to_complete
        self.types: dict[Var, BatchType] = {}
        self.late: dict[Var, Eqn] = {}  # late value -> the reduction over the batch that it waits for
        self.failures: list[Failure] = []
        self._eqns: list[Eqn] = []
        self._made: dict[Var, Eqn] = {}
        self._renamed: dict[tuple[str, Var], Var] = {}
        self._poisoned: set[Var] = set()

    def run(self, body: Body, input_types: Sequence[BatchType]) -> tuple[Body, list[BatchType]]:
        for var, t in zip(body.inputs, input_types, strict=True):
            self.types[var] = t
        consts = {}
        for var, value in body.consts.items():
            consts[self._type_constant(var, value)] = value
        for eqn in body.eqns:
            if self._poisoned.isdisjoint(eqn.reads):
                self._visit(eqn)
            else:
                self._poisoned.update(eqn.outputs)
        outputs = tuple(self._finish(atom) for atom in body.outputs)
        types = [self.type_of(atom) if atom not in self._poisoned else INVARIANT for atom in outputs]
        return Body(body.inputs, tuple(self._eqns), outputs, consts), types

    def type_of(self, atom: Atom) -> BatchType:
        if isinstance(atom, Literal):
            return Invariant(zero=not atom.normaliser and not _jax.is_key(atom.dtype) and not np.any(atom.value))
        return self.types[atom]

    @property
    def completed(self) -> frozenset[Var]:
        return frozenset(v for kind, v in self._renamed if kind == "complete")

    # -- one equation ----------------------------------------------------------------------------------------------

    def _visit(self, eqn: Eqn) -> None:
        try:
            self._infer(eqn)
        except NestedFailures as nested:
            self._poisoned.update(eqn.outputs)
            self.failures.extend(nested.failures)
        except Coupling as coupling:
            consequence = not eqn.reads  # an array of the batch's size, for what comes next
            incomplete = isinstance(coupling, NeedsComplete)
            self._fail(Failure(eqn, str(coupling), coupling.advice, incomplete, consequence), eqn.outputs)
        except _NoRule:
            advice = "Say that it keeps them apart, and where the batch goes, with jaxpar.register_batch_rule."
            clause = f"has no batch rule: jaxpar knows nothing of the primitive '{eqn.name}'"
            self._fail(Failure(eqn, clause, advice, missing_rule=True), eqn.outputs)

    def _fail(self, failure: Failure, outputs: Sequence[Var]) -> None:
        self._poisoned.update(outputs)
        self.failures.append(failure)

    def _infer(self, eqn: Eqn) -> None:
        if eqn.name in refused.ALWAYS:
            raise Coupling(*refused.ALWAYS[eqn.name])
        types = [self.type_of(atom) for atom in eqn.inputs]
        if not any(isinstance(t, Batched) for t in types):
            partial = [i for i, t in enumerate(types) if isinstance(t, Partial)]
            ready = [i for i in partial if eqn.inputs[i] in self._to_complete]
            if self._rewrite(eqn, ready, self._complete):
                return
        if control.is_control_flow(eqn):
            inferred = self._attempt(eqn, types, lambda: control.infer_control_flow(eqn, types, self._nested))
        elif all(isinstance(t, Invariant) for t in types):
            inferred = self._from_invariants(eqn, types)
        else:
            inferred = self._attempt(eqn, types, lambda: self._apply_rule(eqn, types))
        if inferred is None:  # inputs were rewritten, and the result visited
            return
        eqn, out_types = inferred
        check_outputs(eqn, out_types)
        if self._wait_for_late(eqn, types, out_types):
            return
        self._emit(eqn, out_types)

    def _apply_rule(self, eqn: Eqn, types: list[BatchType]) -> _Inferred:
        rule = find_rule(eqn.name)
        if rule is None and not any(isinstance(t, Batched) for t in types):
            raise Incomplete(tuple(i for i, t in enumerate(types) if isinstance(t, Partial)))
        if rule is None:
            raise _NoRule
        out_types = rule(eqn, types)
        if any(isinstance(t, Batched) for t in (*types, *out_types)):
            if is_builtin(eqn.name):
                check_params(eqn, types)
        elif has_size(eqn.params):  # shares nothing with the examples: the whole batch's parameters
            eqn = replace(eqn, form="whole")
        return eqn, out_types

    def _attempt(self, eqn: Eqn, types: list[BatchType], infer: Callable[[], _Inferred]) -> _Inferred | None:
        """`infer`; where it needs an input complete, or positions as data, insert that and visit again."""
        if not keeps_positions(eqn.name) and self._rewrite(eqn, _positions(types), self._globalise):
            return None
        try:
            return infer()
        except UsesPositions:
            self._rewrite(eqn, _positions(types), self._globalise)
        except Incomplete as incomplete:
            if not self.top:
                raise NeedsComplete("needs a sum over the whole batch to be complete inside a loop or branch") from None
            self._rewrite(eqn, incomplete.indices, self._complete)
        return None

    def _rewrite(self, eqn: Eqn, indices: Sequence[int], change: Callable[[Atom, Eqn], Var]) -> bool:
        if not indices:
            return False
        inputs = list(eqn.inputs)
        for i in indices:
            inputs[i] = change(inputs[i], eqn)
        self._infer(replace(eqn, inputs=tuple(inputs)))
        return True

    def _emit(self, eqn: Eqn, out_types: Sequence[BatchType]) -> None:
        self._eqns.append(eqn)
        late = next((self.late[v] for v in eqn.reads if v in self.late), None)
        stateful = not self.stateful.isdisjoint(eqn.reads)
        for var, t in zip(eqn.outputs, out_types, strict=True):
            self.types[var] = t
            self._made[var] = eqn
            if late is not None:
                self.late[var] = late
            if stateful:
                self.stateful.add(var)

    # -- values made of invariant ones -----------------------------------------------------------------------------

    def _from_invariants(self, eqn: Eqn, types: list[BatchType]) -> _Inferred:
        if not any(v.batch_dims for v in eqn.outputs):
            zero = eqn.name in _KEEPS_ZERO and all(getattr(t, "zero", False) for t in types)
            eqn = replace(eqn, form="whole") if has_size(eqn.params) else eqn
            return eqn, [Invariant(zero=zero)] * len(eqn.outputs)
        return replace(eqn, form=created_form(eqn)), [type_created(eqn, v) for v in eqn.outputs]

    def _type_constant(self, var: Var, value: Any) -> Var:
        """A captured constant; one that grows with the batch holds the whole batch's rows."""
        if not var.batch_dims:
            self.types[var] = constant_type(var, value)
            return var
        whole = Var(tuple(np.shape(value)), var.dtype, var.name)
        self.types[whole] = INVARIANT
        eqn = constant_rows(whole, var, value)
        try:
            self._emit(eqn, [constant_type(var, value)])
        except Coupling as coupling:
            self._fail(Failure(eqn, str(coupling), coupling.advice, consequence=True), [var])
        return whole

    # -- completing ------------------------------------------------------------------------------------------------

    def _complete(self, atom: Atom, eqn: Eqn) -> Var:
        assert isinstance(atom, Var)
        if ("complete", atom) not in self._renamed:
            out = self._renamed["complete", atom] = Var(atom.shape, atom.dtype, atom.name)
            partial = self.types[atom]
            assert isinstance(partial, Partial)
            sources = (*self._made[atom].sources, *eqn.sources) if atom in self._made else eqn.sources
            complete = Eqn(complete_p, (atom,), (out,), {"op": partial.op}, path=eqn.path, sources=sources)
            self._eqns.append(complete)
            self.types[out] = INVARIANT
            if atom in self.stateful or atom in self.late:
                self.late[out] = complete
        return self._renamed["complete", atom]

    def _globalise(self, atom: Atom, eqn: Eqn) -> Var:
        assert isinstance(atom, Var)
        t = self.types[atom]
        assert isinstance(t, Batched)
        if t.positions != "all":
            raise Coupling("uses the examples' positions in the batch, joined with other data, as data")
        if ("global", atom) not in self._renamed:
            out = self._renamed["global", atom] = Var(atom.shape, atom.dtype, atom.name)
            self._emit(Eqn(global_positions_p, (atom,), (out,), {}, path=eqn.path, sources=eqn.sources), [t.plain])
        return self._renamed["global", atom]

    def _finish(self, atom: Atom) -> Atom:
        """An output of the body, in a form that can leave it."""
        if isinstance(atom, Literal) or atom in self._poisoned:
            return atom
        t = self.types[atom]
        end = Eqn(complete_p, (), (), {}, sources=self._made[atom].sources if atom in self._made else ())
        if self.top and isinstance(t, Partial):
            return self._complete(atom, end)
        if isinstance(t, Batched) and t.holds_positions:
            try:
                return self._globalise(atom, end)
            except Coupling as coupling:
                self._fail(Failure(end, str(coupling)), [atom])
        return atom

    def _wait_for_late(self, eqn: Eqn, types: Sequence[BatchType], out_types: Sequence[BatchType]) -> bool:
        """Whether partial inputs were completed, because the equation can only run when all of the batch is done."""
        late = next((self.late[v] for v in eqn.reads if v in self.late), None)
        if late is None:
            return False
        if any(isinstance(t, Batched) for t in (*types, *out_types)):
            raise Coupling(*explain_late(eqn, late))
        return self._rewrite(eqn, [i for i, t in enumerate(types) if isinstance(t, Partial)], self._complete)

    def _nested(self, body: Body, types: Sequence[BatchType]) -> tuple[Body, list[BatchType]]:
        walk = _Walk(set(), top=False)
        result = walk.run(body, types)
        if walk.failures:
            raise NestedFailures(walk.failures)
        return result


class _NoRule(Exception):
    pass


def _positions(types: Sequence[BatchType]) -> list[int]:
    return [i for i, t in enumerate(types) if isinstance(t, Batched) and t.holds_positions]
