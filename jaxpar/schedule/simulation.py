"""What a simulation says: when each action starts and ends, and what each rank holds meanwhile."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import KINDS, Action
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.timetable import Timetable
from jaxpar.text import format_bytes, format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Simulation:
    """A timetable and its times, simulated or measured.

    `makespan`, `start`, `end`, `busy`, `idle` and `span` are in the unit of the costs.

    Args:
      timetable: what was simulated.
      mode: how: "executor", "free" or "blocking"; "measured" if these are times of a real run.
      start: when each action starts.
      end: when it ends.
      costs: what was simulated with; of a measured run, None if nothing is known of bytes.
    """

    timetable: Timetable = field(repr=False)
    mode: str
    start: Mapping[Action, float] = field(repr=False)
    end: Mapping[Action, float] = field(repr=False)
    costs: StageCosts | None = field(default=None, repr=False)

    @classmethod
    def from_times(
        cls, timetable: Timetable, times: Mapping[Action, tuple[float, float]], costs: StageCosts | None = None
    ) -> "Simulation":
        """Wrap measured times, so that they can be printed, drawn and traced as simulated ones are.

        Args:
          timetable: what ran.
          times: (start, end) of each of its actions; moved so that the first starts at 0.
          costs: for the bytes; None if they don't matter.

        Raises:
          ScheduleError: times of some actions are missing.
        """
        orders = [timetable.order(rank) for rank in range(timetable.dag.num_ranks)]
        missing = [action for order in orders for action in order if action not in times]
        if missing:
            raise ScheduleError(f"no times are given for {len(missing)} actions: {str(missing[:5])[1:-1]} ...")
        zero = min((begin for begin, _ in times.values()), default=0.0)
        start = {action: times[action][0] - zero for order in orders for action in order}
        end = {action: times[action][1] - zero for action in start}
        return cls(timetable, "measured", start, end, costs)

    def median_costs(self) -> StageCosts:
        """What the actions took, as costs: of each stage, the median over its micro-batches; bytes and links as given.

        With those of a measured run, `simulate(run.timetable, run.median_costs())` says what the timetable costs when
        nothing but its own waiting comes between its actions.

        >>> from jaxpar.schedule import StageDag, one_f_one_b, simulate
        >>> costs = StageCosts((1.0, 2.0), (2.0, 5.0), input_backward=(1.0, 2.5))
        >>> simulate(one_f_one_b(StageDag.chain(2), 4), costs).median_costs() == costs
        True
        """
        stages = range(self.timetable.dag.num_stages)
        took: dict[tuple[str, int], dict[int, float]] = {(kind, s): {} for kind in KINDS for s in stages}
        for action, begin in self.start.items():
            took[action.kind, action.stage][action.microbatch] = self.end[action] - begin
        forward = tuple(median(took["F", s].values()) for s in stages)
        if not self.timetable.dag.has_backward:
            return replace(self.costs or StageCosts(forward), forward=forward)
        backward, inputs = [], []
        for s in stages:
            halves = took["I", s]
            backward.append(median([*took["B", s].values(), *(halves[m] + took["W", s][m] for m in halves)]))
            inputs.append(min(median(halves.values()), backward[s]) if halves else backward[s] / 2)
        given = self.costs or StageCosts(forward)
        return replace(given, forward=forward, backward=tuple(backward), input_backward=tuple(inputs))

    @cached_property
    def makespan(self) -> float:
        """The last end."""
        return max(self.end.values(), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For each rank, the time spent in actions."""
        times = [0.0] * self.timetable.dag.num_ranks
        for action, begin in self.start.items():
            times[self.timetable.dag.rank_of[action.stage]] += self.end[action] - begin
        return tuple(times)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank, the time not spent in actions."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def span(self) -> tuple[float, ...]:
        """For each rank, the time from its first start to its last end.

        The longest is the time per step when steps follow each other with no barrier between them, as zero-bubble
        schedules want it: Qi et al. 2024, https://arxiv.org/abs/2401.10241, sections 2.2 and 4.
        """
        orders = [self.timetable.order(rank) for rank in range(self.timetable.dag.num_ranks)]
        return tuple(self.end[order[-1]] - self.start[order[0]] if order else 0.0 for order in orders)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time: `1 - sum(busy) / (R * makespan)`; 0 if nothing takes time."""
        total = len(self.busy) * self.makespan
        return 1 - sum(self.busy) / total if total else 0.0

    @property
    def peak_in_flight_on_rank(self) -> tuple[int, ...]:
        """For each rank, the most micro-batches in flight; its order of actions decides it, not their times."""
        return self.timetable.peak_in_flight_on_rank

    @property
    def peak_bytes_on_rank(self) -> tuple[float, ...]:
        """For each rank, the most bytes of residuals at once; its order of actions decides it, not their times.

        Values that have been received and wait for their action are not in it.

        Raises:
          ScheduleError: the costs don't give `residual_bytes`.
        """
        ranks = range(self.timetable.dag.num_ranks)
        return tuple(max(held for _, held in self.memory_curve(rank)) for rank in ranks)

    def memory_curve(self, rank: int) -> tuple[tuple[float, float], ...]:
        """Steps `(time, bytes)` from (0, 0) on: the residuals that `rank` holds from that time to the next step's.

        A micro-batch's residuals are there from the start of its F; the end of B frees them, or that of I those that W
        does not need, and that of W the rest. A forward-only step frees them when F ends.

        Raises:
          ScheduleError: the costs don't give `residual_bytes`.

        >>> from jaxpar.schedule import StageDag, one_f_one_b, simulate
        >>> costs = StageCosts((1.0,), (2.0,), residual_bytes=(64.0,))
        >>> simulate(one_f_one_b(StageDag.chain(1), 1), costs).memory_curve(0)
        ((0.0, 0.0), (0.0, 64.0), (3.0, 0.0))
        """
        costs = self.costs
        if costs is None or not costs.residual_bytes:
            raise ScheduleError("memory in bytes needs the residuals' sizes: give StageCosts(residual_bytes=...)")
        return self._count(rank, lambda action: costs.residual_bytes[action.stage], costs.released_by)

    def in_flight_curve(self, rank: int) -> tuple[tuple[float, float], ...]:
        """As `memory_curve`, counting micro-batches: from the start of F to the end of B, or of W."""
        return self._count(rank, lambda _: 1, lambda action: action.kind in "BW")

    # What follows is made of simulations, and so imported when it is called.

    def draw(self, path: str | os.PathLike[str] | None = None, *, unit: str = "s") -> "Figure":
        """Draw each rank's actions over time, coloured by kind and labelled with the micro-batch.

        Under each rank a thin strip shows the memory of its residuals, all ranks to one scale, with the peak at the
        right: bytes if the costs give `residual_bytes`, else micro-batches in flight.

        Args:
          path: where to write it, an SVG or PNG by its suffix; None not to.
          unit: of its times, as the axis says it.

        Returns:
          the `matplotlib.figure.Figure`, made without pyplot.

        Raises:
          ImportError: matplotlib is not installed.

        >>> from jaxpar.schedule import StageDag, gpipe, simulate
        >>> figure = simulate(gpipe(StageDag.chain(2), 4), StageCosts.uniform(2)).draw(unit="forwards")
        >>> figure.axes[0].get_xlabel()
        'time (forwards)'
        """
        from jaxpar.schedule.picture import draw_simulation

        return draw_simulation(self, path, unit=unit)

    def write_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the actions and the memory of each rank as a trace, for https://ui.perfetto.dev; times are in seconds.

        Args:
          path: the file to write; `.json`.

        >>> from jaxpar.schedule import StageDag, gpipe, simulate
        >>> run = simulate(gpipe(StageDag.chain(2), 4), StageCosts((1e-3, 1e-3), (2e-3, 2e-3)))
        >>> run.write_chrome_trace("/dev/null")
        """
        from jaxpar.schedule.chrome_trace import write_chrome_trace

        write_chrome_trace(self, path)

    def _count(
        self, rank: int, taken: Callable[[Action], float], released: Callable[[Action], float]
    ) -> tuple[tuple[float, float], ...]:
        steps, held, forward_only = [(0.0, 0.0)], 0.0, not self.timetable.dag.has_backward
        for action in self.timetable.order(rank):
            if action.kind == "F":
                held += taken(action)
                steps.append((self.start[action], held))
            free = taken(action) if forward_only else released(action)
            if free:
                held -= free
                steps.append((self.end[action], held))
        return tuple(steps)


