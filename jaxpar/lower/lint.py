"""A check of the compiled program: exchanges between devices inside a branch that not all devices take.

The machine's own exchanges are outside the branches. Inside, the compiler may add some for the axes that it handles,
where the user's shardings ask for it. Sums and gathers among the devices of one stage are right there; a
collective-permute hangs XLA:CPU, which waits for every device of the program.
"""

from __future__ import annotations

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SINGLE_BRANCH = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_PERMUTE = re.compile(r"= \S+ collective-permute(?:-start)?\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def find_permutes_in_branches(hlo: str) -> list[str]:
    """Where in the traced program the collective-permutes come from that lie inside a conditional's branches."""
    lines: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = lines.setdefault(match.group(1), [])
        else:
            current.append(line)
    stack = [name for body in lines.values() for line in body for name in _branches_of(line)]
    seen: set[str] = set()
    found: list[str] = []
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in lines.get(name, ()):
            if _PERMUTE.search(line):
                origin = _OP_NAME.search(line)
                found.append(origin.group(1) if origin else "an operation without a name")
            stack.extend(_CALLED.findall(line))
            stack.extend(_branches_of(line))
    return found


def _branches_of(line: str) -> list[str]:
    names = [n.strip().lstrip("%") for group in _BRANCHES.findall(line) for n in group.split(",")]
    return [*names, *_SINGLE_BRANCH.findall(line)]
