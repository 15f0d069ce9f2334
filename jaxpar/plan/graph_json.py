"""Operator graphs as JSON: operators and edges by name, defaults left out, numbers exact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.plan.op_graph import Op, OpGraph
from jaxpar.plan.time_curve import TimeCurve

_NUMBERS = ("parameter_bytes", "state_bytes", "gradient_bytes", "residual_bytes", "output_bytes")
_CURVES = ("forward", "input_backward", "weight_backward")
_FIELDS = ("name", "kind", *_CURVES, *_NUMBERS)


def write_json(value: Mapping[str, Any]) -> str:
    """One line for each entry of a list, so that files can be read and compared by people."""
    fields = []
    for key, entry in value.items():
        if isinstance(entry, list) and entry:
            lines = ",\n".join("  " + json.dumps(item, allow_nan=False) for item in entry)
            fields.append(f"{json.dumps(key)}: [\n{lines}\n]")
        elif isinstance(entry, dict) and any(isinstance(item, list | dict) and item for item in entry.values()):
            fields.append(f"{json.dumps(key)}: {write_json(entry).rstrip()}")
        else:
            fields.append(f"{json.dumps(key)}: {json.dumps(entry, allow_nan=False)}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def read_json(text: str, what: str) -> dict[str, Any]:
    """Parse an object, or raise `PlanError` that says where the text stops being JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"not {what}: the text is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise PlanError(f"not {what}: it starts with {text.lstrip()[:20]!r}, not with an object {{...}}")
    return value


def graph_to_dict(graph: OpGraph) -> dict[str, Any]:
    """What `OpGraph.to_json` writes."""
    edges = [[graph.ops[e.source].name, graph.ops[e.target].name, e.bytes] for e in graph.edges]
    return {"device": graph.device, "ops": [_op_to_dict(op) for op in graph.ops], "edges": edges}


def _op_to_dict(op: Op) -> dict[str, Any]:
    found: dict[str, Any] = {"name": op.name}
    if op.kind:
        found["kind"] = op.kind
    for name in _CURVES:
        curve: TimeCurve = getattr(op, name)
        if name == "forward" or curve.points != ((1.0, 0.0),):
            found[name] = [list(point) for point in curve.points]
    defaults = {"state_bytes": 3 * op.parameter_bytes, "gradient_bytes": op.parameter_bytes}
    return found | {n: getattr(op, n) for n in _NUMBERS if getattr(op, n) != defaults.get(n, 0.0)}


def graph_from_dict(value: Mapping[str, Any]) -> OpGraph:
    """Read what `graph_to_dict` made; `PlanError` with all that is wrong."""
    problems: list[str] = []
    ops = []
    for position, entry in enumerate(_list_at(value, "ops", problems)):
        try:
            ops.append(_op_from(entry, position))
        except PlanError as error:
            problems.append(str(error))
    edges: list[tuple[str, str] | tuple[str, str, float]] = []
    for position, entry in enumerate(_list_at(value, "edges", problems)):
        names_and_bytes = (
            isinstance(entry, list) and len(entry) in (2, 3) and all(isinstance(x, str) for x in entry[:2])
        )
        if names_and_bytes and all(_is_number(x) for x in entry[2:]):
            edges.append(tuple(entry))
        else:
            problems.append(f"edges[{position}] is [source name, target name, bytes per example], got {entry!r}")
    device = value.get("device", "")
    if not isinstance(device, str):
        problems.append(f"device is the name of a device, got {device!r}")
    if problems:
        raise PlanError("not a graph of operators:\n  " + "\n  ".join(problems))
    return OpGraph.build(ops, edges, device)


def _list_at(value: Mapping[str, Any], key: str, problems: list[str]) -> Sequence[Any]:
    found = value.get(key)
    if isinstance(found, list):
        return found
    problems.append(f"{key} is a list, got {found!r:.60}")
    return ()


def _op_from(entry: Any, position: int) -> Op:
    where = f"ops[{position}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "forward" not in entry:
        raise PlanError(f"{where} is an object with a name and forward seconds, got {entry!r:.60}")
    if unknown := [key for key in entry if key not in _FIELDS]:
        raise PlanError(
            f"{where} {entry['name']!r} has unknown fields {', '.join(unknown)}; known: {', '.join(_FIELDS)}"
        )
    fields: dict[str, Any] = {}
    for key, given in entry.items():
        if key in _CURVES and isinstance(given, list):
            if not all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in given):
                raise PlanError(
                    f"{where} {entry['name']!r}: {key} is seconds or [[examples, seconds], ...], got {given!r:.60}"
                )
            fields[key] = TimeCurve(tuple((n, seconds) for n, seconds in given))
        elif key in (*_CURVES, *_NUMBERS) and not _is_number(given):
            raise PlanError(f"{where} {entry['name']!r}: {key} is a number, got {given!r:.60}")
        else:
            fields[key] = given
    return Op(**fields)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
