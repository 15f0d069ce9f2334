"""Improve an order: do what can be done now, without ever holding more than the order did.

What Qi et al. 2024, https://arxiv.org/abs/2405.15362, call squeezing and reordering, in one pass: list scheduling whose
priority is the place in a given order. It is not optimal. What it guarantees:

**The peak in flight of each rank is at most that of the given order.** An F overtakes others only if that raises the
count nowhere above the peak; an I changes no count, and a W only lowers them.

**It never gets stuck if the given order does not.** Of the actions that are left, take the one that is done first when
all ranks follow the given orders: it is the first of those left on its rank, and all that it needs is done.
"""

from collections.abc import Callable, Sequence

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.needs import find_needs
from jaxpar.schedule.orders import Orders
from jaxpar.schedule.timetable import Timetable


def fill_in_order(dag: StageDag, num_microbatches: int, orders: Orders, *, exchange: int, name: str) -> Timetable:
    """Fill a timetable tick by tick: each rank does the first action of its order that can be done now, W's last.

    Args:
      dag: the stage graph.
      num_microbatches: M.
      orders: for each rank, its actions in an order that does not deadlock; B or I and W of a stage each in order.
      exchange: ticks that a value takes to another rank, 1 or 2.
      name: the timetable's name.

    >>> one_by_one = [[Action(kind, stage, m) for m in range(3) for kind in "FIW"] for stage in range(2)]
    >>> print(fill_in_order(StageDag.chain(2), 3, one_by_one, exchange=1, name="one in flight"))
    one in flight  microbatches=3 exchange=1
    rank 0 | 0F0  .   .  0I0 0W0 0F1  .   .  0I1 0W1 0F2  .   .  0I2 0W2
    rank 1 |  .  1F0 1I0 1W0  .   .  1F1 1I1 1W1  .   .  1F2 1I2 1W2  .
    """
    ranks = [_Rank(order) for order in orders]
    known = {action for order in orders for action in order}
    ticks: dict[Action, int] = {}
    grid: list[tuple[Action | None, ...]] = []

    def can_start(action: Action) -> bool:
        needs = find_needs(dag, action, known)
        return all(n in ticks and ticks[n] + dag.lag(n.stage, action.stage, exchange) <= len(grid) for n in needs)

    while any(rank.left for rank in ranks):
        cells = tuple(rank.take_next(can_start) for rank in ranks)
        ticks.update((action, len(grid)) for action in cells if action is not None)
        grid.append(cells)
    return Timetable(name, dag, num_microbatches, tuple(grid), exchange)


def find_peak(order: Sequence[Action], held: int = 0) -> int:
    """The most micro-batches in flight at once, over all stages of a rank that does `order`.

    >>> find_peak([Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)])
    2
    """
    peak = held
    for action in order:
        held += action.kind == "F"
        peak = max(peak, held)
        held -= action.kind in "BW"
    return peak


class _Rank:
    """What is left to do on one rank, in the given order, and what it holds."""

    def __init__(self, order: Sequence[Action]):
        self.left = list(order)
        self.held = 0
        self.peak = find_peak(order)
        self.kinds_of_work = len({(action.kind, action.stage) for action in order})

    def take_next(self, can_start: Callable[[Action], bool]) -> Action | None:
        index = self._choose(can_start)
        if index is None:
            return None
        action = self.left.pop(index)
        self.held += (action.kind == "F") - (action.kind in "BW")
        return action

    def _choose(self, can_start: Callable[[Action], bool]) -> int | None:
        first_weight = None
        passed: set[tuple[str, int]] = set()  # (kind, stage) pairs whose next action is not for now
        held = most = self.held
        for index, action in enumerate(self.left):
            work = (action.kind, action.stage)
            if work not in passed:
                fits = action.kind != "F" or most < self.peak
                if fits and can_start(action):
                    if action.kind != "W":
                        return index
                    first_weight = index if first_weight is None else first_weight
                passed.add(work)
                if len(passed) == self.kinds_of_work:
                    break
            held += action.kind == "F"
            most = max(most, held)
            held -= action.kind in "BW"
        return first_weight
