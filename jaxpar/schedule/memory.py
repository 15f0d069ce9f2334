"""How much a rank may hold: a limit per rank, and what one micro-batch in flight takes in each stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.errors import ScheduleError
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag
from jaxpar.schedule.timetable import Timetable


@dataclass(frozen=True)
class MemoryLimit:
    """The most that each rank may hold at once, in any one unit: micro-batches, or bytes.

    In each tick, with `n(s)` the micro-batches that stage `s` holds, those whose backward has not yet run and those of
    which only W is left, the actions of the tick itself included:

        sum over the stages s of rank r:  n_before_backward(s) * held[s] + n_before_W(s) * kept[s]  <=  per_rank[r]

    Args:
      per_rank: for each rank.
      held: for each stage, what a micro-batch takes from its F to the end of its B or I.
      kept: for each stage, what it takes from then to the end of its W; at most `held`, and by default as much.

    Raises:
      ScheduleError: a number is negative, the lengths differ, or `kept` is more than `held`.

    >>> limit = MemoryLimit.in_microbatches(StageDag.chain(2), 3)
    >>> limit.per_rank, limit.held
    ((3, 3), (1.0, 1.0))
    >>> from jaxpar.schedule import one_f_one_b
    >>> limit.peaks(one_f_one_b(StageDag.chain(2), 8))
    (3.0, 1.0)
    """

    per_rank: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.kept:
            object.__setattr__(self, "kept", self.held)
        problems = [f"kept is for {len(self.kept)} stages, held for {len(self.held)}"] * (
            len(self.kept) != len(self.held)
        )
        lists = {"per_rank": self.per_rank, "held": self.held, "kept": self.kept}
        problems += [f"{name}[{i}] = {x} < 0" for name, xs in lists.items() for i, x in enumerate(xs) if x < 0]
        problems += [
            f"kept[{s}] = {kept} is more than held[{s}] = {held}"
            for s, (held, kept) in enumerate(zip(self.held, self.kept, strict=False))
            if kept > held
        ]
        if problems:
            raise ScheduleError("not a memory limit: " + "; ".join(problems))

    @classmethod
    def in_microbatches(cls, dag: StageDag, most: float | Sequence[float]) -> "MemoryLimit":
        """A limit on the micro-batches in flight, summed over a rank's stages; one number, or one for each rank."""
        per_rank = (most,) * dag.num_ranks if isinstance(most, int | float) else tuple(most)
        return cls(per_rank, (1.0,) * dag.num_stages)

    @classmethod
    def in_bytes(cls, dag: StageDag, costs: StageCosts, most: float | Sequence[float]) -> "MemoryLimit":
        """A limit on the bytes of residuals that `costs` gives; one number, or one for each rank.

        Where I makes more for W than it frees, a stage is counted with as much from its F on.

        Raises:
          ScheduleError: the costs have no `residual_bytes`.
        """
        if not costs.residual_bytes:
            raise ScheduleError("a memory limit in bytes needs StageCosts(residual_bytes=...)")
        per_rank = (most,) * dag.num_ranks if isinstance(most, int | float) else tuple(most)
        kept = costs.weight_residual_bytes or costs.residual_bytes
        return cls(per_rank, tuple(map(max, costs.residual_bytes, kept)), kept)

    def check_for(self, dag: StageDag) -> None:
        """Raise `ScheduleError` if this is not a limit for the graph, or no rank order could keep it."""
        if len(self.per_rank) != dag.num_ranks or len(self.held) != dag.num_stages:
            raise ScheduleError(
                f"the memory limit is for {len(self.per_rank)} ranks and {len(self.held)} stages, "
                f"but the stage graph has {dag.num_ranks} and {dag.num_stages}"
            )
        low = [
            f"rank {rank}: {limit:g} < {need:g}"
            for rank, limit in enumerate(self.per_rank)
            if (need := sum(self.held[s] for s in dag.stages_on(rank))) > limit
        ]
        if low:
            raise ScheduleError(
                f"memory limit too low to hold one micro-batch in each stage of a rank ({', '.join(low)}): "
                "give at least that, or put fewer stages on the rank"
            )

    def peaks(self, timetable: Timetable) -> tuple[float, ...]:
        """For each rank, the most it holds at once."""
        dag = timetable.dag
        last = ("B", "I") if dag.has_backward else ("F",)
        peaks = []
        for rank in range(dag.num_ranks):
            held = peak = 0.0
            for action in timetable.order(rank):
                whole, rest = self.held[action.stage], self.kept[action.stage]
                held += whole * (action.kind == "F")
                peak = max(peak, held)
                held -= whole * (action.kind in last) + rest * (action.kind == "W")
                held += rest * (action.kind == "I")
            peaks.append(peak)
        return tuple(peaks)

    def fits(self, timetable: Timetable) -> bool:
        """Whether no rank ever holds more than its limit."""
        return all(
            peak <= limit + 1e-9 * max(1.0, limit)
            for peak, limit in zip(self.peaks(timetable), self.per_rank, strict=True)
        )
