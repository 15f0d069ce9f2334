"""From the order of each rank's actions to ticks: as early as possible, keeping the order."""

from collections.abc import Collection, Mapping

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.needs import find_needs
from jaxpar.schedule.orders import Orders
from jaxpar.schedule.text import Grid


def place_orders(dag: StageDag, orders: Orders, *, exchange: int, name: str) -> Grid:
    """Give each action the first tick in which its rank is free and what it needs is there.

        t(a) = max(t(the action before a on its rank) + 1, t(n) + lag(n, a) for each n that a needs)

    Needs that no order has are left out, for `validate_timetable` to report.

    Args:
      dag: the stage graph.
      orders: for each rank, its actions in order.
      exchange: ticks that a value takes to another rank, 1 or 2.
      name: the timetable's name, for errors.

    Returns:
      `grid[tick][rank]`.

    Raises:
      ScheduleError: the orders wait for each other for ever, and where.

    >>> orders = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    >>> place_orders(StageDag.chain(2), orders, exchange=1, name="by hand")
    ((0F0, None), (None, 1F0), (None, 1B0), (0B0, None))
    """
    known = {action for order in orders for action in order}
    ticks: dict[Action, int] = {}
    placed: list[list[int]] = [[] for _ in orders]  # the ticks of each rank's first actions
    moved = True
    while moved:
        moved = False
        for order, mine in zip(orders, placed, strict=True):
            while len(mine) < len(order):
                action = order[len(mine)]
                needs = list(find_needs(dag, action, known))
                if not all(need in ticks for need in needs):
                    break
                arrivals = [ticks[need] + dag.lag(need.stage, action.stage, exchange) for need in needs]
                mine.append(max([mine[-1] + 1 if mine else 0, *arrivals]))
                ticks.setdefault(action, mine[-1])
                moved = True
    stuck = {
        rank: list(order[len(placed[rank]) :]) for rank, order in enumerate(orders) if len(placed[rank]) < len(order)
    }
    if stuck:
        raise ScheduleError(_explain_deadlock(dag, stuck, ticks, known, name))
    return _fill_grid(orders, placed)


def keeps_lags(dag: StageDag, grid: Grid, *, exchange: int) -> bool:
    """Whether each action of `grid` comes when what it needs is there, as far as that is in the grid at all."""
    ticks = {action: tick for tick, cells in enumerate(grid) for action in cells if action is not None}
    return all(
        ticks[need] + dag.lag(need.stage, action.stage, exchange) <= tick
        for action, tick in ticks.items()
        for need in find_needs(dag, action, ticks)
    )


def _fill_grid(orders: Orders, placed: list[list[int]]) -> Grid:
    num_ticks = max((ticks[-1] + 1 for ticks in placed if ticks), default=0)
    grid: list[list[Action | None]] = [[None] * len(orders) for _ in range(num_ticks)]
    for rank, (order, ticks) in enumerate(zip(orders, placed, strict=True)):
        for action, tick in zip(order, ticks, strict=True):
            grid[tick][rank] = action
    return tuple(map(tuple, grid))


def _explain_deadlock(
    dag: StageDag,
    stuck: Mapping[int, list[Action]],
    done: Collection[Action],
    known: Collection[Action],
    name: str,
) -> str:
    lines = [f"timetable {name!r} deadlocks after {len(done)} of {len(known)} actions:"]
    for rank, left in stuck.items():
        needs = [need for need in find_needs(dag, left[0], known) if need not in done]
        for need in needs:
            there = next(other for other, actions in stuck.items() if need in actions)
            lines.append(
                f"  rank {rank} is stuck at {left[0]}, which needs {need}; {_place(need, there, stuck[there])}"
            )
    return "\n".join(lines)


def _place(need: Action, rank: int, left: list[Action]) -> str:
    behind = left.index(need)
    return f"rank {rank} does it next" if not behind else f"rank {rank} has it behind {left[0]}, {behind} later"
