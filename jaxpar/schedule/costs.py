"""What each stage's actions and transfers cost, in seconds per micro-batch."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import Edge, StageDag


@dataclass(frozen=True)
class StageCosts:
    """Seconds per micro-batch; any unit will do as long as it is one for all.

    Args:
      forward: seconds of F, for each stage.
      backward: seconds of B, for each stage; not needed for a forward-only step.
      transfer: seconds from the end of a stage's action until its value is on another rank; one number for all edges,
        or one for each `(src, dst)` of the stage graph, with 0 for those not given. Between stages of one rank it is 0.
      input_backward: seconds of I, for each stage, with `W = B - I`; half of B by default. U costs nothing.

    Raises:
      ScheduleError: a number is negative, or the lengths differ.

    >>> StageCosts(forward=(1.0,), backward=(2.0,)).of(Action("W", 0, 3))
    1.0
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...] = ()
    transfer: float | Mapping[Edge, float] = 0.0
    input_backward: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        transfers = self.transfer.values() if isinstance(self.transfer, Mapping) else (self.transfer,)
        lists = {"forward": self.forward, "backward": self.backward, "input_backward": self.input_backward or ()}
        problems = [f"{name}[{s}] = {x} < 0" for name, xs in lists.items() for s, x in enumerate(xs) if x < 0]
        problems += [f"transfer = {x} < 0" for x in transfers if x < 0]
        problems += [
            f"{name} is for {len(xs)} stages, forward for {len(self.forward)}"
            for name, xs in lists.items()
            if xs and len(xs) != len(self.forward)
        ]
        for stage, (part, whole) in enumerate(zip(self.input_backward or (), self.backward, strict=False)):
            if part > whole:
                problems.append(f"input_backward[{stage}] = {part} is more than the whole backward's {whole}")
        if problems:
            raise ScheduleError("not the costs of stages: " + "; ".join(problems))

    @classmethod
    def uniform(
        cls, num_stages: int, *, forward: float = 1.0, backward: float = 2.0, transfer: float = 0.0
    ) -> "StageCosts":
        """Equal stages; by default a backward is two forwards, and transfers are free.

        >>> StageCosts.uniform(2).backward
        (2.0, 2.0)
        """
        return cls((forward,) * num_stages, (backward,) * num_stages, transfer)

    def of(self, action: Action) -> float:
        """Seconds of one action."""
        stage = action.stage
        if action.kind == "U":
            return 0.0
        if action.kind == "F":
            return self.forward[stage]
        if action.kind == "B":
            return self.backward[stage]
        whole = self.backward[stage]
        part = whole / 2 if self.input_backward is None else self.input_backward[stage]
        return part if action.kind == "I" else whole - part

    def transfer_of(self, dag: StageDag, src: int, dst: int) -> float:
        """Seconds from the end of an action of stage `src` until stage `dst` can use its value."""
        if dag.rank_of[src] == dag.rank_of[dst]:
            return 0.0
        return self.transfer.get((src, dst), 0.0) if isinstance(self.transfer, Mapping) else self.transfer

    def check_for(self, dag: StageDag) -> None:
        """Raise `ScheduleError` if these are not the costs of this stage graph."""
        if len(self.forward) != dag.num_stages:
            raise ScheduleError(f"costs are for {len(self.forward)} stages, but the stage graph has {dag.num_stages}")
        if dag.has_backward and not self.backward:
            raise ScheduleError("costs have no backward, but the stage graph has: give StageCosts(backward=...)")
        if isinstance(self.transfer, Mapping):
            strange = [edge for edge in self.transfer if edge not in dag.forward + dag.backward]
            if strange:
                raise ScheduleError(f"transfer costs are given for {strange}, which are not edges of the stage graph")
