"""Batch-type inference: one walk over the program, one rule per primitive.

    infer_types(body, input types) -> body', types

body' is the program with `complete` inserted where a partial reduction meets an operation that is not linear in it (that
is where gradient accumulation ends), `global_positions` where an iota along the batch is used as data, and each equation
that makes examples' values out of invariant ones marked with the form in which a micro-batch gets its own rows of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpar import _jax
from jaxpar.errors import TraceError
from jaxpar.trace import control
from jaxpar.trace.ir import Atom, Body, Eqn, Literal, Size, Var, complete_p, global_positions_p, rows_p
from jaxpar.trace.rules import find_rule, keeps_positions
from jaxpar.trace.types import INVARIANT, Batched, BatchType, Coupling, Incomplete, Invariant, Partial, UsesPositions

_KEEPS_ZERO = {"broadcast_in_dim", "reshape", "convert_element_type", "transpose", "squeeze", "expand_dims", "copy", "neg"}


@dataclass(frozen=True, eq=False)
class Typed:
    """A typed program. `late`: invariant values that are known only when all micro-batches are done."""

    body: Body
    types: Mapping[Var, BatchType]
    late: frozenset[Var]


def infer_types(body: Body, input_types: Sequence[BatchType], state: Sequence[bool]) -> Typed:
    """Types of a whole step. `state[i]`: input i is state that one stage owns, unknown before the pipeline starts.

    Raises: TraceError with every operation that couples examples, or has no rule.
    """
    walk = _Walk(top=True)
    walk.stateful = {v for v, is_state in zip(body.inputs, state, strict=True) if is_state}
    inferred, _ = walk.run(body, input_types)
    if walk.failures:
        raise TraceError("\n\n".join(dict.fromkeys(walk.failures)))
    return Typed(inferred, walk.types, frozenset(walk.late))


class _Walk:
    """One pass over a body. Only the step's own body (`top`) may complete reductions."""

    def __init__(self, top: bool):
        self.top = top
        self.types: dict[Var, BatchType] = {}
        self.late: dict[Var, Eqn] = {}
        self.stateful: set[Var] = set()
        self.failures: list[str] = []
        self._eqns: list[Eqn] = []
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

    # -- one equation ----------------------------------------------------------------------------------------------

    def _visit(self, eqn: Eqn) -> None:
        try:
            self._infer(eqn)
        except Coupling as coupling:
            self._fail(eqn, f"{eqn.name} {coupling}")
        except _NoRule:
            self._poisoned.update(eqn.outputs)
            self.failures.append(
                f"{_at(eqn)}: there is no batch rule for the primitive '{eqn.name}', so jaxpar can't know whether it "
                "keeps examples apart. Say so with jaxpar.register_batch_rule."
            )

    def _infer(self, eqn: Eqn) -> None:
        types = [self.type_of(atom) for atom in eqn.inputs]
        if control.is_control_flow(eqn):
            inferred = self._attempt(eqn, types, lambda e, t: control.infer_control_flow(e, t, self._nested))
        elif all(isinstance(t, Invariant) for t in types):
            inferred = self._invariant_or_created(eqn, types)
        else:
            rule = find_rule(eqn.name)
            if rule is None:
                raise _NoRule
            inferred = self._attempt(eqn, types, lambda e, t: (e, rule(e, t)))
        if inferred is None:  # inputs were rewritten: again
            return
        eqn, out_types = inferred
        self._check_late(eqn, types, out_types)
        self._emit(eqn, out_types)

    def _attempt(self, eqn: Eqn, types: list[BatchType], rule: Any) -> tuple[Eqn, Sequence[BatchType]] | None:
        """Apply the rule; where it needs an input complete, or positions as data, insert that and visit again."""
        if not keeps_positions(eqn.name):
            if self._rewrite(eqn, _positions(types), self._globalise):
                return None
        try:
            return rule(eqn, types)
        except UsesPositions:
            self._rewrite(eqn, _positions(types), self._globalise)
        except Incomplete as incomplete:
            if not self.top:
                raise Coupling(
                    "needs a sum over the whole batch to be complete inside a loop or branch"
                ) from None
            self._rewrite(eqn, incomplete.indices, self._complete)
        return None

    def _rewrite(self, eqn: Eqn, indices: Sequence[int], change: Any) -> bool:
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
            if late is not None:
                self.late[var] = late
            if stateful:
                self.stateful.add(var)

    # -- values made of invariant ones -----------------------------------------------------------------------------

    def _invariant_or_created(self, eqn: Eqn, types: list[BatchType]) -> tuple[Eqn, list[BatchType]]:
        if not any(v.batch_dims for v in eqn.outputs):
            zero = eqn.name in _KEEPS_ZERO and all(t.zero for t in types)  # type: ignore[union-attr]
            return eqn, [Invariant(zero=zero)] * len(eqn.outputs)
        out_types = [_created_type(v) for v in eqn.outputs]
        first = out_types[0]
        if eqn.name == "iota" and isinstance(first, Batched) and eqn.params["dimension"] == first.dim:
            if eqn.outputs[0].shape[first.dim] == Size(1):
                return eqn, [Batched(first.dim, positions="all")]
            return replace(eqn, form="whole"), out_types
        if eqn.name in ("broadcast_in_dim", "iota"):

            return eqn, out_types
        rows = eqn.name == "random_bits" and not eqn.inputs[0].shape and _jax.draws_rows(eqn.inputs[0].dtype)
        return replace(eqn, form="rows" if rows else "whole"), out_types

    def _type_constant(self, var: Var, value: Any) -> Var:
        """A captured constant; one that grows with the batch holds the whole batch's rows."""
        if not var.batch_dims:
            self.types[var] = Invariant(zero=False)
            return var
        whole = Var(tuple(np.shape(value)), var.dtype, var.name)
        self.types[whole] = INVARIANT
        self._emit(Eqn(rows_p, (whole,), (var,), {}, form="whole"), [_created_type(var)])
        return whole

    # -- completing ------------------------------------------------------------------------------------------------

    def _complete(self, atom: Atom, eqn: Eqn) -> Var:
        assert isinstance(atom, Var)
        if ("complete", atom) not in self._renamed:
            out = self._renamed["complete", atom] = Var(atom.shape, atom.dtype, atom.name)
            complete = Eqn(complete_p, (atom,), (out,), {"op": self.types[atom].op}, path=eqn.path, sources=eqn.sources)
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
            raise Coupling("uses the examples' positions, joined with other data, as data")
        if ("global", atom) not in self._renamed:
            out = self._renamed["global", atom] = Var(atom.shape, atom.dtype, atom.name)
            self._emit(Eqn(global_positions_p, (atom,), (out,), {}, path=eqn.path, sources=eqn.sources), [t.plain])
        return self._renamed["global", atom]

    def _finish(self, atom: Atom) -> Atom:
        """An output of the body, in a form that can leave it."""
        if isinstance(atom, Literal) or atom in self._poisoned:
            return atom
        t = self.types[atom]
        dummy = Eqn(complete_p, (), (), {})
        if self.top and isinstance(t, Partial):
            return self._complete(atom, dummy)
        if isinstance(t, Batched) and t.positions == "all":
            return self._globalise(atom, dummy)
        return atom

    def _check_late(self, eqn: Eqn, types: Sequence[BatchType], out_types: Sequence[BatchType]) -> None:
        late = [self.late[v] for v in eqn.reads if v in self.late]
        batched = any(isinstance(t, Batched) for t in (*types, *out_types))
        if late and batched and eqn.name != "complete":
            moment = "in the backward pass" if eqn.backward else "in the forward pass"
            raise Coupling(
                f"combines single examples, {moment}, with a value that is known only when all of the batch has been "
                f"computed (the reduction over the batch that is complete at {_at(late[0])})"
            )

    def _nested(self, body: Body, types: Sequence[BatchType]) -> tuple[Body, list[BatchType]]:
        walk = _Walk(top=False)
        result = walk.run(body, types)
        if walk.failures:
            raise _Nested(walk.failures)
        return result

    def _fail(self, eqn: Eqn, clause: str) -> None:
        self._poisoned.update(eqn.outputs)
        self.failures.append(
            f"{_at(eqn)}: examples of the batch are coupled: {clause}. Micro-batches can't reproduce that exactly. "
            "Ways out: compute it per example; take a statistic that doesn't mix examples (LayerNorm or GroupNorm "
            "instead of BatchNorm over the batch); or move the operation out of the pipelined step."
        )


class _NoRule(Exception):
    pass


class _Nested(Coupling):
    """Failures inside a loop or branch."""

    def __init__(self, failures: list[str]):
        super().__init__("; in its body: " + " ".join(failures))


def _positions(types: Sequence[BatchType]) -> list[int]:
    return [i for i, t in enumerate(types) if isinstance(t, Batched) and t.holds_positions]


def _created_type(var: Var) -> BatchType:
    dims = var.batch_dims
    if not dims:
        return INVARIANT
    size = var.shape[dims[0]]
    assert isinstance(size, Size)
    if len(dims) > 1:
        raise Coupling("makes an array with two batch dimensions (batch × batch)")
    if size.extra:
        raise Coupling(f"makes {size} rows for n examples")
    return Batched(dims[0], 1, size.per_example)


def _at(eqn: Eqn) -> str:
    return eqn.where or "unknown line"
