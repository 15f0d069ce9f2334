"""Why no plan fits into memory, and what would help."""

from collections.abc import Sequence

import numpy as np

from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.coarsen import Coarsening
from jaxpar.plan.op_graph import OpGraph
from jaxpar.plan.planners.options import Replicas, list_microbatches, list_replicas
from jaxpar.text import format_bytes


def explain_misfit(
    graph: OpGraph,
    cluster: ClusterSpec,
    batch_size: int,
    num_devices: int,
    microbatches: Sequence[int] | None = None,
    replicas: Replicas = "powers_of_two",
    *,
    recompute: bool = False,
) -> str:
    """The message: what is too large, by how much, at which operator, and the ways out that would change it."""
    memory = min(device.memory_bytes for device in cluster.devices)
    sizes = list_microbatches(batch_size, microbatches)
    rows = min(size / d for size in sizes for d in list_replicas(num_devices, replicas) if size % d == 0)
    fixed = graph.state_bytes + graph.gradient_bytes
    alone = fixed + graph.residual_bytes * rows
    ways = []
    lines = [
        f"no plan of {graph.num_ops} operators fits into {num_devices} devices of {format_bytes(memory)} each with "
        f"{'micro-batches of ' + ', '.join(map(str, sizes))}:"
    ]
    worst = int(np.argmax(alone))
    if alone[worst] > memory:
        large = np.flatnonzero(alone > memory)
        lines.append(
            f"operator {graph.ops[worst].name!r} alone needs {format_bytes(alone[worst])}, "
            f"{format_bytes(alone[worst] - memory)} more than a device has: {format_bytes(fixed[worst])} of state and "
            f"gradients and {format_bytes(alone[worst] - fixed[worst])} of residuals of {rows:g} examples"
            + (f" (and {len(large) - 1} more operators are too large)" if len(large) > 1 else "")
        )
        if (fixed > memory).any():
            ways.append("finer operators, or sharding their state over a model axis")
    else:
        whole, together = float(fixed.sum()), memory * num_devices
        kept = float(graph.residual_bytes.sum()) * sizes[0]
        lines.append(
            f"state and gradients of all operators are {format_bytes(whole)} of the {format_bytes(together)} that the "
            "devices have together" + (f", {format_bytes(whole - together)} too much" if whole > together else "")
        )
        lines.append(
            f"the residuals of a micro-batch of {sizes[0]} are {format_bytes(kept)}, and a stage keeps its part of as "
            "many of them as there are stages from it to the last"
        )
        if cluster.num_devices == num_devices:
            ways.append(f"more devices (at least {int(-(-whole // memory))} for the state alone)")
        else:
            ways.append(f"more of the cluster's devices than num_devices={num_devices}")
    if not recompute:
        ways.append("recompute=True, with which a stage keeps only what it receives")
    if rows > 1 or sizes[0] > 1:
        ways.append("smaller micro-batches")
    ways.append("devices with more memory")
    return "\n  ".join([*lines, "what would help: " + "; ".join(ways)])


def explain_blocks(coarse: Coarsening) -> str:
    """That finer blocks might fit, if operators were merged into blocks; "" if not."""
    if coarse.graph.num_ops == coarse.original.num_ops:
        return ""
    return (
        f"; the operators were planned in {coarse.graph.num_ops} blocks, even in their seconds and not in their bytes: "
        "a larger max_blocks cuts them finer"
    )
