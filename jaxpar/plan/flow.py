"""What runs once per micro-batch, in which order it may be cut, and where each backward equation belongs.

    forward    equations to be cut into stages, in program order
    backward   equations that follow the forward's stages
    free       cheap functions of the batch alone: recomputed by every stage that reads them, never sent

A backward equation belongs where the forward equation is that it is the transpose of. The name stack says so where
modules
have names; the parameters and residuals it reads say so exactly (dx = dy W' reads the W of one forward product only).
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


def analyse_flow(program: Program) -> Flow:
    """Sort the micro-batch equations that some output needs into forward, backward and free ones."""
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
    anchor = _anchor_backward(program, forward, backward, free, owned)
    return Flow(program, tuple(forward), tuple(backward), frozenset(free), anchor)


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


def _anchor_backward(
    program: Program, forward: list[Eqn], backward: list[Eqn], free: Iterable[Eqn], owned: set[Var]
) -> dict[Eqn, int]:
    readers = _reader_positions(program, forward, set(free), owned)
    by_path: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, eqn in enumerate(forward):
        by_path[eqn.path].append(i)
    found: list[int | None] = []
    position = len(forward)
    for eqn in backward:
        candidates = _candidates(eqn, readers, by_path)
        choice = _nearest_at_most(candidates, position)
        if choice is not None:
            position = choice
        found.append(choice)
    return _fill_gaps(program, backward, found)


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


def _candidates(eqn: Eqn, readers: Mapping[Var, set[int]], by_path: Mapping[tuple[str, ...], list[int]]) -> list[int]:
    found: set[int] | None = None
    for v in eqn.reads:
        if places := readers.get(v):
            narrowed = places if found is None else found & places
            found = narrowed or found
    named = by_path.get(eqn.path, []) if eqn.path else []
    if found is None:
        return named
    return sorted(found.intersection(named) or found)


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
