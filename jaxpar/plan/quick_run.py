"""The times of 1F1B, GPipe and ZB-H1 without their timetables: what a search asks for tens of times.

The same list scheduling as `jaxpar.schedule.greedy` and the same recurrences as `jaxpar.schedule.simulate`, on integers
and arrays instead of `Action`s; the tests hold them to the originals. The order of a rank's actions depends on the
stage graph and on how many may be in flight, but on no time: it is kept for plans that differ only in their costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxpar.schedule.action import Action, Kind
from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag

_IDLE = -1


@dataclass(frozen=True)
class QuickRun:
    """The actions of a schedule, by tick.

    Args:
      dag: the stage graph.
      codes: `codes[t][r]` is `3 s + kind`, with kind 0 for F, 1 for B or I and 2 for W; -1 where rank r is idle.
      peak_in_flight: for each stage, the most micro-batches from F to B, or to W, at once.
      exchange: ticks that a value takes to another rank.
    """

    dag: StageDag
    codes: tuple[tuple[int, ...], ...]
    peak_in_flight: tuple[int, ...]
    exchange: int
    split: bool

    def time_lockstep(self, costs: StageCosts) -> float:
        """The makespan by the executor's ticks: `simulate(..., mode="executor")`."""
        durations, active = self._time_codes(costs)[self._code_array], self._code_array != _IDLE
        sender, receiver, occupancy, latency = _list_exchanges(self.dag, costs)
        hears, starts = np.unique(receiver, return_index=True)
        sent, last = np.zeros(len(sender)), np.zeros(self.dag.num_ranks)
        ends = np.zeros(self.dag.num_ranks)
        waves = deque([ends] * self.exchange)
        for seconds, busy in zip(durations, active, strict=True):
            ends = np.maximum(ends, waves.popleft()) + seconds
            np.copyto(last, ends, where=busy)  # idle ticks wait too, but after its last action a rank is done
            arrived = np.zeros(self.dag.num_ranks)
            if len(sender):
                sent = np.maximum(ends[sender], sent) + occupancy
                arrived[hears] = np.maximum.reduceat(sent + latency, starts)
            waves.append(arrived)
        return float(last.max())

    def time_freely(self, costs: StageCosts) -> float:
        """The makespan of ranks that run freely: `simulate(..., mode="free")`."""
        durations = self._time_codes(costs).tolist()
        outputs, inputs = _list_mail(self.dag, costs)
        link_free_at: dict[tuple[int, int], float] = dict.fromkeys(
            ((out[0], out[1]) for each in outputs for out in each), 0.0
        )
        rank_free_at = [0.0] * self.dag.num_ranks
        done = [0] * (3 * self.dag.num_stages)
        makespan = 0.0
        for cells in self.codes:
            for rank, code in enumerate(cells):
                if code < 0:
                    continue
                microbatch = done[code]
                done[code] += 1
                begin = rank_free_at[rank]
                for arrivals in inputs[code]:
                    if arrivals[microbatch] > begin:
                        begin = arrivals[microbatch]
                end = rank_free_at[rank] = begin + durations[code]
                if end > makespan:
                    makespan = end
                for here, there, occupancy, latency, arrivals in outputs[code]:
                    sent = link_free_at[here, there] = max(end, link_free_at[here, there]) + occupancy
                    arrivals.append(sent + latency)
        return makespan

    def _time_codes(self, costs: StageCosts) -> NDArray[np.float64]:
        """Seconds by code; an idle cell, code -1, is the last entry and takes none."""
        kinds: tuple[Kind, ...] = ("F", "I", "W") if self.split else ("F", "B", "U")
        stages = range(self.dag.num_stages)
        return np.array([costs.of(Action(kind, s, 0)) for s in stages for kind in kinds] + [0.0])

    @cached_property
    def _code_array(self) -> NDArray[np.intp]:
        return np.array(self.codes, dtype=np.intp)


