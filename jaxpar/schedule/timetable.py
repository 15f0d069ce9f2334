"""A schedule's result: which rank does what in which tick."""

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.csv_table import read_csv, write_csv
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.orders import Orders
from jaxpar.schedule.retime import keeps_lags, place_orders
from jaxpar.schedule.text import Grid, format_grid, parse_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxpar.schedule.costs import StageCosts
    from jaxpar.schedule.simulate import Mode

_HEADER = re.compile(r"(?P<name>.*\S)  microbatches=(?P<microbatches>\d+) exchange=(?P<exchange>\d+)")


@dataclass(frozen=True)
class Timetable:
    """`grid[tick][rank]` is the action of that rank in that tick, or None where it is idle.

    A value made in tick t can be used from tick `t + lag(src, dst)` on:

        lag(src, dst) = 1           stages on the same rank
                      = exchange    stages on different ranks

    With `exchange=1` a value is sent right after the tick that made it and must be there in the next; with 2 it has
    one tick to travel, which overlaps with work. That the actions respect this is what `validate_timetable` checks;
    construction checks only the shape.

    Args:
      name: what people call it; one line.
      dag: the stage graph that it schedules.
      num_microbatches: M.
      grid: T ticks of R cells.
      exchange: 1 or 2.

    Raises:
      ScheduleError: the grid's shape, the name, M or `exchange` is not as above.

    >>> from jaxpar.schedule import one_f_one_b
    >>> print(one_f_one_b(StageDag.chain(2), 2, exchange=1))
    1f1b  microbatches=2 exchange=1
    rank 0 | 0F0 0F1  .  0B0  .  0B1
    rank 1 |  .  1F0 1B0 1F1 1B1  .
    """

    name: str
    dag: StageDag
    num_microbatches: int
    grid: Grid = field(repr=False)
    exchange: int = 2

    def __post_init__(self) -> None:
        if not self.name or self.name != " ".join(self.name.split()):
            raise ScheduleError(f"a timetable's name is one line without spaces to spare, got {self.name!r}")
        if self.num_microbatches < 1:
            raise ScheduleError(f"timetable {self.name!r} needs at least one micro-batch, got {self.num_microbatches}")
        if self.exchange not in (1, 2):
            raise ScheduleError(f"timetable {self.name!r}: exchange is 1 or 2 ticks, got {self.exchange}")
        for tick, cells in enumerate(self.grid):
            if len(cells) != self.dag.num_ranks:
                raise ScheduleError(
                    f"timetable {self.name!r}: tick {tick} has {len(cells)} cells for {self.dag.num_ranks} ranks"
                )

    @classmethod
    def from_orders(
        cls, name: str, dag: StageDag, num_microbatches: int, orders: Orders, *, exchange: int = 2
    ) -> "Timetable":
        """Each rank does its actions in the given order, each as early as can be.

        Args:
          name: what people call it; one line.
          dag: the stage graph.
          num_microbatches: M.
          orders: for each rank, its actions in order.
          exchange: ticks that a value takes to another rank, 1 or 2.

        Raises:
          ScheduleError: the orders wait for each other for ever, and where.

        >>> orders = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
        >>> print(Timetable.from_orders("by hand", StageDag.chain(2), 1, orders))
        by hand  microbatches=1 exchange=2
        rank 0 | 0F0 . .  .  . 0B0
        rank 1 |  .  . 1F0 1B0 . .
        """
        grid = place_orders(dag, orders, exchange=exchange, name=name)
        return cls(name, dag, num_microbatches, grid, exchange)

    @property
    def num_ticks(self) -> int:
        """T, the number of ticks."""
        return len(self.grid)

    def lag(self, src: int, dst: int) -> int:
        """Ticks from an action of stage `src` to the first one of stage `dst` that can use what it made."""
        return self.dag.lag(src, dst, self.exchange)

    def tick_of(self, action: Action) -> int:
        """The tick in which `action` is done (its first, if an invalid timetable repeats it).

        Raises:
          ScheduleError: it is never done.
        """
        if action not in self._ticks:
            raise ScheduleError(f"timetable {self.name!r} has no action {action}")
        return self._ticks[action]

    def has(self, action: Action) -> bool:
        """Whether `action` is ever done."""
        return action in self._ticks

    @property
    def is_split(self) -> bool:
        """Whether some backward is done as I and W."""
        return any(action.kind == "I" for action in self._ticks)

    def order(self, rank: int) -> tuple[Action, ...]:
        """The actions of one rank, in order."""
        return tuple(action for cells in self.grid if (action := cells[rank]) is not None)

    def in_flight(self, stage: int) -> tuple[int, ...]:
        """For each tick, the micro-batches whose residuals `stage` holds.

        A micro-batch is in flight from the tick of its F to that of its B (its W if the backward is split), both
        included; in a forward-only step, in the tick of its F alone.

        >>> from jaxpar.schedule import one_f_one_b
        >>> one_f_one_b(StageDag.chain(2), 2, exchange=1).in_flight(0)
        (1, 2, 2, 2, 1, 1)
        """
        rank = self.dag.rank_of[stage]
        last = ("B", "W") if self.dag.has_backward else ("F",)
        counts, held = [], 0
        for cells in self.grid:
            action = cells[rank]
            kind = action.kind if action is not None and action.stage == stage else None
            held += kind == "F"
            counts.append(held)
            held -= kind in last
        return tuple(counts)

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each stage, the most micro-batches in flight at once."""
        return tuple(max(self.in_flight(s), default=0) for s in range(self.dag.num_stages))

    @cached_property
    def peak_in_flight_on_rank(self) -> tuple[int, ...]:
        """For each rank, the most micro-batches in flight at once, summed over its stages."""
        peaks = []
        for rank in range(self.dag.num_ranks):
            by_stage = [self.in_flight(s) for s in self.dag.stages_on(rank)]
            peaks.append(max(map(sum, zip(*by_stage, strict=True)), default=0))
        return tuple(peaks)

    def to_text(self) -> str:
        """A header line, then one row a rank; `from_text` reads it back exactly."""
        header = f"{self.name}  microbatches={self.num_microbatches} exchange={self.exchange}"
        return f"{header}\n{format_grid(self.grid, self.dag.num_ranks)}"

    __str__ = to_text

    @classmethod
    def from_text(cls, text: str, *, dag: StageDag) -> "Timetable":
        """Read what `to_text` wrote, or what a person typed: columns need not be aligned.

        Args:
          text: the header, then the rows of ranks 0 ... R-1; empty lines are skipped.
          dag: the stage graph that the text is about.

        Raises:
          ScheduleError: shows the line, with the cells that can't be read marked.

        >>> text = '''by hand  microbatches=1 exchange=1
        ... rank 0 | 0F0 .   .   0B0
        ... rank 1 | .   1F0 1B0 .'''
        >>> Timetable.from_text(text, dag=StageDag.chain(2)).order(1)
        (1F0, 1B0)
        """
        header, *rows = [line for line in text.splitlines() if line.strip()] or [""]
        match = _HEADER.fullmatch(header.strip())
        if match is None:
            raise ScheduleError(
                f"a timetable's text starts with 'NAME  microbatches=4 exchange=2' (two spaces), got:\n  {header}"
            )
        grid = parse_grid(rows, dag.num_ranks)
        return cls(match["name"], dag, int(match["microbatches"]), grid, int(match["exchange"]))

    @classmethod
    def from_csv(cls, text: str, *, dag: StageDag, name: str = "csv", exchange: int = 2) -> "Timetable":
        """Read an action table as PyTorch's pipelining writes it, or as `to_csv` does.

        Columns are taken for ticks if each action then comes when what it needs is there. If not, since PyTorch's rows
        are orders and leave transfers no time, idle ticks are put in: each rank keeps its order and does each action as
        early as can be. A pair that PyTorch overlaps, `(0F1;1B0)OVERLAP_F_B`, is its actions in that order.

        Args:
          text: one line for each of the ranks 0 ... R-1; M is one more than the highest micro-batch.
          dag: the stage graph that the table is about.
          name: the timetable's name.
          exchange: ticks that a value takes to another rank, 1 or 2.

        Raises:
          ScheduleError: a cell can't be read, with its row and column; or the orders wait for each other for ever.

        >>> print(Timetable.from_csv("0F0,0B0\\n1F0,1B0", dag=StageDag.chain(2), exchange=1))
        csv  microbatches=1 exchange=1
        rank 0 | 0F0  .   .  0B0
        rank 1 |  .  1F0 1B0  .
        """
        rows = read_csv(text, dag)
        actions = [action for row in rows for action in row if action is not None]
        if not actions:
            raise ScheduleError("the action table has no actions")
        num_microbatches = 1 + max(action.microbatch for action in actions)
        columns = tuple(zip_longest(*rows))
        if keeps_lags(dag, columns, exchange=exchange):
            return cls(name, dag, num_microbatches, columns, exchange)
        orders = [[action for action in row if action is not None] for row in rows]
        return cls.from_orders(name, dag, num_microbatches, orders, exchange=exchange)

    def to_csv(self) -> str:
        """One line a rank, one cell a tick, as PyTorch's pipelining writes its action tables.

        >>> from jaxpar.schedule import one_f_one_b
        >>> print(one_f_one_b(StageDag.chain(2), 2, exchange=1).to_csv(), end="")
        0F0,0F1,,0B0,,0B1
        ,1F0,1B0,1F1,1B1,
        """
        return write_csv(self.grid, self.dag.num_ranks)

    # What follows stands on the simulator, which stands on this file: so it is imported when it is called.

    def draw(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        costs: "StageCosts | None" = None,
        mode: "Mode" = "executor",
    ) -> "Figure":
        """Simulate, and draw each rank's actions over time with the memory under them; see `Simulation.draw`.

        Args:
          path: where to write it, an SVG or PNG by its suffix; None not to.
          costs: what to simulate with; by default F = 1 and B = 2 for all stages, transfers free.
          mode: how: "executor" for lockstep ticks, "free" or "blocking" for ranks that run freely.

        Raises:
          ImportError: matplotlib is not installed.

        >>> from jaxpar.schedule import one_f_one_b
        >>> figure = one_f_one_b(StageDag.chain(4), 8).draw()
        >>> figure.axes[0].get_title(loc="left")
        '1f1b: 4 ranks, 8 micro-batches, makespan 34 (executor), bubble 29.4 %'
        """
        from jaxpar.schedule.costs import StageCosts
        from jaxpar.schedule.picture import draw_simulation
        from jaxpar.schedule.simulate import simulate

        unit = "1 = a forward" if costs is None else "s"
        run = simulate(self, costs or StageCosts.uniform(self.dag.num_stages), mode=mode)
        return draw_simulation(run, path, unit=unit)

    def render(self, *, width: int | None = None, colour: bool | None = None, memory: bool = False) -> str:
        """Write it for a terminal: ticks counted across, wrapped to `width`, peaks in flight at the end.

        Args:
          width: columns of text; those of the terminal by default.
          colour: whether to colour the kinds of action with ANSI escapes; by default if standard output is a terminal
            and the environment variable NO_COLOR is not set (https://no-color.org).
          memory: whether to write under each rank how many micro-batches it has in flight.

        >>> from jaxpar.schedule import one_f_one_b
        >>> print(one_f_one_b(StageDag.chain(2), 3).render(width=40))
        1f1b: 2 ranks, 3 micro-batches, 10 ticks, exchange 2
        <BLANKLINE>
          tick |   0   1   2   3   4   5 ...
        rank 0 | 0F0 0F1 0F2  .   .  0B0 ...
        rank 1 |  .   .  1F0 1B0 1F1 1B1 ...
        <BLANKLINE>
          tick | ...   6   7 8   9
        rank 0 | ...  .  0B1 . 0B2
        rank 1 | ... 1F2 1B2 .  .
        <BLANKLINE>
        peak in flight: rank 0: 3, rank 1: 1
        """
        from jaxpar.schedule.terminal import render_timetable

        return render_timetable(self, width=width, colour=colour, memory=memory)

    @cached_property
    def _ticks(self) -> dict[Action, int]:
        ticks: dict[Action, int] = {}
        for tick, cells in enumerate(self.grid):
            for action in cells:
                if action is not None:
                    ticks.setdefault(action, tick)
        return ticks
