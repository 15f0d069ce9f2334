"""`parallelize`: switch pipeline parallelism on.

`PipelinedStep._build` is the whole pass, top to bottom: trace, plan, schedule, lower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar import _jax
from jaxpar.arguments import Arguments, NewState, OutputTree, Signature, match_state_outputs, read_arguments
from jaxpar.errors import JaxparError, LowerError, PlanError, TraceError
from jaxpar.lower import (
    Axes,
    Machine,
    MemoryEstimate,
    PlacedState,
    StateLayout,
    build_machine,
    build_step,
    estimate_memory,
    gather_leaves,
    init_leaves,
    make_layout,
    place_leaves,
)
from jaxpar.plan import Plan, Roofline, plan_stages
from jaxpar.schedule import StageCosts, StageDag, Timetable, make_timetable, simulate
from jaxpar.show import explain_step
from jaxpar.trace import Program, abstract_args, make_program, trace_size

P = PartitionSpec


def parallelize(
    fun: Callable[..., Any] | None = None,
    *,
    mesh: Mesh,
    num_microbatches: int,
    schedule: str | Timetable | Callable[..., Timetable] = "1f1b",
    schedule_options: Mapping[str, Any] | None = None,
    batch_argnums: int | Sequence[int] = (1,),
    state_argnums: int | Sequence[int] = (0,),
    static_argnums: int | Sequence[int] = (),
    stage_axis: str = "stage",
    data_axis: str | None = None,
    cuts: Sequence[str] | None = None,
    state_of: PipelinedStep | None = None,
    new_state: NewState = "auto",
    donate: bool = True,
) -> Any:
    """Make a pipelined training step of one that is written for a single device.

    The result computes what `fun` computes on the whole batch, up to the order of floating-point sums: micro-batch m of
    replica d holds the batch's rows (d M + m) b ... (d M + m + 1) b - 1, for M micro-batches of b rows.

    Args:
        fun: the step, `fun(state, batch, ...) -> any pytree`. Where it returns a tree like that of a state argument, that is
            the new state, and comes back placed. Anything else comes back as it would from `fun`. Leave it out to use
            `parallelize` as a decorator with arguments.
        mesh: has an axis of stages; one of replicas, if any, splits the batch; all others are left to the compiler, so that the
            user's own shardings over them act inside a stage.
        num_microbatches: M; the batch size must be a multiple of M times the number of replicas.
        schedule: "gpipe", "1f1b", a function `(dag, num_microbatches, **options) -> Timetable`, or a `Timetable`.
        schedule_options: for the schedule, e.g. `{"extra": 0}` for 1F1B with the textbook's memory.
        batch_argnums: arguments whose arrays have one row per example.
        state_argnums: arguments that are training state: each leaf is kept by the stage that uses it.
        static_argnums: arguments that aren't arrays; a new value means a new program.
        stage_axis: name of the mesh axis of stages.
        data_axis: name of the mesh axis of replicas; "data" if the mesh has it.
        cuts: names of the modules at which stages 1, 2, ... begin, instead of a balanced plan.
        state_of: another pipelined step, for the same state: this one reads the state where that one placed it.
        new_state: which parts of the output are the new state. "auto": subtrees like a state argument that are computed from its
            old value; a function from the output to them, e.g. `lambda out: out[0]`, where that guesses wrong; None: none.
        donate: give the placed state's buffers to the step that updates it.

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
        signature = Signature(f, _numbers(state_argnums), _numbers(batch_argnums), _numbers(static_argnums))
        axes = _read_axes(mesh, stage_axis, data_axis)
        options = Options(num_microbatches, schedule, dict(schedule_options or {}), cuts, state_of, new_state, donate)
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


@dataclass(frozen=True)
class Options:
    num_microbatches: int
    schedule: str | Timetable | Callable[..., Timetable]
    schedule_options: Mapping[str, Any]
    cuts: Sequence[str] | None
    state_of: PipelinedStep | None
    new_state: NewState
    donate: bool

    def __post_init__(self) -> None:
        if self.num_microbatches < 1:
            raise PlanError(f"num_microbatches is {self.num_microbatches}; it must be at least 1.")


