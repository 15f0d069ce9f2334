"""`parallelize`: switch pipeline parallelism on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from jaxpar.arguments import NewState, Signature
from jaxpar.errors import PlanError
from jaxpar.lower import Axes
from jaxpar.options import Options
from jaxpar.plan import ClusterSpec, PipelinePlan
from jaxpar.schedule import Timetable
from jaxpar.step import PipelinedStep


def parallelize(
    fun: Callable[..., Any] | None = None,
    *,
    mesh: Mesh,
    num_microbatches: int | None = None,
    schedule: str | Timetable | Callable[..., Timetable] | None = None,
    schedule_options: Mapping[str, Any] | None = None,
    plan: PipelinePlan | str | None = None,
    plan_options: Mapping[str, Any] | None = None,
    cluster: ClusterSpec | None = None,
    batch_argnums: int | Sequence[int] = (1,),
    state_argnums: int | Sequence[int] = (0,),
    static_argnums: int | Sequence[int] = (),
    stage_axis: str = "stage",
    data_axis: str | None = None,
    cuts: Sequence[str] | None = None,
    state_of: PipelinedStep | None = None,
    new_state: NewState = "auto",
    donate: bool = True,
    stages_per_rank: int | None = None,
    placement: str | None = None,
    replicas: Sequence[int] | None = None,
) -> Any:
    """Make a pipelined training step of one that is written for a single device.

    The result computes what `fun` computes on the whole batch, up to the order of floating-point sums: micro-batch m of
    replica d holds the batch's rows (d M + m) b ... (d M + m + 1) b - 1, for M micro-batches of b rows.

    Args:
        fun: the step, `fun(state, batch, ...) -> any pytree`. Where it returns a tree like that of a state argument,
            that is the new state, and comes back placed. Anything else comes back as it would from `fun`. Leave it
            out to use `parallelize` as a decorator with arguments.
        mesh: has an axis of stages; one of replicas, if any, splits the batch; all others are left to the compiler,
            so that the user's own shardings over them act inside a stage.
        num_microbatches: M; the batch size must be a multiple of M times the number of replicas. A plan can say it.
        schedule: a name: "gpipe", "1f1b", "eager_1f1b", "kfkb", "interleaved_1f1b", "looped_bfs", "zb_h1", "zb_h2",
            "zb_v", "v_half", "v_min", "dualpipe_v"; "auto", which searches for the fastest by the plan's costs; a
            function `(dag, num_microbatches, **options) -> Timetable`; or a `Timetable`. By default "1f1b", or what
            the plan says.
        schedule_options: for the schedule, e.g. `{"extra": 0}` for 1F1B with the textbook's memory. For "auto" those of
            `jaxpar.schedule.find_timetable`: `memory_limit` (micro-batches in flight on each rank) or `memory_bytes`
            (of residuals on each rank), `split_backward`, `seconds`, `seed`, `progress`, `cache`.
        plan: which operators form which stage, on which ranks: a `jaxpar.plan.PipelinePlan` for the step's own graph of
            operators, whose device i is position i on the axis of stages; or the name of a planner ("auto",
            "graphpipe", "pipedream", ...) that makes one at the first call. Stages may be branches side by side, and
            have different numbers of replicas. By default there is one stage a rank, cut from a sequence.
        plan_options: for the planner.
        cluster: what the devices along the axis of stages are, and their links; taken from the mesh by default.
        batch_argnums: arguments whose arrays have one row per example.
        state_argnums: arguments that are training state: each leaf is kept by the stage that uses it. Where several
            states are given or returned (`place`, `gather`, `new_state`), they are in the order of the arguments.
        static_argnums: arguments that aren't arrays; a new value means a new program.
        stage_axis: name of the mesh axis of stages.
        data_axis: name of the mesh axis of replicas; "data" if the mesh has it.
        cuts: names of the modules at which stages 1, 2, ... begin, instead of a balanced plan.
        state_of: another pipelined step, for the same state: this one reads the state where that one placed it.
        new_state: which parts of the output are the new state. "auto": subtrees like a state argument that are
            computed from its old value; a function from the output to them, e.g. `lambda out: out[0]`, where that
            guesses wrong; None: none.
        donate: give the placed state's buffers to the step that updates it.
        stages_per_rank: v; the step is cut into v stages for each rank of the stage axis. By default as many as the
            schedule is made for: two for interleaved and V-shaped ones, one for the others.
        placement: of these on the ranks: "round_robin" (stage s on rank s mod R), or "v" (down the ranks and up
            again). By default as the schedule needs it.
        replicas: how many ranks of the stage axis each stage has, such as `(2, 1, 1)` on an axis of four: they split
            the examples of every micro-batch, and stages get work in proportion. One each by default. Where a rank
            has several stages, of each rank of the timetable.

    Returns: a `PipelinedStep`.

    Raises: JaxparError where the mesh lacks an axis. Everything about `fun` itself is found out at the first call.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpar
        >>> mesh = jax.make_mesh((2,), ("stage",))
        >>> @jaxpar.parallelize(mesh=mesh, num_microbatches=4)
        ... def train_step(params, batch):
        ...     def loss_fn(params):
        ...         hidden = jnp.tanh(batch["x"] @ params["w1"])
        ...         return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 1))}
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.zeros((8, 1))}
        >>> params, loss = train_step(params, batch)
        >>> params, loss = train_step(params, batch)
        >>> trained = train_step.gather(params)
    """

    def wrap(f: Callable[..., Any]) -> PipelinedStep:
        signature = Signature(
            f, tuple(sorted(_numbers(state_argnums))), _numbers(batch_argnums), _numbers(static_argnums)
        )
        axes = _read_axes(mesh, stage_axis, data_axis)
        options = Options(
            num_microbatches,
            schedule,
            dict(schedule_options or {}),
            plan,
            dict(plan_options or {}),
            cluster,
            cuts,
            state_of,
            new_state,
            donate,
            stages_per_rank,
            placement,
            replicas,
        )
        return PipelinedStep(signature, mesh, axes, options)

    return wrap if fun is None else wrap(fun)


def _numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _read_axes(mesh: Mesh, stage_axis: str, data_axis: str | None) -> Axes:
    sizes = dict(mesh.shape)
    if stage_axis not in sizes:
        raise PlanError(
            f"the mesh has no axis {stage_axis!r}: its axes are {sizes}. Make one, e.g. "
            f"jax.make_mesh((4, 2), ('{stage_axis}', 'data')), or name the axis with stage_axis=."
        )
    if data_axis is not None and data_axis not in sizes:
        raise PlanError(f"the mesh has no axis {data_axis!r}: its axes are {sizes}.")
    data = data_axis or ("data" if "data" in sizes else None)
    if data == stage_axis:
        raise PlanError(f"stage_axis and data_axis are both {data!r}.")
    return Axes(stage_axis, sizes[stage_axis], data, sizes[data] if data else 1)
