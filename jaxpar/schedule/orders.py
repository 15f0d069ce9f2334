"""Writing down the order of one rank's actions, as the papers' figures are read: from left to right."""

from collections import Counter
from collections.abc import Iterable, Sequence

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag

Orders = Sequence[Sequence[Action]]  # orders[rank], each from first to last


class RankOrder:
    """The actions of one rank; each kind of work of each stage takes micro-batches 0, 1, 2 ... by itself.

    >>> RankOrder().do("F", 0, times=2).do("IWB", 0).actions
    [0F0, 0F1, 0I0, 0W0, 0B1]
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: Counter[tuple[str, int]] = Counter()

    def do(self, kinds: str, stage: int, times: int = 1) -> "RankOrder":
        """Append one action of each kind, in that order, `times` over; a B counts as an I and a W."""
        for kind in kinds * times:
            self.actions.append(Action(kind, stage, self.count("I" if kind == "B" else kind, stage)))  # type: ignore[arg-type]
            self._next.update((part, stage) for part in ("IW" if kind == "B" else kind))
        return self

    def count(self, kind: str, stage: int) -> int:
        """How many actions of that kind the stage has so far."""
        return self._next[kind, stage]


def keep_real(dag: StageDag, num_microbatches: int, orders: Iterable[Iterable[Action]]) -> list[list[Action]]:
    """Leave out micro-batches from M on, and the backwards of a forward-only step.

    What is left is still without deadlock, since micro-batches don't wait for each other. So a schedule that is defined
    for some counts only can be made for the next larger one.
    """
    kinds = "FBIW" if dag.has_backward else "F"
    return [[a for a in order if a.microbatch < num_microbatches and a.kind in kinds] for order in orders]
