"""Clusters and plans as JSON. A plan's file holds its graph, so that it can be checked against a changed program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, TypeVar

from jaxpar.errors import PlanError, ScheduleError
from jaxpar.plan.cluster import ClusterSpec, DeviceSpec, Level, LinkMatrix
from jaxpar.plan.graph_json import graph_from_dict, graph_to_dict
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.schedule.costs import Link

_FORMAT = "jaxpar plan, version 1"
_DEVICE_FIELDS = ("name", "flops", "memory_bytes", "memory_bandwidth", "source")

T = TypeVar("T")


def cluster_to_dict(cluster: ClusterSpec) -> dict[str, Any]:
    """Each kind of device once, runs of equal devices as `[name, count]`, and the links; an unlimited one has null."""
    kinds = {device.name: device for device in cluster.devices}
    runs = [[name, len(list(run))] for name, run in groupby(device.name for device in cluster.devices)]
    if isinstance(cluster.links, LinkMatrix):
        bandwidth = [[_finite(x) for x in row] for row in cluster.links.bandwidth]
        links: Any = {"latency": [list(row) for row in cluster.links.latency], "bandwidth": bandwidth}
    else:
        links = [
            {
                "size": level.size,
                "latency": level.link.latency,
                "bandwidth": _finite(level.link.bandwidth),
                "shared": level.shared,
            }
            for level in cluster.links
        ]
    specs = [{name: _plain(getattr(kind, name)) for name in _DEVICE_FIELDS} for kind in kinds.values()]
    return {"kinds": specs, "devices": runs, "links": links}


def cluster_from_dict(value: Mapping[str, Any]) -> ClusterSpec:
    """Read what `cluster_to_dict` made."""
    kinds = {spec["name"]: DeviceSpec(**spec) for spec in value["kinds"]}
    devices = tuple(kinds[name] for name, count in value["devices"] for _ in range(count))
    links = value["links"]
    if isinstance(links, dict):
        bandwidth = [[math.inf if x is None else x for x in row] for row in links["bandwidth"]]
        return ClusterSpec(devices, LinkMatrix.of(links["latency"], bandwidth))
    return ClusterSpec(devices, tuple(_level_from(level) for level in links))


def _level_from(value: Mapping[str, Any]) -> Level:
    bandwidth = math.inf if value["bandwidth"] is None else value["bandwidth"]
    return Level(value["size"], Link(value["latency"], bandwidth), value["shared"])


def _finite(x: float) -> float | None:
    return None if math.isinf(x) else x


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def plan_to_dict(plan: PipelinePlan) -> dict[str, Any]:
    """What `PipelinePlan.to_json` writes: the stages first, by the names of their operators."""
    names = [op.name for op in plan.graph.ops]
    stages = [
        {"devices": list(s.devices), "recompute": s.recompute, "ops": [names[op] for op in s.ops]} for s in plan.stages
    ]
    return {
        "format": _FORMAT,
        "planner": plan.planner,
        "search_seconds": plan.search_seconds,
        "chain": plan.chain,
        "microbatch": plan.microbatch,
        "num_microbatches": plan.num_microbatches,
        "schedule": plan.schedule,
        "schedule_options": dict(plan.schedule_options),
        "notes": list(plan.notes),
        "stages": stages,
        "cluster": cluster_to_dict(plan.cluster),
        "graph": graph_to_dict(plan.graph),
    }


def plan_from_dict(value: Mapping[str, Any]) -> PipelinePlan:
    """Read what `plan_to_dict` made; `PlanError` if it is no such thing."""
    if value.get("format") != _FORMAT:
        raise PlanError(f"not a saved plan: format is {value.get('format')!r}, but must be {_FORMAT!r}")
    graph = _read("graph", lambda: graph_from_dict(value["graph"]))
    return _read(
        "plan",
        lambda: PipelinePlan(
            graph,
            _read("cluster", lambda: cluster_from_dict(value["cluster"])),
            tuple(_stage_from(s, entry, graph.index) for s, entry in enumerate(value["stages"])),
            value["microbatch"],
            value["num_microbatches"],
            value["schedule"],
            {key: _tuples(option) for key, option in value["schedule_options"].items()},
            value["planner"],
            value["search_seconds"],
            value.get("chain", False),
            tuple(value.get("notes", ())),
        ),
    )


def _stage_from(s: int, value: Mapping[str, Any], index: Mapping[str, int]) -> PlannedStage:
    if unknown := [name for name in value["ops"] if name not in index]:
        raise PlanError(f"stage {s} has operators that its graph doesn't have: {', '.join(map(repr, unknown[:5]))}")
    return PlannedStage(tuple(index[name] for name in value["ops"]), tuple(value["devices"]), value["recompute"])


def _tuples(value: Any) -> Any:
    """JSON has only lists, options have only tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read(what: str, make: Callable[[], T]) -> T:
    """Values of the wrong kind in a file that people may edit are the file's fault, and are said to be."""
    try:
        return make()
    except KeyError as error:
        raise PlanError(f"not a saved plan: its {what} lacks {error}") from error
    except ScheduleError as error:
        raise PlanError(f"not a saved plan: its {what} has {error}") from error
    except (TypeError, AttributeError) as error:
        raise PlanError(f"not a saved plan: its {what} has a value of the wrong kind: {error}") from error
