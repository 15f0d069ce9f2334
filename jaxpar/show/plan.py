"""A plan in words and tables."""

from __future__ import annotations

from typing import Any


def render_plan(built: Any) -> str:
    return "TODO"
