"""What runs once per micro-batch, in which order it may be cut, and where each backward equation belongs.

    forward    equations to be cut into stages, in program order
    backward   equations that follow the forward's stages
    free       cheap functions of the batch alone: recomputed by every stage that reads them, never sent

A backward equation belongs where the forward equation is that it is the transpose of, or that it repeats. The name
stack says so where modules have names; the parameters and residuals it reads say so exactly (dx = dy W' reads the W of
one forward product only); a gradient belongs where the parameter is read that it updates.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jaxpar.plan.twins import find_twins
from jaxpar.trace import Eqn, Program, Var

CHEAP = frozenset(
    """
    add add_any sub mul neg max min abs sign eq ne lt le gt ge and or not xor select_n convert_element_type
    integer_pow broadcast_in_dim reshape squeeze expand_dims transpose slice iota rows global_positions copy
    stop_gradient clamp square shift_left shift_right_logical shift_right_arithmetic is_finite real imag
    concatenate pad
    """.split()
)
"""Operations that cost less to repeat than their result costs to store or send."""


@dataclass(frozen=True, eq=False)
class Flow:
    program: Program
    forward: tuple[Eqn, ...]
    backward: tuple[Eqn, ...]
    free: frozenset[Eqn]
    anchor: Mapping[Eqn, int]  # backward equation -> index in `forward` of the one it belongs to
    twins: Mapping[Var, Var]  # value that the backward computes again -> the forward's


def analyse_flow(program: Program, updated: Mapping[int, int]) -> Flow:
    """Sort the micro-batch equations that some output needs into forward, backward and free ones.

    Args:
        updated: index of the output that is the new value of a state input, by the input's index.
    """
    needed = _pipeline_eqns(program)
    owned = _derived_from_owned_state(program)
    free: set[Eqn] = set()
    fixed: set[Var] = set()  # outputs of micro-batch equations that aren't free
    forward: list[Eqn] = []
    backward: list[Eqn] = []
    for eqn in program.eqns:
        if eqn not in needed:
            continue
        if eqn in program.backward:
            backward.append(eqn)
        elif (
            eqn.name in CHEAP and not any(v in owned or v in fixed for v in eqn.reads) and not _is_partial(program, eqn)
        ):
            free.add(eqn)
            continue
        else:
            forward.append(eqn)
        fixed.update(eqn.outputs)
    twins = find_twins(program, forward)
    anchor = _Anchors(program, forward, free, owned, twins, updated).place(backward)
    return Flow(program, tuple(forward), tuple(backward), frozenset(free), anchor, twins)


def _is_partial(program: Program, eqn: Eqn) -> bool:
    return any(program.is_partial(v) for v in eqn.outputs)


def _pipeline_eqns(program: Program) -> set[Eqn]:
    """Micro-batch equations behind a total that is known only at the end, or behind a per-example output."""
    wanted: set[Var] = {v for v in program.outputs if isinstance(v, Var) and program.is_batched(v)}
    found = set()
    for eqn in reversed(program.eqns):
        phase = program.phase[eqn]
        if phase == "complete" and eqn.outputs[0] in program.late:
            wanted.update(eqn.reads)
        elif phase in ("microbatch", "linear") and not wanted.isdisjoint(eqn.outputs):
            wanted.update(eqn.reads)
            if phase == "microbatch":
                found.add(eqn)
    return found


def _derived_from_owned_state(program: Program) -> set[Var]:
    """State that belongs to one stage, and what is computed from it before the pipeline starts."""
    derived = {
        v for v, role in zip(program.inputs, program.roles, strict=True) if role == "state" and not v.is_replicated
    }
    for eqn in program.eqns:
        if program.phase[eqn] == "before" and not derived.isdisjoint(eqn.reads):
            derived.update(eqn.outputs)
    return derived


# -- backward follows forward ------------------------------------------------------------------------------------------


class _Anchors:
    """Finds the forward equation that a backward one belongs to, by its index.

    Those that repeat the forward belong where it was; what they prepare for the transposed ones belongs where its
    inputs are made, or later, where it is read. The transposed ones walk the forward in reverse.
    """

    def __init__(
        self,
        program: Program,
        forward: list[Eqn],
        free: set[Eqn],
        owned: set[Var],
        twins: Mapping[Var, Var],
        updated: Mapping[int, int],
    ):
        self.program, self.twins = program, twins
        self.made = {v: i for i, eqn in enumerate(forward) for v in eqn.outputs}
        self.readers = _reader_positions(program, forward, free, owned)
        self.updates = _updated_by(program, updated)
        self.by_path: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, eqn in enumerate(forward):
            self.by_path[eqn.path].append(i)
        self.last = len(forward)

    def place(self, backward: list[Eqn]) -> dict[Eqn, int]:
        primal = {eqn for eqn in backward if eqn.recomputed or eqn.outputs[0] in self.twins}
        position = self.last
        found: list[int | None] = []
        for eqn in backward:
            if eqn in primal:
                choice = self._where_repeated(eqn)
                if choice is not None:
                    self.made.update(dict.fromkeys(eqn.outputs, choice))
                    for v in eqn.outputs:
                        self.readers.setdefault(v, {choice})
            else:
                choice = _nearest_at_most(self._candidates(eqn), position)
                position = position if choice is None else choice
            found.append(choice)
        return _move_to_readers(backward, primal, self.twins, _fill_gaps(self.program, backward, found))

    def _where_repeated(self, eqn: Eqn) -> int | None:
        """A recomputed equation is where its twin is; a factor at the next place that reads what it is made of."""
        if (twin := self.twins.get(eqn.outputs[0])) is not None:
            return self.made[twin]
        ready = max((self.made[u] for v in eqn.reads if (u := self.twins.get(v, v)) in self.made), default=None)
        if ready is None:
            return None
        return next((place for place in self._candidates(eqn) if place > ready), ready)

    def _candidates(self, eqn: Eqn) -> list[int]:
        found: set[int] | None = None
        for v in eqn.reads:
            if places := self.readers.get(self.twins.get(v, v)):
                narrowed = places if found is None else found & places
                found = narrowed or found
        if found is None:
            parameters = {p for v in eqn.outputs for p in self.updates.get(v, ())}
            found = set().union(*(self.readers.get(p, ()) for p in parameters)) or None
        named = self.by_path.get(eqn.path, []) if eqn.path else []
        if found is None:
            return named
        return sorted(found.intersection(named) or found)


def _move_to_readers(
    backward: list[Eqn], primal: set[Eqn], twins: Mapping[Var, Var], anchor: dict[Eqn, int]
) -> dict[Eqn, int]:
    """Factors that are read at a later place in the forward than where their inputs are: prepared there."""
    latest: dict[Var, int] = {}
    for eqn in reversed(backward):
        if eqn in primal and not any(v in twins for v in eqn.outputs):
            anchor[eqn] = max(anchor[eqn], *(latest.get(v, 0) for v in eqn.outputs))
        for v in eqn.reads:
            latest[v] = max(latest.get(v, 0), anchor[eqn])
    return anchor


def _reader_positions(program: Program, forward: list[Eqn], free: set[Eqn], owned: set[Var]) -> dict[Var, set[int]]:
    """For each value that a backward equation may read: where the forward pass makes and reads it."""
    positions: dict[Var, set[int]] = defaultdict(set)
    roots: dict[Var, set[Var]] = {}  # owned state behind an invariant value, the batch behind a free one
    for eqn in program.eqns:
        if program.phase[eqn] == "before" or eqn in free:
            behind = set().union(*(roots.get(v, {v}) for v in eqn.reads)) if eqn.reads else set()
            for v in eqn.outputs:
                roots[v] = behind
    for i, eqn in enumerate(forward):
        for v in eqn.reads:
            positions[v].add(i)
            for root in roots.get(v, ()):
                positions[root].add(i)
        for v in eqn.outputs:
            positions[v].add(i)
    for v, behind in roots.items():
        for root in behind:
            if root in owned:
                positions[v] |= positions[root]
    for v, role in zip(program.inputs, program.roles, strict=True):
        if v not in owned and role != "batch":
            positions.pop(v, None)  # a step counter or a key says nothing about the place
    return positions


def _updated_by(program: Program, updated: Mapping[int, int]) -> dict[Var, set[Var]]:
    """The state inputs whose new value is made of a value of their own size: of a partial gradient, the parameter."""
    found: dict[Var, set[Var]] = defaultdict(set)
    for i, out in updated.items():
        if isinstance(atom := program.outputs[out], Var) and _elements(atom) > 1:
            found[atom].add(program.inputs[i])
    for eqn in reversed(program.eqns):
        if program.phase[eqn] != "microbatch":
            for v in eqn.outputs:
                for u in eqn.reads if v in found else ():
                    if _elements(u) == _elements(v):
                        found[u] |= found[v]
    return found


def _elements(v: Var) -> int:
    return math.prod(v.shape_at(1))


def _nearest_at_most(candidates: list[int], position: int) -> int | None:
    """The largest candidate that isn't past `position`: the backward pass walks the forward one in reverse."""
    if not candidates:
        return None
    i = bisect.bisect_right(candidates, position)
    return candidates[i - 1] if i else candidates[0]


def _fill_gaps(program: Program, backward: list[Eqn], found: list[int | None]) -> dict[Eqn, int]:
    """Equations without a place of their own: gradients go with what comes next, the rest with what came before."""
    after: list[int | None] = list(found)
    for i in reversed(range(len(found) - 1)):
        if after[i] is None:
            after[i] = after[i + 1]
    anchor: dict[Eqn, int] = {}
    last: int | None = None
    for eqn, place, following in zip(backward, found, after, strict=True):
        last = place if place is not None else last
        gradient = _is_partial(program, eqn)
        choice = place if place is not None else (following if gradient or last is None else last)
        anchor[eqn] = choice if choice is not None else (last or 0)
    return anchor
