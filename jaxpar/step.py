"""A pipelined step: what the user calls, and looks into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.arguments import Arguments, Signature, compare_leaves, read_arguments
from jaxpar.compiled import Lowered
from jaxpar.errors import JaxparError, LowerError
from jaxpar.lower import (
    Axes,
    MemoryEstimate,
    PlacedState,
    Recorder,
    StateLayout,
    estimate_memory,
    find_permutes_in_branches,
    gather_leaves,
    init_leaves,
    make_recorder,
    place_leaves,
)
from jaxpar.options import Options
from jaxpar.passes import Built, free_spec, run_passes
from jaxpar.plan import PipelinePlan, Plan
from jaxpar.schedule import Simulation, Timetable
from jaxpar.show import explain_step
from jaxpar.trace import Program
from jaxpar.tracing import collector_paused

P = PartitionSpec


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class PendingState:
    """State that will be placed at the step's first call, when the batch's shape is known."""

    tree: Any
    make: Callable[[Sequence[StateLayout], Axes], PlacedState] | None = None  # for `init`: what creates it

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
        self._compiled: dict[Any, Any] = {}
        self._recorders: dict[Any, Recorder] = {}
        self._layouts: tuple[StateLayout, ...] | None = None
        self._last: Built | None = None
        self.__name__ = signature.name
        self.__doc__ = signature.fun.__doc__
        self.__wrapped__ = signature.fun
        self._check_state_of()

    def __repr__(self) -> str:
        mesh = " x ".join(f"{n} {a}" for a, n in self._mesh.shape.items())
        plan = self._options.plan
        planned = plan.num_microbatches if isinstance(plan, PipelinePlan) else "planned"
        count = self._options.num_microbatches or planned
        return f"PipelinedStep({self._signature.name}, {mesh}, {count} micro-batches)"

    # -- running ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self._signature.normalise(args, kwargs)
        built = self._prepare(args)
        inputs = self._placed_arguments(built, args)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs))  # inside somebody's jit
        run = built.jitted if traced else self._compile(built)
        return self._finish(built, *run(*inputs))

    def _lower(self, built: Built) -> Any:
        with collector_paused():
            return built.jitted.lower(*self._abstract_arguments(built))

    def _compile(self, built: Built, lowered: Any = None) -> Any:
        """The compiled step, once it is known that it can't hang."""
        key = built.arguments.key
        if key not in self._compiled:
            compiled = (lowered or self._lower(built)).compile()
            self._check_compiled(compiled)
            self._compiled[key] = compiled
        return self._compiled[key]

    def _check_compiled(self, compiled: Any) -> None:
        free = [n for a, n in self._mesh.shape.items() if a not in self._axes.manual]
        if self._mesh.devices.flat[0].platform != "cpu" or all(n == 1 for n in free):
            return
        if found := find_permutes_in_branches(compiled.as_text()):
            raise LowerError(
                f"with these shardings XLA moves data between devices inside {self.__name__}'s stages by "
                f"collective-permutes ({len(found)} of them, the first for {found[0]}), on which the emulated "
                "devices of XLA:CPU wait for ever. Operations that move elements along a sharded dimension (roll, "
                "reverse, a slice or split that doesn't match the shards) need them: constrain their operands to "
                "be whole along that dimension (jax.lax.with_sharding_constraint), or shard another one. On GPUs "
                "and TPUs they are fine."
            )

    def _finish(self, built: Built, states: Sequence[PlacedState], outputs: Sequence[Any]) -> Any:
        rest = iter([x for i, x in enumerate(outputs) if i not in built.machine.outputs.state])
        by_argument = dict(zip(built.updated, states, strict=True))
        leaves = [by_argument[mark] if mark >= 0 else next(rest) for mark in built.output_tree.marks]
        return jax.tree.unflatten(built.output_tree.tree, leaves)

    def _placed_arguments(self, built: Built, args: Sequence[Any]) -> tuple[list, list, list, list]:
        """(states to be donated, other states, shared leaves, batch leaves), on the mesh."""
        nums = self._signature.state_argnums
        states = [self._placed(built.layouts, k, args[i]) for k, i in enumerate(nums)]
        everywhere = NamedSharding(self._mesh, P())
        rows = NamedSharding(self._mesh, P(self._axes.data))
        shared: list[Any] = []
        batch: list[Any] = []
        for i, arg in enumerate(args):
            if i in nums or i in self._signature.static_argnums:
                continue
            for leaf in jax.tree.leaves(arg):
                is_rows = i in self._signature.batch_argnums and np.ndim(leaf) > 0
                (batch if is_rows else shared).append(jax.device_put(leaf, rows if is_rows else everywhere))
        donated = [states[k] for k in built.updated] if self._options.donate else []
        kept = [s for k, s in enumerate(states) if not self._options.donate or k not in built.updated]
        return donated, kept, shared, batch

    def _placed(self, layouts: Sequence[StateLayout], k: int, state: Any) -> PlacedState:
        """State argument k, placed if it isn't yet."""
        if isinstance(state, PendingState):
            if state.make is not None:
                return state.make(layouts, self._axes)
            state = state.tree
        if not isinstance(state, PlacedState):
            leaves = jax.tree.leaves(state)
            if any(isinstance(x, jax.core.Tracer) for x in leaves):
                raise LowerError(
                    f"{self.__name__} is called inside a transformed function (jit, scan, ...), where it can't place "
                    f"{self._state_names[k]}. Outside, call {self.__name__}.plan(...) and {self.__name__}.place(...) "
                    "first, and pass what place returns."
                )
            return place_leaves(layouts[k], leaves)
        self._check_placed(layouts[k], state, self._state_names[k])
        return state

    def _check_placed(self, layout: StateLayout, state: PlacedState, name: str) -> None:
        if state.layout != layout:
            theirs, ours = dict(state.layout.mesh.shape), dict(layout.mesh.shape)
            why = "on other devices" if state.layout.mesh != layout.mesh else "by another step or plan"
            why = f"on another mesh ({theirs}, this step's is {ours})" if theirs != ours else why
            raise LowerError(
                f"{name} was placed {why}, so its leaves aren't where {self.__name__} looks for them. Gather it with "
                "the step that placed it (`old_step.gather(state)`) and place it anew, or make this step with "
                "state_of=old_step."
            )
        if state.is_deleted:
            raise LowerError(
                f"{name} was donated to a step that has run since: its buffers are gone. Use the state that the step "
                "returned, or make the step with donate=False."
            )

    # -- state -----------------------------------------------------------------------------------------------------

    def place(self, *states: Any) -> Any:
        """Put each state argument's leaves on the ranks that own them.

        Before the step has seen a batch it can't know where they belong: then the state is marked, and placed at the
        first call.

        Args:
            states: one for each of `state_argnums`. One that is placed already is checked, and stays as it is.

        Returns: a `PlacedState` (or `PendingState`) for each; not a tuple if there is one.
        """
        self._check_states(states)
        layouts = self._known_layouts()
        if layouts is None:
            return _single([s if isinstance(s, PendingState | PlacedState) else PendingState(s) for s in states])
        layouts = self._fit_layouts(layouts, [_user_tree(s) for s in states])
        return _single([self._placed(layouts, k, s) for k, s in enumerate(states)])

    def gather(self, *states: Any) -> Any:
        """The user's own pytrees back, as NumPy arrays on the host (PRNG keys as key arrays)."""
        self._check_states(states)
        return _single([self._gather(s) for s in states])

    def _gather(self, state: Any) -> Any:
        if isinstance(state, PendingState):
            if state.make is None:
                return state.tree
            if (layouts := self._known_layouts()) is None:
                raise LowerError(
                    f"this state is not created yet: that happens at the first call of {self.__name__}, or of its "
                    "`plan` or `lower`, which know the batch's shape."
                )
            state = state.make(layouts, self._axes)
        if not isinstance(state, PlacedState):
            raise LowerError(f"gather takes what place or the step returned, not a {type(state).__name__}.")
        return jax.tree.unflatten(state.layout.trees[0], gather_leaves(state))

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
            return _single(init_leaves(self._fit_layouts(layouts, states), self._axes, init_fn, args))

        def make(k: int, layouts: Sequence[StateLayout], axes: Axes) -> PlacedState:
            return init_leaves(layouts, axes, init_fn, args)[k]

        return _single([PendingState(s, partial(make, k)) for k, s in enumerate(states)])

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

    @property
    def _state_names(self) -> list[str]:
        return [self._signature.argument_name(i) for i in self._signature.state_argnums]

    def _fit_layouts(self, layouts: Sequence[StateLayout], states: Sequence[Any]) -> tuple[StateLayout, ...]:
        """The layouts for states with the same leaves; what is static in their trees, such as functions, may differ."""
        self._check_states(layouts)
        pairs = list(zip(self._state_names, states, layouts, strict=True))
        wrong = [line for name, state, layout in pairs for line in compare_leaves(name, state, layout.user_tree)]
        if wrong:
            more = [f"  ... and {len(wrong) - 12} more"] if len(wrong) > 12 else []
            lines = "\n".join([*wrong[:12], *more])
            raise LowerError(
                f"the state differs from the one that {self.__name__} was planned for:\n{lines}\n"
                "For a state of other shapes, make another step with jaxpar.parallelize."
            )
        return tuple(replace(layout, trees=(jax.tree.structure(state),)) for _, state, layout in pairs)

    def _check_state_of(self) -> None:
        other = self._options.state_of
        if other is not None and (other._mesh != self._mesh or other._axes.stage != self._axes.stage):
            raise LowerError(
                f"{self.__name__} can't read the state of {other.__name__}, which is on another mesh or on other "
                f"devices: {dict(other._mesh.shape)} with stages on {other._axes.stage!r}, against "
                f"{dict(self._mesh.shape)} with stages on {self._axes.stage!r}. Make both with the same mesh."
            )

    # -- looking inside --------------------------------------------------------------------------------------------

    def trace(self, *args: Any, **kwargs: Any) -> Program:
        """The step as a typed program. Arguments may be `jax.ShapeDtypeStruct`s, here and below."""
        return self._examine(args, kwargs).program

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The stages and what they cost."""
        return self._examine(args, kwargs).plan

    def pipeline(self, *args: Any, **kwargs: Any) -> PipelinePlan | None:
        """The plan that the stages follow, for `plan=`: to print, draw, edit, save and give to another step."""
        return self._examine(args, kwargs).arrangement.pipeline

    def timetable(self, *args: Any, **kwargs: Any) -> Timetable:
        """Which rank does what in which tick."""
        return self._examine(args, kwargs).timetable

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan, the timetable's cost, and the memory, in words and tables."""
        built = self._examine(args, kwargs)
        pipeline = built.arrangement.pipeline
        return explain_step(built.program, built.plan, pipeline, built.timetable, built.search, built.machine)

    def memory(self, *args: Any, **kwargs: Any) -> MemoryEstimate:
        """Bytes that must be in memory on each device, counted from the plan and the timetable."""
        return estimate_memory(self._examine(args, kwargs).machine)

    def record(self, *args: Any, **kwargs: Any) -> Simulation:
        """Run one step and time each action on each rank; what the step computes is thrown away.

        The state that is given is left as it is, and stays valid, also where steps donate theirs: so there must be room
        for a second one. The recorded step is compiled for itself, and run once before it is timed.

        An action starts when its rank has what it needs, and ends when all that it made is there. Asking the host for
        the time takes a fraction of a millisecond of each, and more between them: record steps whose actions take
        longer. Of several replicas, and of other axes, the first one's times are kept.

        Args: those of the step.

        Returns: the times in seconds, with the plan's costs. `run.draw()` draws them, `run.write_chrome_trace(path)`
        writes them for Perfetto, and `simulate(run.timetable, run.median_costs())`, from `jaxpar.schedule`, is what the
        timetable itself makes of such actions.

        Raises: LowerError inside `jit` and the like, or if the devices belong to several processes.
        """
        args = self._signature.normalise(args, kwargs)
        built = self._prepare(args)
        inputs = self._placed_arguments(built, args)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):
            raise LowerError(
                f"{self.__name__}.record runs a step, and can't inside jit, scan and the like: call it outside."
            )
        key = built.arguments.key
        if key not in self._recorders:
            with collector_paused():
                recorder = make_recorder(
                    built.machine, built.timetable, self._mesh, built.updated, inputs, self._check_compiled
                )
            recorder.run(inputs)
            self._recorders[key] = recorder
        run, _ = self._recorders[key].run(inputs, built.plan.costs)
        return run

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The step, lowered for its mesh ahead of time; `.compile()` compiles it."""
        built = self._examine(args, kwargs)
        return Lowered(self, built, self._lower(built))

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

    def _prepare(self, args: Sequence[Any]) -> Built:
        arguments = read_arguments(self._signature, [_user_tree(a) for a in args])
        if arguments.key not in self._built:
            other = self._options.state_of
            if other is not None and other._known_layouts() is None:
                raise JaxparError(
                    f"{self.__name__} reads the state where {other.__name__} placed it, but {other.__name__} hasn't "
                    f"been planned: call it, or {other.__name__}.plan(...), first."
                )
            leaves = [
                x for a, tree in zip(args, arguments.trees, strict=True) if tree is not None for x in _user_leaves(a)
            ]
            specs = [free_spec(x, self._axes) for x in leaves]
            layouts = self._layouts_for(arguments)
            with collector_paused():
                built = run_passes(arguments, specs, self._mesh, self._axes, self._options, layouts)
            self._built[arguments.key], self._layouts = built, built.layouts
            if built.arrangement.pipeline is not None:  # other shapes follow the plan of the first
                self._options = replace(self._options, plan=built.arrangement.pipeline)
        self._last = self._built[arguments.key]
        return self._last

    def _layouts_for(self, arguments: Arguments) -> tuple[StateLayout, ...] | None:
        if (layouts := self._known_layouts()) is None:
            return None
        leaves = iter([arguments.leaves[i] for i in arguments.leaves_of("state")])
        trees = [arguments.trees[i] for i in self._signature.state_argnums]
        states = [jax.tree.unflatten(tree, [next(leaves) for _ in range(tree.num_leaves)]) for tree in trees]
        return self._fit_layouts(layouts, states)


def _single(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _user_tree(arg: Any) -> Any:
    """The user's own form of a state argument, as shapes where it is placed."""
    if isinstance(arg, PendingState):
        return arg.tree
    if isinstance(arg, PlacedState):
        return arg.layout.user_tree
    return arg


def _user_leaves(arg: Any) -> list[Any]:
    return jax.tree.leaves(_user_tree(arg))
