"""The times of 1F1B and GPipe without their timetables: what a search asks for tens of times.

The same list scheduling as `jaxpar.schedule.greedy` and the same recurrences as `jaxpar.schedule.simulate`, on integers
and arrays instead of `Action`s; the tests hold them to the originals. The order of a rank's actions depends on the
stage graph and on how many may be in flight, but on no time: it is kept for plans that differ only in their costs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from jaxpar.schedule.costs import StageCosts
from jaxpar.schedule.dag import StageDag

_IDLE = -1


@dataclass(frozen=True)
class QuickRun:
    """The actions of a schedule with whole backwards, by tick.

    Args:
      dag: the stage graph.
      codes: `codes[t][r]` is 2 s for the forward of stage s, 2 s + 1 for its backward, -1 where rank r is idle.
      peak_in_flight: for each stage, the most micro-batches from F to B at once.
      exchange: ticks that a value takes to another rank.
    """

    dag: StageDag
    codes: tuple[tuple[int, ...], ...]
    peak_in_flight: tuple[int, ...]
    exchange: int

    def time_lockstep(self, costs: StageCosts) -> float:
        """The makespan by the executor's ticks: `simulate(..., mode="executor")`."""
        durations, active = _durations(costs)[self._code_array], self._code_array != _IDLE
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
        durations = _durations(costs).tolist()
        outputs, inputs = _list_mail(self.dag, costs)
        link_free_at: dict[tuple[int, int], float] = dict.fromkeys(
            ((out[0], out[1]) for each in outputs for out in each), 0.0
        )
        rank_free_at = [0.0] * self.dag.num_ranks
        done = [0] * (2 * self.dag.num_stages)
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

    @cached_property
    def _code_array(self) -> NDArray[np.intp]:
        return np.array(self.codes, dtype=np.intp)


def _durations(costs: StageCosts) -> NDArray[np.float64]:
    """Seconds by code; an idle cell, code -1, is the last entry and takes none."""
    backward = costs.backward or (0.0,) * len(costs.forward)
    return np.array([x for pair in zip(costs.forward, backward, strict=True) for x in pair] + [0.0])


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
    outputs: list[list[_Output]] = [[] for _ in range(2 * dag.num_stages)]
    inputs: list[list[list[float]]] = [[] for _ in range(2 * dag.num_stages)]
    for kind, edges in enumerate((dag.forward, dag.backward)):
        for src, dst in edges:
            here, there = dag.rank_of[src], dag.rank_of[dst]
            if here != there:
                arrivals: list[float] = []
                outputs[2 * src + kind].append((here, there, *costs.message(dag, src, dst), arrivals))
                inputs[2 * dst + kind].append(arrivals)
    return outputs, inputs


@lru_cache(maxsize=64)
def run_quickly(
    dag: StageDag, num_microbatches: int, limit: tuple[int, ...], exchange: int = 2, forwards_first: bool = False
) -> QuickRun:
    """Fill ticks as `jaxpar.schedule.fill_greedily` does with these limits, whole backwards and no groups.

    Args:
      dag: the stage graph.
      num_microbatches: M.
      limit: for each stage, the most micro-batches in flight, at least 1.
      exchange: ticks that a value takes to another rank, 1 or 2.
      forwards_first: a rank starts its backwards when all its forwards are done; needs limits of M.

    >>> run = run_quickly(StageDag.chain(4), 16, (4, 3, 2, 1))
    >>> run.time_lockstep(StageCosts.uniform(4)), run.time_freely(StageCosts.uniform(4))
    (68.0, 57.0)
    """
    filling = _Filling(dag, num_microbatches, limit, exchange, forwards_first)
    left = dag.num_stages * num_microbatches * (1 + dag.has_backward)
    codes: list[tuple[int, ...]] = []
    while left:
        tick, cells = len(codes), [_IDLE] * dag.num_ranks
        for rank in filling.wakes.pop(tick, ()):
            cells[rank] = code = filling.take_next(rank, tick)
            left -= code != _IDLE
        codes.append(tuple(cells))
    return QuickRun(dag, tuple(codes), tuple(filling.peak), exchange)


class _Filling:
    """`ticks[code][m]`: when it was done. A value is there in tick t if it was made in tick `t - lag` or before.

    `wakes[t]` are the ranks for which something is new in tick t: their own action before it, or a value that comes.
    The others can only go on idling.
    """

    def __init__(self, dag: StageDag, count: int, limit: tuple[int, ...], exchange: int, forwards_first: bool):
        self.dag, self.count, self.limit, self.forwards_first = dag, count, limit, forwards_first
        self.ticks: list[list[int]] = [[] for _ in range(2 * dag.num_stages)]
        self.peak = [0] * dag.num_stages
        self.wakes = {0: set(range(dag.num_ranks))}
        lags: list[set[tuple[int, int]]] = [{(r, 1)} for r in dag.rank_of for _ in range(2)]
        for kind, edges in enumerate((dag.forward, dag.backward)):
            for src, dst in edges:
                lags[2 * src + kind].add((dag.rank_of[dst], dag.lag(src, dst, exchange)))
        self.outputs = [tuple(ranks) for ranks in lags]
        self.stages_on = [dag.stages_on(rank) for rank in range(dag.num_ranks)]
        self.inputs = [
            tuple((self.ticks[2 * p + kind], dag.lag(p, s, exchange)) for p in sources[s])
            for s in range(dag.num_stages)
            for kind, sources in enumerate((dag.forward_sources, dag.backward_sources))
        ]

    def take_next(self, rank: int, tick: int) -> int:
        """The ready action that goes first: a backward, then the lower micro-batch, then the lower stage."""
        ticks, chosen, first = self.ticks, _IDLE, self.count
        stages = self.stages_on[rank]
        if self.dag.has_backward and not (self.forwards_first and self._lacks_forwards(stages)):
            for s in stages:
                m = len(ticks[2 * s + 1])
                if m < first and m < len(ticks[2 * s]) and self._arrived(2 * s + 1, m, tick):
                    chosen, first = 2 * s + 1, m
        if chosen == _IDLE:
            for s in stages:
                m = len(ticks[2 * s])
                has_room = m - len(ticks[2 * s + 1]) < self.limit[s] or not self.dag.has_backward
                if m < first and has_room and self._arrived(2 * s, m, tick):
                    chosen, first = 2 * s, m
        if chosen != _IDLE:
            ticks[chosen].append(tick)
            for other, lag in self.outputs[chosen]:
                self.wakes.setdefault(tick + lag, set()).add(other)
            s = chosen // 2
            held = len(ticks[2 * s]) - len(ticks[2 * s + 1]) if self.dag.has_backward else 1
            self.peak[s] = max(self.peak[s], held)
        return chosen

    def _lacks_forwards(self, stages: tuple[int, ...]) -> bool:
        return any(len(self.ticks[2 * s]) < self.count for s in stages)

    def _arrived(self, code: int, m: int, tick: int) -> bool:
        for made, lag in self.inputs[code]:  # noqa: SIM110 - `all` takes twice as long
            if m >= len(made) or made[m] + lag > tick:
                return False
        return True