def _list_exchanges(
    dag: StageDag, costs: StageCosts
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Sender, receiver, occupancy and latency of what ranks exchange in a tick, sorted by receiver."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for src, dst in dag.forward + dag.backward:
        key = dag.rank_of[dst], dag.rank_of[src]
        if key[0] != key[1]:
            occupancy, latency = costs.message(dag, src, dst)
            before = found.get(key, (0.0, 0.0))
            found[key] = before[0] + occupancy, max(before[1], latency)
    # The executor exchanges both ways between neighbours, also where values go one way only.
    for receiver, sender in tuple(found):
        found.setdefault((sender, receiver), (0.0, 0.0))
    order = sorted(found)
    receivers, senders = (np.array([key[i] for key in order], dtype=np.intp) for i in (0, 1))
    times = np.array([found[key] for key in order], dtype=np.float64).reshape(len(order), 2)
    return senders, receivers, times[:, 0], times[:, 1]


_Output = tuple[int, int, float, float, list[float]]  # from rank, to rank, occupancy, latency, arrival by micro-batch


def _list_mail(dag: StageDag, costs: StageCosts) -> tuple[list[list[_Output]], list[list[list[float]]]]:
    """By code: what its actions send to other ranks, and the arrivals of what they need from other ranks."""
    outputs: list[list[_Output]] = [[] for _ in range(3 * dag.num_stages)]
    inputs: list[list[list[float]]] = [[] for _ in range(3 * dag.num_stages)]
    for kind, edges in enumerate((dag.forward, dag.backward)):
        for src, dst in edges:
            here, there = dag.rank_of[src], dag.rank_of[dst]
            if here != there:
                arrivals: list[float] = []
                outputs[3 * src + kind].append((here, there, *costs.message(dag, src, dst), arrivals))
                inputs[3 * dst + kind].append(arrivals)
    return outputs, inputs


@dataclass(frozen=True)
class Limits:
    """What `jaxpar.schedule.fill_greedily` is told by a schedule, as far as it is known here.

    Args:
      before_backward: for each stage, the most micro-batches from F to B, or to I.
      hold: for each stage, the most from F to W; None for whole backwards.
      exchange: ticks that a value takes to another rank, 1 or 2.
      forwards_first: a rank starts its backwards when all its forwards are done.
    """

    before_backward: tuple[int, ...]
    hold: tuple[int, ...] | None = None
    exchange: int = 2
    forwards_first: bool = False


def find_limits(schedule: str, options: Mapping[str, Any], dag: StageDag, num_microbatches: int) -> Limits | None:
    """The limits of a schedule by its name; None if it works by other rules, or its options can't be right.

    >>> find_limits("1f1b", {"extra": 1}, StageDag.chain(3), 8).before_backward
    (4, 3, 2)
    """
    exchange = options.get("exchange", 1 if schedule.startswith("zb_") else 2)
    extra = options.get("extra") if schedule == "1f1b" else None
    known = {"exchange", "extra"} if schedule == "1f1b" else {"exchange"}
    if exchange not in (1, 2) or not known.issuperset(options) or not dag.has_backward or (extra or 0) < 0:
        return None
    twice = tuple(min(num_microbatches, 2 * depth - 1) for depth in dag.depth)
    match schedule:
        case "1f1b":
            extra = max(dag.depth) // 2 if extra is None else extra
            return Limits(tuple(min(num_microbatches, depth + extra) for depth in dag.depth), None, exchange)
        case "eager_1f1b":
            return Limits(twice, None, exchange)
        case "gpipe":
            return Limits((num_microbatches,) * dag.num_stages, None, exchange, True)
        case "zb_h1":
            most = (min(num_microbatches, max(dag.depth)),) * dag.num_stages
            return Limits(tuple(min(num_microbatches, depth) for depth in dag.depth), most, exchange)
        case "zb_h2":
            return Limits(twice, (max(twice),) * dag.num_stages, exchange)
    return None


@lru_cache(maxsize=64)
def run_quickly(dag: StageDag, num_microbatches: int, limits: Limits) -> QuickRun:
    """Fill ticks as `jaxpar.schedule.fill_greedily` does with these limits.

    Args:
      dag: the stage graph; with backwards.
      num_microbatches: M.
      limits: at least 1 for each stage, and M if forwards come first.

    >>> run = run_quickly(StageDag.chain(4), 16, Limits((4, 3, 2, 1)))
    >>> run.time_lockstep(StageCosts.uniform(4)), run.time_freely(StageCosts.uniform(4))
    (68.0, 57.0)
    """
    filling = _Filling(dag, num_microbatches, limits)
    left = dag.num_stages * num_microbatches * (2 if limits.hold is None else 3)
    codes: list[tuple[int, ...]] = []
    while left:
        tick, cells = len(codes), [_IDLE] * dag.num_ranks
        for rank in filling.wakes.pop(tick, ()):
            cells[rank] = code = filling.take_next(rank, tick)
            left -= code != _IDLE
        codes.append(tuple(cells))
    return QuickRun(dag, tuple(codes), tuple(filling.peak), limits.exchange, limits.hold is not None)


class _Filling:
    """`ticks[code][m]`: when it was done. A value is there in tick t if it was made in tick `t - lag` or before.

    `wakes[t]` are the ranks for which something is new in tick t: their own action before it, or a value that comes.
    The others can only go on idling.
    """

    def __init__(self, dag: StageDag, count: int, limits: Limits):
        self.count, self.limits = count, limits
        self.ticks: list[list[int]] = [[] for _ in range(3 * dag.num_stages)]
        self.peak = [0] * dag.num_stages
        self.wakes = {0: set(range(dag.num_ranks))}
        lags: list[set[tuple[int, int]]] = [{(r, 1)} for r in dag.rank_of for _ in range(3)]
        inputs: list[list[tuple[list[int], int]]] = [[] for _ in range(3 * dag.num_stages)]
        for kind, edges in enumerate((dag.forward, dag.backward)):
            for src, dst in edges:
                lag = dag.lag(src, dst, limits.exchange)
                lags[3 * src + kind].add((dag.rank_of[dst], lag))
                inputs[3 * dst + kind].append((self.ticks[3 * src + kind], lag))
        self.outputs, self.inputs = [tuple(ranks) for ranks in lags], inputs
        # By rank: the codes of F, of B or I, and of W, of its stages.
        self.codes_on = [[[3 * s + k for s in dag.stages_on(r)] for k in range(3)] for r in range(dag.num_ranks)]

    def take_next(self, rank: int, tick: int) -> int:
        """The code of the rank's next action, which is noted as done; -1 if none is ready."""
        forwards, backwards, weights = self.codes_on[rank]
        if self.limits.hold is None:
            code = self._choose_whole(forwards, backwards, tick)
        else:
            code = self._choose_split(forwards, backwards, weights, self.limits.hold, tick)
        if code != _IDLE:
            self.ticks[code].append(tick)
            for other, lag in self.outputs[code]:
                self.wakes.setdefault(tick + lag, set()).add(other)
            if code % 3 == 0:
                last = code + 1 if self.limits.hold is None else code + 2
                self.peak[code // 3] = max(self.peak[code // 3], len(self.ticks[code]) - len(self.ticks[last]))
        return code

    def _choose_whole(self, forwards: list[int], backwards: list[int], tick: int) -> int:
        """A backward, then a forward; the lower micro-batch, then the lower stage."""
        chosen = _IDLE
        if not self.limits.forwards_first or all(len(self.ticks[code]) == self.count for code in forwards):
            chosen = self._first(backwards, tick)
        return chosen if chosen != _IDLE else self._first(forwards, tick)

    def _choose_split(
        self, forwards: list[int], inputs: list[int], weights: list[int], hold: tuple[int, ...], tick: int
    ) -> int:
        """A forward, a W in the way of one, an I, another W."""
        ticks = self.ticks
        full = [code for code in forwards if len(ticks[code]) - len(ticks[code + 2]) >= hold[code // 3]]
        chosen = self._first([code for code in forwards if code not in full] if full else forwards, tick)
        if chosen == _IDLE and full:
            chosen = self._first([code + 2 for code in full if self._first([code], tick) != _IDLE], tick)
        if chosen == _IDLE:
            chosen = self._first(inputs, tick)
        return chosen if chosen != _IDLE else self._first(weights, tick)

    def _first(self, codes: list[int], tick: int) -> int:
        """The ready one of the lowest micro-batch, the first of those; -1 if none is ready, holding aside."""
        chosen, lowest = _IDLE, self.count
        for code in codes:
            m, kind = len(self.ticks[code]), code % 3
            if m >= lowest:
                continue
            if kind == 0:
                ready = m - len(self.ticks[code + 1]) < self.limits.before_backward[code // 3]
            else:  # after F, or I
                ready = m < len(self.ticks[code - 1])
            if ready and self._arrived(code, m, tick):
                chosen, lowest = code, m
        return chosen

    def _arrived(self, code: int, m: int, tick: int) -> bool:
        for made, lag in self.inputs[code]:  # noqa: SIM110 - `all` takes twice as long
            if m >= len(made) or made[m] + lag > tick:
                return False
        return True
