#!/usr/bin/env python3
"""Would ticks that hold a forward and a backward make lockstep faster, or need less memory?

    python -m benchmarks.composites                 4 ranks x 16 and 8 ranks x 32 micro-batches, in a quarter of an hour
    python -m benchmarks.composites --ranks 4 --microbatches 16 --seconds 5

For chains of equal stages with B = 2F and whole backwards, and for each memory limit min(M, S - s + e) of stage s: the
best timetable of one action a tick, as `find_timetable` and annealing find it, beside the best whose ticks may hold F
and B of one rank, found by annealing from the pairs that greedy makes and from the best of one action a tick. The
numbers are makespans by the executor's ticks over the free-running 3 (M + S - 1). Where nothing is said of it, a value
may have a tick to travel (exchange 1 or 2, whichever is better), as on GPUs and TPUs; "blocking" is where a rank waits
for its neighbours' last tick whatever it needs (exchange 1), as XLA:CPU does.

That pairs never win where values may travel for a tick needs no search. Put F of pair tick t into tick 2t and B into
2t + 1, with exchange 2 in place of 1 (`part_pairs`): what a pair could use it can still use, in the same order, and

    pairs     start[r, t]      waits for  end[q, t - 1]
    parted    start[r, 2t]     waits for  end[q, 2t - 2], the F of that pair
              start[r, 2t + 1] waits for  end[q, 2t - 1], its B

so no action starts later than in its pair. Splitting the backward into I and W, which makes all actions alike, does
better still with the least memory; `zb_h1` is printed below.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.schedule import Action, MemoryLimit, StageCosts, StageDag, Timetable, find_timetable, simulate, zb_h1
from jaxpar.text import format_table

SECONDS = {"F": 1.0, "B": 2.0}
Orders = list[list[str]]  # for each rank its cells: kinds done in one tick; micro-batches come in order


@dataclass(frozen=True)
class Case:
    """A chain of equal stages, one a rank."""

    ranks: int
    microbatches: int
    exchange: int
    limits: tuple[int, ...]
    transfer: float = 0.0

    @property
    def free(self) -> float:
        """The makespan of 1F1B that runs freely."""
        return 3.0 * (self.microbatches + self.ranks - 1)

    def makespan(self, orders: Sequence[Sequence[str]]) -> float:
        """By the executor's ticks, each cell in the first tick that it can have; infinite if it deadlocks.

        t(cell) = max(t(cell before it) + 1, t(F or B of the neighbour) + exchange)
        start[r, t] = max(end[r, t-1], max_q end[q, t-exchange] + transfer)
        """
        p, ticks = self.ranks, self.place(orders)
        if ticks is None:
            return math.inf
        length = 1 + max(mine[-1] for mine in ticks)
        work = [[0.0] * length for _ in range(p)]
        for rank, (order, mine) in enumerate(zip(orders, ticks, strict=True)):
            for cell, tick in zip(order, mine, strict=True):
                work[rank][tick] = sum(SECONDS[kind] for kind in cell)
        waves = [[0.0] * p for _ in range(self.exchange + 1)]  # waves[-d]: the ends of tick t - d
        for tick in range(length):
            last, far = waves[-1], waves[-self.exchange]
            ends = [
                max(last[r], *(far[q] + self.transfer * (tick >= self.exchange) for q in (r - 1, r + 1) if 0 <= q < p))
                + work[r][tick]
                for r in range(p)
            ]
            waves = [*waves[1:], ends]
        return max(waves[-1])

    def place(self, orders: Sequence[Sequence[str]]) -> list[list[int]] | None:
        """The tick of each cell; None if they deadlock."""
        p = self.ranks
        done: dict[str, list[list[int]]] = {kind: [[] for _ in range(p)] for kind in "FB"}
        placed: list[list[int]] = [[] for _ in range(p)]
        moved = True
        while moved:
            moved = False
            for r in range(p):
                while len(placed[r]) < len(orders[r]):
                    tick = self._first_tick(r, orders[r][len(placed[r])], done, placed[r])
                    if tick is None:
                        break
                    placed[r].append(tick)
                    moved = True
        return placed if all(map(len, placed)) and list(map(len, placed)) == list(map(len, orders)) else None

    def _first_tick(self, r: int, cell: str, done: dict[str, list[list[int]]], mine: list[int]) -> int | None:
        """Notes the cell as done, too, unless it waits for something that isn't."""
        tick = mine[-1] + 1 if mine else 0
        count = {kind: len(done[kind][r]) for kind in "FB"}
        for kind in cell:
            source = r - 1 if kind == "F" else r + 1
            if 0 <= source < self.ranks:
                if count[kind] >= len(done[kind][source]):
                    return None
                tick = max(tick, done[kind][source][count[kind]] + self.exchange)
            if kind == "B" and count["B"] >= count["F"]:
                return None
            count[kind] += 1
        for kind in cell:
            done[kind][r].append(tick)
        return tick

    def fits(self, rank: int, order: Sequence[str]) -> bool:
        """Whether a rank's order keeps its limit, and does no backward before its forward."""
        held = 0
        for kind in "".join(order):
            held += 1 if kind == "F" else -1
            if not 0 <= held <= self.limits[rank]:
                return False
        return True


