"""A plan as data: which operators form which stage, on which devices, in micro-batches of which size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.op_names import Named, find_ops, resolve_pins
from jaxpar.plan.plan_changes import check_program
from jaxpar.plan.plan_check import check_plan, find_misfits, find_stage_cycle
from jaxpar.plan.plan_edit import merge_stages, move_ops, split_stage
from jaxpar.plan.plan_text import format_plan
from jaxpar.plan.predict import Prediction, predict, stage_seconds
from jaxpar.plan.quick_run import Limits, QuickRun, find_limits, run_quickly
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import Edge, StageDag
from jaxpar.schedule.registry import make_timetable
from jaxpar.schedule.simulate import Mode, simulate
from jaxpar.schedule.simulation import Simulation
from jaxpar.schedule.timetable import Timetable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxpar.schedule.costs import Link

_WHOLE_BACKWARDS = ("1f1b", "eager_1f1b", "kfkb", "gpipe", "interleaved_1f1b", "looped_bfs")


@dataclass(frozen=True)
class PlannedStage:
    """Some operators on some devices.

    Args:
      ops: indices into the graph's operators; sorted when made.
      devices: ids in the cluster. A stage on d devices has d replicas, each with b / d examples of every micro-batch:
        the i-th has the i-th part of the rows.
      recompute: the backward first recomputes the stage from what it received, and keeps only that.
    """

    ops: tuple[int, ...]
    devices: tuple[int, ...]
    recompute: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(sorted(int(op) for op in self.ops)))
        object.__setattr__(self, "devices", tuple(int(device) for device in self.devices))


@dataclass(frozen=True)
class PipelinePlan:
    """Stages of an operator graph on a cluster, and how a batch goes through them.

    Stages with equal devices share a rank: they run on the same devices in turn. `check` says whether the plan can be
    run; the constructor only looks whether its numbers refer to what is there.

    Args:
      graph: the program.
      cluster: the machine.
      stages: in a topological order of the stage graph.
      microbatch: b, examples in one micro-batch, over all replicas of a stage.
      num_microbatches: M; the batch has `b * M` examples.
      schedule: one of `jaxpar.schedule.SCHEDULES`.
      schedule_options: its options, such as `{"extra": 0}` for 1F1B with no more in flight than the stages downstream.
      planner: who made it.
      search_seconds: how long that took.
      chain: the stages form a chain in the order given, whatever they read: each waits for the one before it forwards
        and for the one after it backwards, as planners for chains have it. What is sent is the same.
      notes: why it is so, in sentences of the planner's; they are printed under the table.

    Raises:
      PlanError: an operator is in no stage or in several, a stage is empty, or an index or number is out of range.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op(f"layer_{i}", 1e-3, 1e-3, 1e-3) for i in range(4)],
    ...                       [(f"layer_{i}", f"layer_{i + 1}") for i in range(3)])
    >>> stages = PlannedStage((0, 1), (0,)), PlannedStage((2, 3), (1,))
    >>> plan = PipelinePlan(graph, ClusterSpec.preset("cpu", 2), stages, microbatch=2, num_microbatches=8)
    >>> plan.check()
    >>> plan.depth, plan.bottleneck
    ((2, 1), 0.006)
    """

    graph: OpGraph
    cluster: ClusterSpec
    stages: tuple[PlannedStage, ...]
    microbatch: int
    num_microbatches: int
    schedule: str = "1f1b"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    planner: str = ""
    search_seconds: float = 0.0
    chain: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "schedule_options", dict(self.schedule_options))
        object.__setattr__(self, "notes", tuple(self.notes))
        problems = list(find_misfits(self))
        if problems:
            raise PlanError(f"not a plan of {len(self.stages)} stages:\n  " + "\n  ".join(problems))

    @property
    def batch_size(self) -> int:
        """Examples in a step: b * M."""
        return self.microbatch * self.num_microbatches

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        """The stage of each operator."""
        found = [0] * self.graph.num_ops
        for s, stage in enumerate(self.stages):
            for op in stage.ops:
                found[op] = s
        return tuple(found)

    @cached_property
    def op_arrays(self) -> tuple[NDArray[np.intp], ...]:
        """The operators of each stage, to index the graph's arrays with."""
        return tuple(np.array(stage.ops, dtype=np.intp) for stage in self.stages)

    @cached_property
    def edges(self) -> Mapping[Edge, float]:
        """Edges of the stage graph, forwards, with their bytes per example; a value goes to a stage once."""
        values: dict[tuple[int, int], float] = {}  # by operator and the stage that reads it
        for e in self.graph.edges:
            target = self.stage_of[e.target]
            if self.stage_of[e.source] != target:
                values[e.source, target] = max(e.bytes, values.get((e.source, target), 0.0))
        found: dict[Edge, float] = {}
        for (op, target), size in values.items():
            edge = self.stage_of[op], target
            found[edge] = found.get(edge, 0.0) + size
        return MappingProxyType(dict(sorted(found.items())))

    @cached_property
    def waits(self) -> Mapping[Edge, float]:
        """The edges, and if this is a chain those between neighbours that send each other nothing, with 0 bytes."""
        links = {(s, s + 1): 0.0 for s in range(len(self.stages) - 1)} if self.chain else {}
        return MappingProxyType(dict(sorted((links | dict(self.edges)).items())))

    @cached_property
    def received_bytes(self) -> tuple[float, ...]:
        """Bytes per example that each stage receives forwards."""
        found = [0.0] * len(self.stages)
        for (_, target), size in self.edges.items():
            found[target] += size
        return tuple(found)

    @cached_property
    def rank_devices(self) -> tuple[tuple[int, ...], ...]:
        """The devices of each rank: the different device tuples of the stages, in their order."""
        return tuple(dict.fromkeys(stage.devices for stage in self.stages))

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of each stage."""
        index = {devices: rank for rank, devices in enumerate(self.rank_devices)}
        return tuple(index[stage.devices] for stage in self.stages)

    @cached_property
    def dag(self) -> StageDag:
        """The stage graph as a schedule sees it; backward edges are the mirror of the forward ones.

        Raises:
          PlanError: the stages form a cycle, and through which operators.
        """
        if problem := find_stage_cycle(self.graph, self.stage_of):
            raise PlanError(problem)
        forward = tuple(self.waits)
        backward = tuple((b, a) for a, b in forward) if self.graph.has_backward else ()
        ranks = len(self.rank_devices)
        return StageDag(len(self.stages), forward, backward, self.rank_of, ranks, self.graph.has_backward)

    @cached_property
    def costs(self) -> StageCosts:
        """Seconds and bytes per micro-batch of b examples; residual bytes are those on each device.

        A rank's links are those of its groups of replicas: see `ClusterSpec.group_link`.
        """
        times = self.stage_times
        links: dict[tuple[int, int], Link] = {}
        for a, b in self.waits:
            here, there = self.rank_of[a], self.rank_of[b]
            if here != there and (there, here) not in links:
                links[here, there] = self.cluster.group_link(self.rank_devices[here], self.rank_devices[there])
        sent = {edge: size * self.microbatch for edge, size in self.waits.items()}
        back = {(b, a): size for (a, b), size in sent.items()} if self.graph.has_backward else {}
        return StageCosts(
            forward=tuple(f for f, _, _ in times),
            backward=tuple(i + w for _, i, w in times) if self.graph.has_backward else (),
            input_backward=tuple(i for _, i, _ in times) if self.graph.has_backward else None,
            residual_bytes=self._kept_bytes,
            sent_bytes=sent | back,
            link=links,
        )

    @cached_property
    def stage_times(self) -> tuple[tuple[float, float, float], ...]:
        """Seconds of F, I and W of each stage, per micro-batch; see `stage_seconds`."""
        return tuple(
            stage_seconds(self.graph, self.cluster, ops, stage.devices, self.microbatch, stage.recompute)  # type: ignore[arg-type]
            for ops, stage in zip(self.op_arrays, self.stages, strict=True)
        )

    @cached_property
    def _kept_bytes(self) -> tuple[float, ...]:
        kept = []
        for s, stage in enumerate(self.stages):
            residuals = float(self.graph.residual_bytes[self.op_arrays[s]].sum())
            each = self.received_bytes[s] if stage.recompute else residuals
            kept.append(each * self.microbatch / len(stage.devices))
        return tuple(kept)

    @cached_property
    def timetable(self) -> Timetable:
        """The schedule's timetable for this stage graph and M.

        Raises:
          ScheduleError: the schedule or an option is unknown, or not for such a stage graph.
        """
        return make_timetable(self.schedule, self.dag, self.num_microbatches, **self.schedule_options)

    def simulate(self, mode: Mode = "executor") -> Simulation:
        """The timetable's times, action by action; `predict` needs only their end and is quicker."""
        return simulate(self.timetable, self.costs, mode=mode)

    @cached_property
    def quick_run(self) -> QuickRun | None:
        """The timetable in a form that is quicker to make and to time; None for schedules that have no such form."""
        limits = self._limits
        return None if limits is None else run_quickly(self.dag, self.num_microbatches, limits)

    @cached_property
    def _limits(self) -> Limits | None:
        return find_limits(self.schedule, self.schedule_options, self.dag, self.num_microbatches)

    @property
    def depth(self) -> tuple[int, ...]:
        """For each stage, the stages on the longest path from it to a sink, itself included."""
        return self.dag.depth

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """For each stage, the most micro-batches between F and B at once; times `microbatch` for examples.

        For 1F1B and GPipe that is their bound, such as `min(M, depth + extra)`; else the timetable's peak.
        """
        run = self.quick_run
        if run is None:
            return self.timetable.peak_in_flight
        return run.peak_in_flight if run.split else self.in_flight_limit

    @cached_property
    def in_flight_limit(self) -> tuple[int, ...]:
        """What the schedule is known to keep each stage to from F to B, or to I; M if nothing is known."""
        return self._limits.before_backward if self._limits else (self.num_microbatches,) * len(self.stages)

    @property
    def may_split_backward(self) -> bool:
        """Whether the schedule may do I and W apart from each other."""
        return self.schedule not in _WHOLE_BACKWARDS

    @cached_property
    def bottleneck(self) -> float:
        """Seconds per example of the rank that takes longest for a micro-batch."""
        totals = [0.0] * len(self.rank_devices)
        for rank, times in zip(self.rank_of, self.stage_times, strict=True):
            totals[rank] += sum(times)
        return max(totals) / self.microbatch

    def check(self) -> None:
        """Make sure that the plan can be run.

        Raises:
          PlanError: all that stands in the way: stages that form a cycle or aren't convex or in order, devices that
            stages share in part, a micro-batch that can't be split evenly, memory that isn't there (by how much, at
            which stage, and what would help).
        """
        check_plan(self)

    def check_program(self, graph: OpGraph) -> None:
        """Make sure that a program is still the one that this plan is for, up to its costs.

        Args:
          graph: of the program as it is now.

        Raises:
          PlanError: operators are gone, are new, compute something else (by their kind) or read others, and in which
            stages.
        """
        check_program(self, graph)

    def move(self, ops: Named, to: int) -> PipelinePlan:
        """The plan with some operators in another stage; stages may be renumbered, to stay in topological order.

        Args:
          ops: a name, the module of several, an index, or several of these; see `jaxpar.plan.op_names.find_ops`.
          to: the stage.

        Raises:
          PlanError: a name is unknown; a stage would be empty; or stages would wait for each other, and along which
            path of operators.
        """
        return move_ops(self, dict.fromkeys(find_ops(self.graph, ops), to))

    def with_pins(self, pins: Mapping[str, int]) -> PipelinePlan:
        """The plan with operators moved to where pins want them; see `jaxpar.plan.op_names.resolve_pins`.

        Raises:
          PlanError: as `resolve_pins` and `move`.
        """
        return move_ops(self, resolve_pins(self.graph, pins))

    def merge(self, first: int, second: int, devices: Sequence[int] | None = None) -> PipelinePlan:
        """The plan with two stages as one, on the devices of both unless told.

        Raises:
          PlanError: stages would wait for each other, and along which path of operators.
        """
        return merge_stages(self, first, second, devices)

    def split(self, stage: int, ops: Named, devices: Sequence[int]) -> PipelinePlan:
        """The plan with some operators of a stage in a new one.

        Args:
          stage: the stage.
          ops: those that leave it.
          devices: of the new stage; those that are the old one's are taken from it.

        Raises:
          PlanError: the stage doesn't hold these operators or would keep no operators or devices; or stages would wait
            for each other.
        """
        return split_stage(self, stage, find_ops(self.graph, ops), devices)

    def __str__(self) -> str:
        """A table of the stages, and what a step is thought to take."""
        return format_plan(self)

    def draw(self, path: str | os.PathLike[str] | None = None, *, mode: Mode = "executor") -> Figure:
        """A picture of the stage graph and the timetable; see `jaxpar.plan.plan_picture.draw_plan`."""
        from jaxpar.plan.plan_picture import draw_plan

        return draw_plan(self, path, mode=mode)

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal plan: stages, cluster and graph.

        Raises:
          PlanError: an option of the schedule can't be written as JSON.
        """
        from jaxpar.plan.graph_json import write_json
        from jaxpar.plan.plan_json import plan_to_dict

        try:
            return write_json(plan_to_dict(self))
        except TypeError as error:
            raise PlanError(f"the plan can't be written as JSON: {error}; options: {self.schedule_options}") from error

    @classmethod
    def from_json(cls, text: str) -> PipelinePlan:
        """Read what `to_json` wrote.

        Raises:
          PlanError: the text is not a saved plan, and what of it is wrong.
        """
        from jaxpar.plan.graph_json import read_json
        from jaxpar.plan.plan_json import plan_from_dict

        return plan_from_dict(read_json(text, "a saved plan"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PipelinePlan:
        """Read a file that `save` wrote.

        Raises:
          PlanError: as `from_json`.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def predict(self, mode: Mode = "executor") -> Prediction:
        """Seconds and bytes of a step; see `jaxpar.plan.predict.predict`."""
        return predict(self, mode)