@dataclass(frozen=True, eq=False)
class Built:
    """Everything about the step for arguments of one shape."""

    arguments: Arguments
    program: Program
    plan: Plan
    timetable: Timetable
    machine: Machine
    layouts: tuple[StateLayout, ...]
    output_tree: OutputTree
    jitted: Any

    @property
    def updated(self) -> tuple[int, ...]:
        """Positions of the state arguments that have a new value."""
        return self.output_tree.updated


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class PendingState:
    """State that will be placed at the step's first call, when the batch's shape is known."""

    tree: Any
    make: Callable[[], Any] | None = None  # for `init`: what creates it

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.tree,), self.make

    @classmethod
    def tree_unflatten(cls, make: Any, children: tuple[Any]) -> PendingState:
        return cls(children[0], make)

    def __repr__(self) -> str:
        return f"PendingState({len(jax.tree.leaves(self.tree))} leaves, placed at the first step)"


class PipelinedStep:
    """A pipelined step: call it like the function that it was made from. See `parallelize`."""

    def __init__(self, signature: Signature, mesh: Mesh, axes: Axes, options: Options):
        self._signature, self._axes, self._options = signature, axes, options
        self._mesh = Mesh(mesh.devices, mesh.axis_names)  # with axes that are left to the compiler
        self._built: dict[Any, Built] = {}
        self._layouts: tuple[StateLayout, ...] | None = None
        self._last: Built | None = None
        self.__name__ = signature.name
        self.__doc__ = signature.fun.__doc__
        self.__wrapped__ = signature.fun

    def __repr__(self) -> str:
        mesh = " x ".join(f"{n} {a}" for a, n in self._mesh.shape.items())
        return f"PipelinedStep({self._signature.name}, {mesh}, {self._options.num_microbatches} micro-batches)"

    # -- running ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self._signature.normalise(args, kwargs)
        built = self._prepare(args)
        placed = self._placed_arguments(built, args)
        return self._finish(built, *built.jitted(*placed))

    def _finish(self, built: Built, states: Sequence[PlacedState], outputs: Sequence[Any]) -> Any:
        rest = iter([x for i, x in enumerate(outputs) if i not in built.machine.outputs.state])
        by_argument = dict(zip(built.updated, states, strict=True))
        leaves = [by_argument[mark] if mark >= 0 else next(rest) for mark in built.output_tree.marks]
        return jax.tree.unflatten(built.output_tree.tree, leaves)

    def _placed_arguments(self, built: Built, args: Sequence[Any]) -> tuple[list, list, list, list]:
        """(states to be donated, other states, shared leaves, batch leaves), on the mesh."""
        nums = self._signature.state_argnums
        states = [self._placed(built.layouts[k], args[i], self._signature.argument_name(i)) for k, i in enumerate(nums)]
        everywhere = NamedSharding(self._mesh, P())
        rows = NamedSharding(self._mesh, P(self._axes.data))
        shared, batch = [], []
        for i, arg in enumerate(args):
            if i in nums or i in self._signature.static_argnums:
                continue
            for leaf in jax.tree.leaves(arg):
                is_rows = i in self._signature.batch_argnums and np.ndim(leaf) > 0
                (batch if is_rows else shared).append(jax.device_put(leaf, rows if is_rows else everywhere))
        donated = [states[k] for k in built.updated] if self._options.donate else []
        kept = [s for k, s in enumerate(states) if not self._options.donate or k not in built.updated]
        return donated, kept, shared, batch

    def _placed(self, layout: StateLayout, state: Any, name: str) -> PlacedState:
        if isinstance(state, PendingState):
            return state.make() if state.make is not None else place_leaves(layout, jax.tree.leaves(state.tree))
        if not isinstance(state, PlacedState):
            return place_leaves(layout, jax.tree.leaves(state))
        self._check_placed(layout, state, name)
        return state

    def _check_placed(self, layout: StateLayout, state: PlacedState, name: str) -> None:
        if state.layout != layout:
            theirs, ours = dict(state.layout.mesh.shape), dict(layout.mesh.shape)
            why = f"on another mesh ({theirs}, this step's is {ours})" if theirs != ours else "by another step or plan"
            raise LowerError(
                f"{name} was placed {why}, so its leaves aren't where {self.__name__} looks for them. Gather it with the step "
                "that placed it (`old_step.gather(state)`) and place it anew, or make this step with state_of=old_step."
            )
        if state.is_deleted:
            raise LowerError(
                f"{name} was donated to a step that has run since: its buffers are gone. Use the state that the step returned, "
                "or make the step with donate=False."
            )

    # -- state -----------------------------------------------------------------------------------------------------

    def place(self, *states: Any) -> Any:
        """Put each state argument's leaves on the ranks that own them.

        Before the step has seen a batch it can't know where they belong: then the state is marked, and placed at the first call.

        Args:
            states: one for each of `state_argnums`.

        Returns: a `PlacedState` (or `PendingState`) for each; not a tuple if there is one.
        """
        self._check_states(states)
        layouts = self._known_layouts()
        if layouts is None:
            return _single([PendingState(s) for s in states])
        for layout, state, i in zip(layouts, states, self._signature.state_argnums, strict=True):
            self._check_tree(layout, state, self._signature.argument_name(i))
        return _single([place_leaves(layout, jax.tree.leaves(s)) for layout, s in zip(layouts, states, strict=True)])

    def gather(self, *states: Any) -> Any:
        """The user's own pytrees back, as NumPy arrays on the host (PRNG keys as key arrays)."""
        self._check_states(states)
        return _single([_gather(s) for s in states])

    def init(self, init_fn: Callable[..., Any], *args: Any) -> Any:
        """Create the state on its ranks: each rank runs the part of `init_fn(*args)` that makes its own leaves.

        Args:
            init_fn: returns the state; a tuple of them if the step has several state arguments.
            args: arrays; every rank gets them.

        Returns: as `place`.
        """
        shapes = jax.eval_shape(init_fn, *args)
        states = shapes if len(self._signature.state_argnums) > 1 else (shapes,)
        self._check_states(states)
        if (layouts := self._known_layouts()) is not None:
            for layout, state, i in zip(layouts, states, self._signature.state_argnums, strict=True):
                self._check_tree(layout, state, self._signature.argument_name(i))
            return _single(init_leaves(layouts, self._axes, init_fn, args))

        def make(k: int) -> PlacedState:
            found = self._known_layouts()
            assert found is not None
            return init_leaves(found, self._axes, init_fn, args)[k]

        return _single([PendingState(s, lambda k=k: make(k)) for k, s in enumerate(states)])

    def _known_layouts(self) -> tuple[StateLayout, ...] | None:
        if self._layouts is None and self._options.state_of is not None:
            return self._options.state_of._known_layouts()
        return self._layouts

    def _check_states(self, states: Sequence[Any]) -> None:
        if len(states) != len(self._signature.state_argnums):
            raise LowerError(
                f"{self.__name__} has {len(self._signature.state_argnums)} state arguments (state_argnums="
                f"{self._signature.state_argnums}), but {len(states)} states were given."
            )

    def _check_tree(self, layout: StateLayout, state: Any, name: str) -> None:
        leaves, tree = jax.tree.flatten(abstract_args(state))
        if (tree,) != layout.trees:
            raise LowerError(f"{name} has another tree than the state that {self.__name__} was planned for:\n  {tree}\ninstead of\n  {layout.trees[0]}")
        wrong = [
            f"  {leaf.name} : {x.dtype}{list(x.shape)} instead of {leaf.dtype}{list(leaf.shape)}"
            for leaf, x in zip(layout.leaves, leaves, strict=True)
            if x.shape != leaf.shape or x.dtype != leaf.dtype
        ]
        if wrong:
            raise LowerError(f"leaves of {name} differ from what {self.__name__} was planned for:\n" + "\n".join(wrong))

    # -- looking inside --------------------------------------------------------------------------------------------

    def trace(self, *args: Any, **kwargs: Any) -> Program:
        """The step as a typed program. Arguments may be `jax.ShapeDtypeStruct`s, here and below."""
        return self._examine(args, kwargs).program

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The stages and what they cost."""
        return self._examine(args, kwargs).plan

    def timetable(self, *args: Any, **kwargs: Any) -> Timetable:
        """Which rank does what in which tick."""
        return self._examine(args, kwargs).timetable

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan, the timetable's cost, and the memory, in words and tables."""
        built = self._examine(args, kwargs)
        return explain_step(built.program, built.plan, built.timetable, built.machine)

    def memory(self, *args: Any, **kwargs: Any) -> MemoryEstimate:
        """Bytes that must be in memory on each device, counted from the plan and the timetable."""
        return estimate_memory(self._examine(args, kwargs).machine)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The step, lowered for its mesh ahead of time; `.compile()` compiles it."""
        built = self._examine(args, kwargs)
        return Lowered(self, built, built.jitted.lower(*self._abstract_arguments(built)))

    def _abstract_arguments(self, built: Built) -> tuple[list, list, list, list]:
        everywhere = NamedSharding(self._mesh, P())
        rows = NamedSharding(self._mesh, P(self._axes.data))
        shared, batch = [], []
        for x, role in zip(built.arguments.leaves, built.arguments.roles, strict=True):
            if role == "batch" and x.shape:
                batch.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows))
            elif role != "state":
                shared.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere, weak_type=x.weak_type))
        states = [layout.abstract() for layout in built.layouts]
        donated = [states[k] for k in built.updated] if self._options.donate else []
        kept = [s for k, s in enumerate(states) if not self._options.donate or k not in built.updated]
        return donated, kept, shared, batch

    def _examine(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Built:
        if not args and not kwargs:
            if self._last is None:
                raise JaxparError(f"{self.__name__} has not run yet, so its arguments' shapes are unknown: pass them.")
            return self._last
        return self._prepare(self._signature.normalise(args, kwargs))

    # -- the pass --------------------------------------------------------------------------------------------------

    def _prepare(self, args: Sequence[Any]) -> Built:
        arguments = read_arguments(self._signature, [_user_tree(a) for a in args])
        if arguments.key not in self._built:
            specs = _user_specs(args, arguments, self._axes)
            self._built[arguments.key] = self._build(arguments, specs)
        self._last = self._built[arguments.key]
        return self._last

    def _build(self, arguments: Arguments, specs: Sequence[tuple[Any, ...]]) -> Built:
        """The whole pass."""
        axes, options = self._axes, self._options
        microbatch = self._microbatch_size(arguments)
        sizes = (arguments.num_examples, trace_size(arguments.num_examples, microbatch))
        (whole, shapes), (small, _) = map(arguments.trace, sizes)
        program = make_program(whole, small, sizes, arguments.names, arguments.roles)
        outputs = match_state_outputs(arguments, shapes, program.carries_over, options.new_state)
        layouts = self._known_layouts()
        plan = plan_stages(
            program,
            axes.num_ranks,
            microbatch,
            Roofline.for_platform(self._mesh.devices.flat[0].platform),
            judge=self._judge,
            updated=_updated_inputs(arguments, outputs),
            cuts=options.cuts,
            owners=_owners(arguments, layouts) if layouts is not None else None,
        )
        timetable = make_timetable(options.schedule, plan.graph.dag(axes.num_ranks), options.num_microbatches, **options.schedule_options)
        if layouts is None:
            layouts = self._lay_out(arguments, plan, specs)
        staged = _jax.copies_rings(self._mesh.devices.flat[0].platform)
        machine = build_machine(program, plan.graph, timetable, axes, microbatch, layouts, outputs.state_outputs, staged)
        jitted = _jit(build_step(machine, self._mesh), outputs.updated, options.donate)
        self._layouts = layouts
        return Built(arguments, program, plan, timetable, machine, layouts, outputs, jitted)

    def _microbatch_size(self, arguments: Arguments) -> int:
        total, replicas, count = arguments.num_examples, self._axes.replicas, self._options.num_microbatches
        if total % (replicas * count):
            arrays = [n for n, r, x in zip(arguments.names, arguments.roles, arguments.leaves, strict=True) if r == "batch" and x.shape]
            below, step = total // (replicas * count) * replicas * count, replicas * count
            raise TraceError(
                f"the batch ({arrays[0]}{', ...' if len(arrays) > 1 else ''}) has {total} examples, which don't split evenly into "
                f"{count} micro-batches on {replicas} replica{'s' * (replicas > 1)}: the batch size must be a multiple of {step}, "
                f"such as {below or step} or {below + step}."
            )
        return total // (replicas * count)

    def _judge(self, dag: StageDag, costs: StageCosts) -> float:
        options = self._options
        if isinstance(options.schedule, Timetable):
            return simulate(make_timetable("1f1b", dag, options.num_microbatches), costs).makespan
        return simulate(make_timetable(options.schedule, dag, options.num_microbatches, **options.schedule_options), costs).makespan

    def _lay_out(self, arguments: Arguments, plan: Plan, specs: Sequence[tuple[Any, ...]]) -> tuple[StateLayout, ...]:
        state, homes = arguments.leaves_of("state"), plan.homes
        layouts, start = [], 0
        for i in self._signature.state_argnums:
            tree = arguments.trees[i]
            mine = state[start : start + tree.num_leaves]
            start += tree.num_leaves
            leaves = [(arguments.names[j], arguments.leaves[j].shape, arguments.leaves[j].dtype, specs[j]) for j in mine]
            ranks = [homes.stage[j] for j in mine]
            order = {k: homes.order.get(j, (0, j)) for k, j in enumerate(mine)}
            layouts.append(make_layout(self._mesh, self._axes.stage, (tree,), leaves, ranks, order))
        return tuple(layouts)


def _jit(step: Callable[..., Any], updated: Sequence[int], donate: bool) -> Any:
    def run(donated: Sequence[PlacedState], kept: Sequence[PlacedState], shared: Sequence[Any], batch: Sequence[Any]) -> Any:
        states: dict[int, PlacedState] = dict(zip(updated, donated, strict=True)) if donated else {}
        rest = iter(kept)
        count = len(donated) + len(kept)
        return step([states[k] if k in states else next(rest) for k in range(count)], shared, batch)

    return jax.jit(run, donate_argnums=(0,) if donate else ())


def _single(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _user_tree(arg: Any) -> Any:
    """The user's own form of a state argument, as shapes where it is placed."""
    if isinstance(arg, PendingState):
        return arg.tree
    if isinstance(arg, PlacedState):
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in arg.layout.leaves]
        return jax.tree.unflatten(arg.layout.trees[0], shapes)
    return arg


