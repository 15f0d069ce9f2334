"""What each stage's actions and transfers cost per micro-batch, in seconds and in bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxpar.errors import ScheduleError
from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import Edge, StageDag


@dataclass(frozen=True)
class Link:
    """What joins two ranks: a message of n bytes occupies it for `n / bandwidth`, and is there `latency` later.

    Args:
      latency: seconds; at least 0.
      bandwidth: bytes per second in one direction; the two directions don't disturb each other. More than 0.

    Raises:
      ScheduleError: a number is out of range.

    >>> Link(latency=1e-5, bandwidth=25e9).occupancy(1e6)
    4e-05
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not self.latency >= 0 or not self.bandwidth > 0:
            raise ScheduleError(
                f"a link has a latency of at least 0 s and a bandwidth of more than 0 bytes/s, "
                f"got {self.latency} and {self.bandwidth}"
            )

    def occupancy(self, size: float) -> float:
        """Seconds for which a message of `size` bytes keeps others from the link."""
        return size / self.bandwidth


@dataclass(frozen=True)
class StageCosts:
    """Seconds and bytes per micro-batch; any unit of time will do as long as it is one for all.

    Transfers are given in one of two ways: `transfer`, seconds by which values come later, however many are on their
    way at once; or `link` with `sent_bytes`, where values from one rank to another queue.

    Args:
      forward: seconds of F, for each stage.
      backward: seconds of B, for each stage; not needed for a forward-only step.
      transfer: seconds from the end of a stage's action until its value is on another rank; one number for all edges,
        or one for each `(src, dst)` of the stage graph, with 0 for those not given. Between stages of one rank it is 0.
      input_backward: seconds of I, for each stage, with `W = B - I`; half of B by default. U costs nothing.
      residual_bytes: bytes that each stage keeps from the start of F to the end of B, or of I if the backward is split;
        of a forward-only step, for the time of F.
      weight_residual_bytes: of those, the bytes that W still needs, kept to its end; all of them by default.
      sent_bytes: bytes along an edge; one number for all, or one for each `(src, dst)`, with 0 for those not given.
      link: the link between two ranks; one for all, or one for each pair `(from, to)`. A pair that is given in one
        direction only has the same link in the other.

    Raises:
      ScheduleError: a number is negative, the lengths differ, or both `transfer` and `link` are given.

    >>> StageCosts(forward=(1.0,), backward=(2.0,)).of(Action("W", 0, 3))
    1.0
    >>> slow = StageCosts((1.0, 1.0), (2.0, 2.0), sent_bytes=50e6, link=Link(latency=0.5, bandwidth=100e6))
    >>> slow.transfer_of(StageDag.chain(2), 0, 1)
    1.0
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...] = ()
    transfer: float | Mapping[Edge, float] = 0.0
    input_backward: tuple[float, ...] | None = None
    residual_bytes: tuple[float, ...] = ()
    weight_residual_bytes: tuple[float, ...] | None = None
    sent_bytes: float | Mapping[Edge, float] = 0.0
    link: Link | Mapping[tuple[int, int], Link] | None = None

    def __post_init__(self) -> None:
        if problems := list(_find_problems(self)):
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

    def released_by(self, action: Action) -> float:
        """Bytes of residuals that are free when `action`, a part of a backward, has ended.

        >>> costs = StageCosts((1.0,), (2.0,), residual_bytes=(8.0,), weight_residual_bytes=(3.0,))
        >>> [costs.released_by(Action(kind, 0, 0)) for kind in "FBIW"]
        [0.0, 8.0, 5.0, 3.0]
        """
        whole = self.residual_bytes[action.stage]
        kept = whole if self.weight_residual_bytes is None else self.weight_residual_bytes[action.stage]
        return {"B": whole, "I": whole - kept, "W": kept}.get(action.kind, 0.0)

    def message(self, dag: StageDag, src: int, dst: int) -> tuple[float, float]:
        """Seconds for which a value from stage `src` to stage `dst` occupies its link, and the link's latency."""
        here, there = dag.rank_of[src], dag.rank_of[dst]
        if here == there:
            return 0.0, 0.0
        if self.link is None:
            return 0.0, _at(self.transfer, (src, dst))
        link = self._link_between(here, there)
        return link.occupancy(_at(self.sent_bytes, (src, dst))), link.latency

    def transfer_of(self, dag: StageDag, src: int, dst: int) -> float:
        """Seconds from the end of an action of stage `src` until stage `dst` can use its value, the link being idle."""
        return sum(self.message(dag, src, dst))

    def _link_between(self, here: int, there: int) -> Link:
        if not isinstance(self.link, Mapping):
            return self.link or Link()
        return self.link.get((here, there)) or self.link[there, here]

    def check_for(self, dag: StageDag) -> None:
        """Raise `ScheduleError` if these are not the costs of this stage graph."""
        if len(self.forward) != dag.num_stages:
            raise ScheduleError(f"costs are for {len(self.forward)} stages, but the stage graph has {dag.num_stages}")
        if dag.has_backward and not self.backward:
            raise ScheduleError("costs have no backward, but the stage graph has: give StageCosts(backward=...)")
        edges = dag.forward + dag.backward
        for name, given in (("transfer costs", self.transfer), ("sent bytes", self.sent_bytes)):
            strange = [edge for edge in given if edge not in edges] if isinstance(given, Mapping) else []
            if strange:
                raise ScheduleError(f"{name} are given for {strange}, which are not edges of the stage graph")
        if isinstance(self.link, Mapping):
            pairs = {(dag.rank_of[src], dag.rank_of[dst]) for src, dst in edges}
            missing = [(a, b) for a, b in sorted(pairs) if a != b and not {(a, b), (b, a)} & self.link.keys()]
            if missing:
                raise ScheduleError(f"no link is given between the ranks {missing}, which are joined by edges")


def _at(given: float | Mapping[Edge, float], edge: Edge) -> float:
    return given.get(edge, 0.0) if isinstance(given, Mapping) else given


def _find_problems(costs: StageCosts) -> Iterator[str]:
    lists = {
        "forward": costs.forward,
        "backward": costs.backward,
        "input_backward": costs.input_backward or (),
        "residual_bytes": costs.residual_bytes,
        "weight_residual_bytes": costs.weight_residual_bytes or (),
    }
    for name, given in lists.items():
        yield from (f"{name}[{stage}] = {x} < 0" for stage, x in enumerate(given) if x < 0)
        if given and len(given) != len(costs.forward):
            yield f"{name} is for {len(given)} stages, forward for {len(costs.forward)}"
    for name, by_edge in (("transfer", costs.transfer), ("sent_bytes", costs.sent_bytes)):
        numbers = by_edge.values() if isinstance(by_edge, Mapping) else (by_edge,)
        yield from (f"{name} = {x} < 0" for x in numbers if x < 0)
    for part, whole in (("input_backward", "backward"), ("weight_residual_bytes", "residual_bytes")):
        for stage, (x, limit) in enumerate(zip(lists[part], lists[whole], strict=False)):
            if x > limit:
                yield f"{part}[{stage}] = {x} is more than the whole, {whole}[{stage}] = {limit}"
    if costs.weight_residual_bytes and not costs.residual_bytes:
        yield "weight_residual_bytes is given, but not the residual_bytes that it is a part of"
    if costs.link is not None and costs.transfer:
        yield "both transfer and link are given: write the link's latency instead of transfer"
