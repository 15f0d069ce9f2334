"""Reads the text of a compiled program (`compiled.as_text()`): what calls what, and what is written in whole.

Only what the tests ask about is parsed: an operation's name, the arrays of its result, opcode, operands and the
computations that it calls. The text is XLA's, scheduled, and has the same form for CPU, GPU and TPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpar.lower import Machine

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_PASSED_ON = {"bitcast", "call", "conditional", "get-tuple-element", "opt-barrier", "parameter", "tuple", "while"}
_SMALL_RING = 1024  # bytes: XLA may well keep less than that in registers
_DTYPE_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Array:
    """One array of a result's type."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _DTYPE_BITS.search(self.dtype)
        return math.prod(self.shape) * (int(bits.group()) if bits else 8) // 8


@dataclass(frozen=True)
class Op:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, those of a tuple in order."""
        return tuple(Array(d, tuple(int(n) for n in s.split(",") if n)) for d, s in _ARRAY.findall(self.type))

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """The computations that it names, in order: branches, a loop's body and condition, a fusion's inside."""
        return tuple(name for group in _CALLS.findall(self.attributes) for name in re.findall(r"[\w.\-]+", group))

    def __str__(self) -> str:
        return f"%{self.name} = {self.type} {self.opcode}({', '.join('%' + o for o in self.operands)})"


@dataclass(frozen=True)
class Hlo:
    """A program: the operations of each computation in the order in which they run."""

    computations: Mapping[str, tuple[Op, ...]]
    entry: str

    def reachable(self, *roots: str) -> tuple[str, ...]:
        """The computations `roots` and all that they call, directly or not."""
        found: dict[str, None] = {}
        waiting = list(reversed(roots))
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = None
                waiting.extend(callee for op in self.computations[name] for callee in reversed(op.calls))
        return tuple(found)

    def ops_in(self, *roots: str, opcode: str = "") -> list[Op]:
        """Operations of `roots` and of what they call; those whose opcode matches the pattern `opcode`, if given."""
        ops = (op for name in self.reachable(*roots) for op in self.computations[name])
        return [op for op in ops if not opcode or re.fullmatch(opcode, op.opcode)]

    def branches_of(self, conditional: Op) -> tuple[str, ...]:
        """The computations that a conditional chooses from."""
        assert conditional.opcode == "conditional", conditional
        return conditional.calls

    def in_branches(self, opcode: str) -> list[Op]:
        """Operations that run in a branch of some conditional of the program."""
        conditionals = self.ops_in(self.entry, opcode="conditional")
        branches = {b for op in conditionals for b in self.branches_of(op)}
        return self.ops_in(*branches, opcode=opcode)

    def loops_with(self, opcode: str) -> tuple[str, ...]:
        """Bodies of loops in which an operation of that opcode stands directly."""
        called = {name for op in self.ops_in(self.entry, opcode="while") for name in op.calls}
        matches = lambda name: any(re.fullmatch(opcode, op.opcode) for op in self.computations[name])
        return tuple(sorted(filter(matches, called)))

    def whole_writes(self, shape: tuple[int, ...], *roots: str) -> list[Op]:
        """Operations that write a whole array of this shape, where `dynamic-update-slice` writes a part of it in place.

        Copies above all, in whatever layout; those that move it to another memory (`copy-start`) as well.
        """
        fused = {c for op in self.ops_in(*roots, opcode="fusion") for c in op.calls}
        ops = (op for name in self.reachable(*roots) if name not in fused for op in self.computations[name])
        return [op for op in ops if any(a.shape == shape for a in op.arrays) and not self._updates_in_place(op, shape)]

    def _updates_in_place(self, op: Op, shape: tuple[int, ...]) -> bool:
        if op.opcode in _PASSED_ON or op.opcode == "dynamic-update-slice" or op.opcode.endswith("-done"):
            return True
        if op.opcode != "fusion":
            return False
        (inside,) = op.calls
        return all(source.opcode in ("dynamic-update-slice", "parameter") for source in self._results(inside, shape))

    def _results(self, computation: str, shape: tuple[int, ...]) -> Iterator[Op]:
        """Where the results of this shape come from, seen through bitcasts."""
        ops = {op.name: op for op in self.computations[computation]}
        waiting = [op for op in ops.values() if op.is_root]
        while waiting:
            op = waiting.pop()
            if op.opcode in ("tuple", "bitcast"):
                waiting.extend(ops[name] for name in op.operands)
            elif math.prod(shape) in (math.prod(a.shape) for a in op.arrays):
                yield op


def parse_hlo(text: str) -> Hlo:
    """Read a program.

    >>> hlo = parse_hlo('''HloModule m
    ... %double (p: f32[2]) -> f32[2] {
    ...   %p = f32[2]{0} parameter(0)
    ...   ROOT %sum = f32[2]{0} add(%p, %p)
    ... }
    ... ENTRY %main (x: f32[2]) -> f32[2] {
    ...   %x = f32[2]{0} parameter(0)
    ...   ROOT %y = f32[2]{0} call(%x), to_apply=%double
    ... }''')
    >>> hlo.entry, hlo.reachable("main"), hlo.ops_in("main", opcode="add")[0].arrays
    ('main', ('main', 'double'), (Array(dtype='f32', shape=(2,)),))
    """
    computations: dict[str, list[Op]] = {}
    entry = ""
    current: list[Op] = []
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and computations and " = " in line:
            current.append(_parse_op(line.strip()))
    assert entry, "no ENTRY computation: is this the text of a compiled program?"
    return Hlo({name: tuple(ops) for name, ops in computations.items()}, entry)


def _parse_op(line: str) -> Op:
    is_root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    operands = _NAME.findall(rest[start:stop])
    return Op(name.lstrip("%"), rest[:end], opcode, tuple(operands), rest[stop + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


# -- what the tests claim of a pipelined step --------------------------------------------------------------------------


def ticks_body(hlo: Hlo) -> str:
    """The body of the loop over ticks: the one loop in which a conditional stands."""
    bodies = hlo.loops_with("conditional")
    assert len(bodies) == 1, f"{len(bodies)} loops hold a conditional; the stage programs' switch should be in one"
    return bodies[0]


def tick_conditionals(hlo: Hlo) -> list[int]:
    """How many branches the conditionals of a tick have."""
    return [len(hlo.branches_of(op)) for op in hlo.computations[ticks_body(hlo)] if op.opcode == "conditional"]


def arrivals(hlo: Hlo) -> list[Array]:
    """The arrays that collective permutes bring in each tick, however XLA has combined them."""
    ops = hlo.computations[ticks_body(hlo)]
    return [array for op in ops if re.fullmatch("collective-permute(-done)?", op.opcode) for array in op.arrays]


def permutations(hlo: Hlo) -> set[str]:
    """The distinct `source_target_pairs` of the collective permutes of a tick."""
    ops = [op for op in hlo.computations[ticks_body(hlo)] if re.fullmatch("collective-permute(-start)?", op.opcode)]
    return {match[1] for op in ops if (match := re.search(r"source_target_pairs=(\{.*?\}\})", op.attributes))}


def check_pipeline(hlo: Hlo, machine: Machine) -> None:
    """The compiled program still is the machine: one switch per tick, its transfers beside it and nowhere else.

    Where the machine stages residuals, there is one more conditional for each way to store them.
    """
    assert tick_conditionals(hlo) == [machine.num_stage_programs + 1] + [2] * (
        len(machine.staging.stores) if machine.staging else 0
    )
    assert hlo.in_branches("collective-permute.*") == []
    sent = sorted(item.shape for box in machine.mail.boxes for item in box.packing.buffers if item.elements)
    assert sorted(array.shape for array in arrivals(hlo)) == sent
    assert len(permutations(hlo)) == len({channel.pairs for channel in machine.routing.channels})


def check_rings(hlo: Hlo, machine: Machine) -> None:
    """No ring or mailbox is written as a whole in a tick. Those of a single row are: a new row is all of them.

    Flat rings aren't looked at where the machine stages residuals: the staging may have the same shape.
    """
    stores = [
        (ring.shape, ring.bytes) for ring in machine.residuals.rings if len(ring.shape) > 1 or not machine.staging
    ]
    for box in machine.mail.boxes:
        stores += [((box.rows, *item.shape), box.rows * item.bytes) for item in box.packing.buffers]
    shapes = {shape for shape, size in stores if shape[0] > 1 and size >= _SMALL_RING}
    written = {s: [str(op)[:200] for op in ops] for s in shapes if (ops := hlo.whole_writes(s, ticks_body(hlo)))}
    assert not written, f"rings and mailboxes that a tick writes in whole: {written}"


def overlapped(hlo: Hlo) -> int:
    """How many of a tick's collective permutes begin before the conditional and end after it."""
    ops = hlo.computations[ticks_body(hlo)]
    at = {op.name: i for i, op in enumerate(ops)}
    work = next(i for i, op in enumerate(ops) if op.opcode == "conditional")
    ends = [(i, op) for i, op in enumerate(ops) if op.opcode == "collective-permute-done"]
    return sum(at[op.operands[0]] < work < i for i, op in ends)