def _gather(state: Any) -> Any:
    if isinstance(state, PendingState):
        if state.make is None:
            return state.tree
        state = state.make()
    if not isinstance(state, PlacedState):
        raise LowerError(f"gather takes what place or the step returned, not a {type(state).__name__}.")
    return jax.tree.unflatten(state.layout.trees[0], gather_leaves(state))


def _owners(arguments: Arguments, layouts: Sequence[StateLayout]) -> dict[int, int | None]:
    leaves = [leaf for layout in layouts for leaf in layout.leaves]
    return {i: leaf.rank for i, leaf in zip(arguments.leaves_of("state"), leaves, strict=True)}


def _updated_inputs(arguments: Arguments, outputs: OutputTree) -> dict[int, int]:
    """Index of the output that is the new value of a state input, by the input's index."""
    state = arguments.leaves_of("state")
    return {state[leaf]: out for out, leaf in outputs.state_outputs.items()}


def _user_specs(args: Sequence[Any], arguments: Arguments, axes: Axes) -> list[tuple[Any, ...]]:
    """Each leaf's sharding over the axes that are left to the compiler, as the user has it."""
    leaves = [x for i, a in enumerate(args) if arguments.trees[i] is not None for x in jax.tree.leaves(_user_tree(a))]
    return [_free_spec(x, axes) for x in leaves]