def pair_greedily(case: Case, *, pairs: bool = True) -> Orders:
    """In each tick, F and B if both are ready and there is room (F alone, or B alone, if not)."""
    p, m = case.ranks, case.microbatches
    done: dict[str, list[list[int]]] = {kind: [[] for _ in range(p)] for kind in "FB"}
    orders: Orders = [[] for _ in range(p)]
    tick = 0
    while any(len(back) < m for back in done["B"]):
        for r in range(p):
            f, b = len(done["F"][r]), len(done["B"][r])
            arrived = lambda kind, source, k: (
                source not in range(p)
                or (
                    len(done[kind][source]) > k and done[kind][source][k] + case.exchange <= tick  # noqa: B023
                )
            )
            forward = f < m and f - b < case.limits[r] and arrived("F", r - 1, f)
            backward = b < f + (forward and pairs) and arrived("B", r + 1, b)
            cell = "F" * forward + "B" * backward if pairs else "B" * backward or "F" * forward
            for kind in cell:
                done[kind][r].append(tick)
            orders[r] += [cell] * bool(cell)
        tick += 1
    return orders


def improve(case: Case, starts: Sequence[Orders], seconds: float, *, pairs: bool = True) -> float:
    """Simulated annealing: swap two cells, and with `pairs` join two, or part one. The least makespan that was seen."""
    rng = random.Random(0)
    starts = [orders for orders in starts if case.makespan(orders) < math.inf]
    best = min(map(case.makespan, starts))
    deadline = time.perf_counter() + seconds
    for run in range(10**6):
        orders = [list(order) for order in starts[run % len(starts)]]
        now, heat = case.makespan(orders), 1.0
        for _ in range(1500):
            if best <= case.free * (1 + 1e-9) or time.perf_counter() > deadline:
                return best
            rank = rng.randrange(case.ranks)
            order = _change(orders[rank], rng, pairs)
            if order is None or not case.fits(rank, order):
                continue
            kept, orders[rank] = orders[rank], order
            after = case.makespan(orders)
            if after <= now or rng.random() < math.exp((now - after) / heat):
                now, best = after, min(best, after)
            else:
                orders[rank] = kept
            heat = max(0.1, heat * 0.998)
    return best


def _change(order: Sequence[str], rng: random.Random, pairs: bool) -> list[str] | None:
    """One random change of a rank's cells; None if it is none."""
    i, changed = rng.randrange(len(order) - 1), list(order)
    a, b = changed[i], changed[i + 1]
    if len(a) == 2 and rng.random() < 0.4:
        changed[i : i + 1] = list(a)
    elif pairs and len(a) == len(b) == 1 and a != b and rng.random() < 0.5:
        changed[i : i + 2] = [a + b]
    elif a != b:
        changed[i], changed[i + 1] = b, a
    else:
        return None
    return changed