@dataclass(frozen=True)
class Lockstep:
    """The two simulations of one timetable; prints side by side."""

    executor: Simulation
    free: Simulation

    @property
    def ratio(self) -> float:
        """The executor's makespan over the free-running one, at least 1."""
        return self.executor.makespan / self.free.makespan if self.free.makespan else 1.0

    def __str__(self) -> str:
        rows = [("", "makespan", "bubble")]
        rows += [(s.mode, f"{s.makespan:.4g}", f"{s.bubble_fraction:.1%}") for s in (self.executor, self.free)]
        rows += [("ratio", f"{self.ratio:.3f}", "")]
        return "\n".join(f"{a:<8} {b:>10} {c:>8}".rstrip() for a, b, c in rows) + "\n\n" + self._by_rank()

    def _by_rank(self) -> str:
        costs = self.free.costs
        in_bytes = costs is not None and bool(costs.residual_bytes)
        peaks = [format_bytes(x) for x in self.free.peak_bytes_on_rank] if in_bytes else None
        rows = [("rank", "busy", "idle", "idle (free)", "in flight", *(["residuals"] if peaks else []))]
        columns = (self.free.busy, self.executor.idle, self.free.idle, self.free.peak_in_flight_on_rank)
        for rank, numbers in enumerate(zip(*columns, strict=True)):
            cells = (f"{x:.4g}" for x in numbers)
            rows.append((str(rank), *cells, *([peaks[rank]] if peaks else [])))
        return format_table(rows)
