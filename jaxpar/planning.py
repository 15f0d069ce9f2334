"""From a step and the shapes of its arguments to what planners work on, with no mesh and no device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxpar.arguments import NewState, Signature, read_arguments
from jaxpar.errors import PlanError
from jaxpar.plan import ClusterSpec, PipelinePlan
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.plan.block_program import CostModel
from jaxpar.plan.cluster import DeviceSpec
from jaxpar.plan.devices import find_preset
from jaxpar.plan.planners import plan as plan_graph
from jaxpar.plan.program_graph import ProgramGraph, build_program_graph
from jaxpar.tracing import TracedStep, collector_paused, trace_step


def graph_step(
    fun: Callable[..., Any],
    *args: Any,
    costs: CostModel | DeviceSpec | str = "h100",
    sizes: Sequence[int] | None = None,
    max_blocks: int = 256,
    state_argnums: Sequence[int] = (0,),
    batch_argnums: Sequence[int] = (1,),
    static_argnums: Sequence[int] = (),
    new_state: NewState = "auto",
) -> ProgramGraph:
    """The operators of a training step, with costs: what `jaxpar.plan.planners.plan` takes, as `.graph`.

    Args:
        fun: the step, undecorated or made by `jaxpar.parallelize`, whose other arguments then count.
        args: its arguments: arrays or `jax.ShapeDtypeStruct`s, the batch with all of its examples.
        costs: a cost model; or a `DeviceSpec`, or the name of one (see `jaxpar.plan.DEVICES`), for analytic costs.
        sizes: numbers of examples that times are asked for; powers of two up to the batch size by default.
        max_blocks: how many operators there may be.
        state_argnums, batch_argnums, static_argnums, new_state: as for `jaxpar.parallelize`.

    Raises: TraceError where the step can't be pipelined; PlanError where no device is called `costs`.

    >>> import jax, jax.numpy as jnp
    >>> def step(params, x):
    ...     loss_fn = lambda p: jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"])
    ...     loss, grads = jax.value_and_grad(loss_fn)(params)
    ...     return jax.tree.map(lambda p, g: p - g, params, grads), loss
    >>> shapes = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in "ab"}
    >>> graph_step(step, shapes, jax.ShapeDtypeStruct((32, 8), jnp.float32), costs="v100").graph.num_ops
    2
    """
    signature = read_signature(fun, state_argnums, batch_argnums, static_argnums)
    traced = trace_step(read_arguments(signature, args), new_state)
    if isinstance(costs, str):
        costs = find_preset(costs).device
    model = AnalyticCosts(costs) if isinstance(costs, DeviceSpec) else costs
    return build_graph(traced, model, sizes, max_blocks)


def plan_step(
    fun: Callable[..., Any],
    *args: Any,
    cluster: ClusterSpec | str,
    num_devices: int | None = None,
    planner: str = "auto",
    costs: CostModel | None = None,
    **options: Any,
) -> PipelinePlan:
    """Plan a training step for a cluster, which needn't be there.

    Args:
        fun: the step, undecorated or made by `jaxpar.parallelize`; its state is argument 0, its batch argument 1, or
            what the decorator was told.
        args: its arguments: arrays or `jax.ShapeDtypeStruct`s, the batch with all of its examples.
        cluster: a `ClusterSpec`, or the name of one of `jaxpar.plan.PRESETS`, of `num_devices` devices.
        num_devices: how many devices may be used; all of the cluster by default.
        planner: one of `jaxpar.plan.planners.PLANNERS`.
        costs: a cost model, such as `jaxpar.measure.MeasuredCosts()`; analytic costs of the cluster's first device by
            default.
        options: of the planner, such as `microbatches=(8, 16)`; see `jaxpar.plan.planners.plan`.

    Returns: the plan, for `jaxpar.parallelize(plan=...)` on a mesh whose axis of stages has the cluster's devices.

    Raises: TraceError where the step can't be pipelined; PlanError where no plan fits into memory.

    >>> import jax, jax.numpy as jnp
    >>> def step(params, x):
    ...     loss_fn = lambda p: jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"])
    ...     loss, grads = jax.value_and_grad(loss_fn)(params)
    ...     return jax.tree.map(lambda p, g: p - g, params, grads), loss
    >>> shapes = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in "ab"}
    >>> plan = plan_step(step, shapes, jax.ShapeDtypeStruct((32, 8), jnp.float32), cluster="v100", num_devices=2)
    >>> plan.batch_size
    32
    """
    if isinstance(cluster, str):
        if num_devices is None:
            raise PlanError(f"num_devices is missing: how many devices does the {cluster!r} cluster have?")
        cluster = ClusterSpec.preset(cluster, num_devices)
    model = costs or AnalyticCosts(cluster.devices[0])
    graph = graph_step(fun, *args, costs=model).graph
    signature = read_signature(fun)
    batch_size = read_arguments(signature, args).num_examples
    return plan_graph(graph, cluster, batch_size, planner, num_devices=num_devices, **options)


def read_signature(
    fun: Callable[..., Any],
    state_argnums: Sequence[int] = (0,),
    batch_argnums: Sequence[int] = (1,),
    static_argnums: Sequence[int] = (),
) -> Signature:
    """What is known of a step's arguments: for one that is decorated, what its decorator was told."""
    known = getattr(fun, "_signature", None)
    return known or Signature(fun, tuple(sorted(state_argnums)), tuple(batch_argnums), tuple(static_argnums))


def build_graph(
    traced: TracedStep, costs: CostModel, sizes: Sequence[int] | None = None, max_blocks: int = 256
) -> ProgramGraph:
    """`build_program_graph` of a traced step."""
    with collector_paused():
        return build_program_graph(traced.program, traced.updated, costs, sizes, max_blocks)