def part_pairs(case: Case, orders: Orders) -> Timetable:
    """The same work in the same order, one action a tick: F of tick t in tick 2t, B in 2t + 1, exchange 2 for 1."""
    ticks = case.place(orders)
    assert case.exchange == 1
    assert ticks is not None
    grid: list[list[Action | None]] = [[None] * case.ranks for _ in range(2 + 2 * max(mine[-1] for mine in ticks))]
    for rank, (order, mine) in enumerate(zip(orders, ticks, strict=True)):
        count = dict.fromkeys("FB", 0)
        for cell, tick in zip(order, mine, strict=True):
            assert cell != "BF"
            for kind in cell:
                grid[2 * tick + (kind == "B")][rank] = Action(kind, rank, count[kind])  # type: ignore[arg-type]
                count[kind] += 1
    return Timetable("parted", StageDag.chain(case.ranks), case.microbatches, tuple(map(tuple, grid)), exchange=2)


def strip(timetable: Timetable) -> Orders:
    """The kinds of a timetable's actions, one a cell."""
    return [[action.kind for action in timetable.order(rank)] for rank in range(timetable.dag.num_ranks)]


def make_rows(p: int, m: int, transfer: float, seconds: float) -> list[tuple[str, ...]]:
    """One row for each memory."""
    dag, costs, free = StageDag.chain(p), StageCosts.uniform(p, transfer=transfer), 3.0 * (m + p - 1)
    rows: list[tuple[str, ...]] = [("e", "in flight", "one a tick", "pairs", "one a tick, blocking", "pairs, blocking")]
    single: list[Orders] = []  # the best with less memory, which fits with more
    best = dict.fromkeys(("one", "pairs", "one, blocking", "pairs, blocking"), math.inf)
    for e in range(p):
        limits = tuple(min(m, p - s + e) for s in range(p))
        memory = MemoryLimit.in_microbatches(dag, limits)
        found = find_timetable(dag, m, costs, memory_limit=memory, split_backward=False, seconds=seconds, cache=False)
        single.append(strip(found.timetable))
        now = {"one": found.makespan}
        for exchange in (2, 1):
            case = Case(p, m, exchange, limits, transfer)
            starts = [*single, pair_greedily(case, pairs=False)]
            now["one, blocking"] = improve(case, starts, seconds, pairs=False)
            now["one"] = min(now["one"], now["one, blocking"])
            now["pairs, blocking"] = improve(case, [pair_greedily(case), *starts], seconds)
            now["pairs"] = min(now.get("pairs", math.inf), now["one"], now["pairs, blocking"])
        best = {name: min(seen, now[name]) for name, seen in best.items()}
        rows.append((str(e), str(sum(limits)), *(f"{x / free:.3f}" for x in best.values())))
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--transfer", type=float, nargs="+", default=[0.0, 0.5], help="in forwards")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each search")
    args = parser.parse_args()
    for p, m in zip(args.ranks, args.microbatches, strict=True):
        for transfer in args.transfer:
            print(f"\n{p} ranks, M = {m}, a transfer takes {transfer:g} F\n")
            print(format_table(make_rows(p, m, transfer, args.seconds)), flush=True)
            costs = StageCosts.uniform(p, transfer=transfer)
            split = [
                simulate(zb_h1(StageDag.chain(p), m, exchange=k), costs).makespan / (3 * (m + p - 1)) for k in (1, 2)
            ]
            print(f"\nzb_h1, I and W apart, e = 0: {min(split):.3f}; blocking: {split[0]:.3f}", flush=True)
    print(f"\none core ({platform.machine()}, Python {platform.python_version()})")


if __name__ == "__main__":
    main()
