"""The options that all planners take, checked and made definite."""

from collections.abc import Sequence
from typing import Literal, get_args

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec

Replicas = Literal["powers_of_two", "any"]


def list_microbatches(batch_size: int, microbatches: Sequence[int] | None = None) -> tuple[int, ...]:
    """The micro-batch sizes to try, the smallest first: those given, or all powers of two that divide the batch.

    Raises:
      PlanError: the batch is empty, or a size doesn't divide it.

    >>> list_microbatches(24)
    (1, 2, 4, 8)
    >>> list_microbatches(24, [12, 6])
    (6, 12)
    """
    if batch_size < 1:
        raise PlanError(f"a step needs at least one example, got batch_size={batch_size}")
    if microbatches is None:
        return tuple(1 << i for i in range(batch_size.bit_length()) if batch_size % (1 << i) == 0)
    if not microbatches:
        raise PlanError("microbatches is empty: give at least one size, or None for the powers of two")
    strange = [size for size in microbatches if size < 1 or batch_size % size]
    if strange:
        given = ", ".join(map(str, strange))
        raise PlanError(f"micro-batches of {given} examples don't divide the batch of {batch_size}")
    return tuple(sorted(set(microbatches)))


def list_replicas(num_devices: int, replicas: Replicas = "powers_of_two") -> tuple[int, ...]:
    """How many devices a stage may have, the fewest first.

    Raises:
      PlanError: no such choice.

    >>> list_replicas(6), list_replicas(3, "any")
    ((1, 2, 4), (1, 2, 3))
    """
    if replicas not in get_args(Replicas):
        raise PlanError(f"replicas={replicas!r}; known: {', '.join(map(repr, get_args(Replicas)))}")
    counts = range(1, num_devices + 1)
    return tuple(d for d in counts if replicas == "any" or d & (d - 1) == 0)


def count_devices(cluster: ClusterSpec, num_devices: int | None = None) -> int:
    """How many devices may be used.

    Raises:
      PlanError: more than there are, or none.
    """
    if num_devices is None:
        return cluster.num_devices
    if not 1 <= num_devices <= cluster.num_devices:
        raise PlanError(f"num_devices={num_devices}, but the cluster has {cluster.num_devices}")
    return num_devices
