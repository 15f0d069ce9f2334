#!/usr/bin/env python3
"""What each schedule takes: by the executor's ticks and running freely, its bubble and memory, beside a searched one.

    python -m benchmarks.schedules                 all settings, within two minutes on one core
    python -m benchmarks.schedules uniform towers  those whose names hold a word

The times are simulated (`jaxpar.schedule.simulate`), not measured, in units of a stage's forward; memory is the most
micro-batches that a rank holds, summed over its stages. Named schedules stand with exchange 1 and 2 where they leave
the choice; `auto` is the search's, and the lower bound is what no timetable can beat.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

from jaxpar.schedule import Link, StageCosts, StageDag
from jaxpar.schedule.search import find_timetable


@dataclass(frozen=True)
class Setting:
    """One table."""

    name: str
    what: str
    dag: StageDag
    num_microbatches: int
    costs: StageCosts
    split_backward: bool = True
    memory_limit: float | None = None


def make_towers(towers: int, stages: int, trunk: int) -> StageDag:
    """Towers of so many stages that meet in a trunk, one stage a rank."""
    edges = []
    for tower in range(towers):
        first = tower * stages
        edges += [(s, s + 1) for s in range(first, first + stages - 1)] + [(first + stages - 1, towers * stages)]
    edges += [(s, s + 1) for s in range(towers * stages, towers * stages + trunk - 1)]
    count = towers * stages + trunk
    return StageDag(count, tuple(edges), tuple((b, a) for a, b in edges), tuple(range(count)), count)


def list_settings() -> Iterator[Setting]:
    """The settings of issue and paper: equal stages, whole and split, tight memory, uneven ones, slow links, graphs."""
    p, m = 8, 32
    chain, unit = StageDag.chain(p), StageCosts.uniform(p)
    yield Setting("uniform", "F = I = W = 1", chain, m, unit)
    yield Setting("uniform half", f"F = I = W = 1, {p // 2 + 1} micro-batches a rank", chain, m, unit, True, p // 2 + 1)
    whole = "B = 2F, not split"
    yield Setting("whole", whole, chain, m, unit, False)
    yield Setting("whole tight", f"{whole}, {p} micro-batches a rank", chain, m, unit, False, p)
    vocabulary = StageCosts((1.0,) * (p - 1) + (2.0,), (2.0,) * (p - 1) + (4.0,))
    yield Setting("vocabulary", "the last stage takes twice as long", chain, m, vocabulary, True, p)
    yield Setting("late links", "values come half a forward later", chain, m, StageCosts.uniform(p, transfer=0.5))
    busy = StageCosts((1.0,) * p, (2.0,) * p, sent_bytes=0.5, link=Link(latency=0.1, bandwidth=1.0))
    yield Setting("busy links", "each message keeps its link for half a forward", chain, m, busy)
    rounds = StageDag.chain(2 * p, num_ranks=p, placement="round_robin")
    half = StageCosts.uniform(2 * p, forward=0.5, backward=1.0)
    yield Setting("rounds", "two stages a rank, in rounds, half as long", rounds, m, half, True, 2 * p)
    vee = StageDag.chain(2 * p, num_ranks=p, placement="v")
    yield Setting("v", "two stages a rank, in a V, half as long", vee, m, half, True, 2 * p)
    two, four = make_towers(2, 4, 4), make_towers(4, 2, 2)
    yield Setting("two towers", "two towers of 4 and a trunk of 4", two, 16, StageCosts.uniform(12), True, 8)
    yield Setting(
        "four towers", f"four towers of 2 and a trunk of 2, {whole}", four, 16, StageCosts.uniform(10), False, 4
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="settings whose names hold one of these")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each search, at most")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    for setting in list_settings():
        if arguments.words and not any(word in setting.name for word in arguments.words):
            continue
        dag = setting.dag
        print(f"\n## {setting.name}: {setting.what}; {dag.num_ranks} ranks, M = {setting.num_microbatches}\n")
        result = find_timetable(
            dag,
            setting.num_microbatches,
            setting.costs,
            memory_limit=setting.memory_limit,
            split_backward=setting.split_backward,
            seconds=arguments.seconds,
            cache=False,
        )
        print(f"{result}\nsearched for {result.seconds:.1f} s", flush=True)
    print(
        f"\n{time.perf_counter() - begin:.0f} s on one core ({platform.machine()}, Python {platform.python_version()})"
    )


if __name__ == "__main__":
    main()