def _free_spec(x: Any, axes: Axes) -> tuple[Any, ...]:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return ()
    entries = []
    for entry in sharding.spec:
        names = entry if isinstance(entry, tuple) else (entry,)
        kept = tuple(n for n in names if isinstance(n, str) and n not in axes.manual)
        entries.append(kept[0] if len(kept) == 1 else (kept or None))
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A step lowered for its mesh, in the manner of `jax.stages.Lowered`."""

    step: PipelinedStep
    built: Built
    lowered: Any

    @property
    def num_programs(self) -> int:
        """Distinct programs of stages' actions: equal stages share theirs."""
        return self.built.machine.num_stage_programs

    def as_text(self) -> str:
        return self.lowered.as_text()

    def compile(self) -> Compiled:
        return Compiled(self.step, self.built, self.lowered.compile())


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled step, in the manner of `jax.stages.Compiled`: call it like the step."""

    step: PipelinedStep
    built: Built
    compiled: Any

    def __call__(self, *args: Any) -> Any:
        return self.step._finish(self.built, *self.compiled(*self.step._placed_arguments(self.built, args)))

    def as_text(self) -> str:
        return self.compiled.as_text()

    def memory_analysis(self) -> Any:
        return self.compiled.memory_analysis()

    def cost_analysis(self) -> Any:
        return self.compiled.cost_analysis()
