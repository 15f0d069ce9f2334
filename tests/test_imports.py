"""Imports run one way: each room may import the ones above it in this list, and itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jaxpar

ROOT = Path(jaxpar.__file__).parent
ORDER = [
    "errors",
    "_jax",
    "text",
    "schedule",
    "trace",
    "plan",
    "lower",
    "measure",
    "show",
    "arguments",
    "tracing",
    "planning",
    "options",
    "arrange",
    "passes",
    "compiled",
    "step",
    "api",
    "__init__",
    "cli",
    "__main__",
]
FILES = sorted(ROOT.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "jaxpar" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(room), f"{room} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_know_only_what_they_should(path):
    modules = imported_modules(path)
    assert not any(m.startswith("jax._src") for m in modules)
    if path.relative_to(ROOT).parts[0] == "schedule":
        assert not any(m == "jax" or m.startswith("jax.") for m in modules), "timetables are pure Python and NumPy"
