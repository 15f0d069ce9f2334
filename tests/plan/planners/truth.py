"""What small cases the planners are held to `exact` on, and how near they come."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, OpGraph, PipelinePlan
from tests.plan.random_graphs import random_cluster, random_dag, random_series_parallel

FORMS: dict[str, Callable[[int, int], OpGraph]] = {"series-parallel": random_series_parallel, "any": random_dag}


@dataclass(frozen=True)
class Case:
    """A small graph and cluster, with memory that binds in most of them; and the options to plan with."""

    name: str
    graph: OpGraph
    cluster: ClusterSpec
    batch_size: int
    options: dict[str, Any]


def draw_cases(form: str, seeds: range, most_ops: int, batches: tuple[int, ...]) -> Iterator[Case]:
    """The same for the same seeds."""
    for seed in seeds:
        rng = random.Random(f"truth {form} {seed}")
        num_ops, num_devices = rng.randrange(3, most_ops + 1), rng.randrange(2, 7)
        graph = FORMS[form](seed, num_ops)
        limited = graph if rng.random() < 0.7 else None
        cluster = random_cluster(seed, num_devices, limited, tightness=rng.choice([0.3, 0.5, 0.8, 0.9]))
        batch = rng.choice(batches)
        sizes = [size for size in range(1, batch + 1) if batch % size == 0]
        powers = [size for size in sizes if size & (size - 1) == 0]
        replicas = rng.choice(["powers_of_two", "any"])
        options = {"replicas": replicas, "microbatches": sizes if replicas == "any" else powers}
        yield Case(f"{form} {seed}", graph, cluster, batch, options)


def try_plan(planner: Callable[..., PipelinePlan], case: Case, **options: Any) -> PipelinePlan | None:
    """The plan, checked; None if none fits into memory."""
    try:
        plan = planner(case.graph, case.cluster, case.batch_size, **case.options, **options)
    except PlanError as error:
        if "fits into" not in str(error):
            raise
        return None
    plan.check()
    return plan


def print_ratios(what: str, ratios: list[float]) -> None:
    """How many are how near."""
    values = np.array(ratios)
    marks = [f"p{q}: {np.percentile(values, q):.4f}" for q in (0, 10, 50, 90, 99, 100)]
    more = ", ".join(f">{t - 1:.2%}: {(values > t).sum()}" for t in (1.0001, 1.001, 1.01))
    print(f"\n{what}: {len(values)} cases; ratio to exact {'  '.join(marks)}; {more}")
