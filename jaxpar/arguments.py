"""The step's arguments and outputs: which leaf is state, which is batch, and what each is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jaxpar.errors import TraceError
from jaxpar.trace import abstract_args
from jaxpar.trace.program import Role

keystr = jax.tree_util.keystr


@dataclass(frozen=True)
class Signature:
    """What `parallelize` was told about the function's arguments."""

    fun: Callable[..., Any]
    state_argnums: tuple[int, ...]
    batch_argnums: tuple[int, ...]
    static_argnums: tuple[int, ...]

    def __post_init__(self) -> None:
        seen: dict[int, str] = {}
        for what in ("state_argnums", "batch_argnums", "static_argnums"):
            for i in getattr(self, what):
                if i < 0:
                    raise TraceError(f"{what} has {i}: the arguments of {self.name} are counted from 0.")
                if i in seen:
                    raise TraceError(
                        f"{self.argument_name(i)} (argument {i} of {self.name}) is in {seen[i]} and in {what}; an "
                        "argument is one of them, or none if it is an array that is the same for all examples."
                    )
                seen[i] = what

    def normalise(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Positional arguments, with those given by name and defaults filled in."""
        if not kwargs:
            self._check_count(args)
            return tuple(args)
        bound = inspect.signature(self.fun).bind(*args, **kwargs)
        if bound.kwargs:
            raise TraceError(
                f"{self.name} has keyword-only arguments ({', '.join(bound.kwargs)}); a pipelined step takes "
                "positional ones."
            )
        bound.apply_defaults()
        self._check_count(bound.args)
        return bound.args

    def _check_count(self, args: Sequence[Any]) -> None:
        for role, nums in (("state_argnums", self.state_argnums), ("batch_argnums", self.batch_argnums)):
            for i in nums:
                if i >= len(args):
                    raise TraceError(f"{role} has {i}, but {self.name} was called with {len(args)} arguments.")

    @property
    def name(self) -> str:
        return getattr(self.fun, "__name__", type(self.fun).__name__)

    def argument_name(self, index: int) -> str:
        try:
            return list(inspect.signature(self.fun).parameters)[index]
        except (ValueError, TypeError, IndexError):
            return f"argument {index}"

    def role(self, index: int) -> Role:
        return "state" if index in self.state_argnums else "batch" if index in self.batch_argnums else "other"


@dataclass(frozen=True, eq=False)
class Arguments:
    """The flat arguments of one call, as shapes. `trees[i]` is None for a static argument."""

    signature: Signature
    trees: tuple[Any, ...]
    static: tuple[tuple[int, Any], ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]
    roles: tuple[Role, ...]
    num_examples: int

    @property
    def key(self) -> Any:
        shapes = tuple((x.shape, x.dtype, x.weak_type) for x in self.leaves)
        return (self.trees, self.static, shapes)

    def leaves_of(self, role: Role) -> list[int]:
        return [i for i, r in enumerate(self.roles) if r == role]

    def call(self, leaves: Sequence[Any]) -> Any:
        """The user's function on flat arguments."""
        it = iter(leaves)
        static = dict(self.static)
        args = []
        for i, tree in enumerate(self.trees):
            if tree is None:
                args.append(static[i])
            else:
                args.append(jax.tree.unflatten(tree, [next(it) for _ in range(tree.num_leaves)]))
        return self.signature.fun(*args)

    def trace(self, num_examples: int) -> tuple[Any, Any]:
        """The closed jaxpr with that many examples in the batch, and the output as a tree of shapes."""
        return jax.make_jaxpr(lambda *leaves: self.call(leaves), return_shape=True)(*self._sized(num_examples))

    def _sized(self, n: int) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, weak_type=x.weak_type) if r == "batch" and x.shape else x
            for x, r in zip(self.leaves, self.roles, strict=True)
        ]


def read_arguments(signature: Signature, args: Sequence[Any]) -> Arguments:
    """Flatten and check the arguments (arrays or `ShapeDtypeStruct`s).

    Raises: TraceError for a batch without arrays, or whose arrays don't share their leading size.
    """
    trees: list[Any] = []
    static = []
    leaves: list[jax.ShapeDtypeStruct] = []
    names: list[str] = []
    roles: list[Role] = []
    for i, arg in enumerate(args):
        if i in signature.static_argnums:
            trees.append(None)
            static.append((i, _check_static(signature, i, arg)))
            continue
        flat, tree = jax.tree_util.tree_flatten_with_path(arg)
        trees.append(tree)
        for path, leaf in flat:
            name = f"{signature.argument_name(i)}{keystr(path)}"
            leaves.append(_abstract_leaf(name, leaf, signature.role(i)))
            names.append(name)
            roles.append(signature.role(i))
    num_examples = _common_size(signature, leaves, names, roles)
    return Arguments(signature, tuple(trees), tuple(static), tuple(leaves), tuple(names), tuple(roles), num_examples)


def _check_static(signature: Signature, index: int, value: Any) -> Any:
    try:
        hash(value)
    except TypeError as error:
        raise TraceError(
            f"{signature.argument_name(index)} is static, and so has to be hashable, but it is a "
            f"{type(value).__name__}. Pass something that can't change, such as a tuple or a frozen dataclass."
        ) from error
    return value


def _abstract_leaf(name: str, leaf: Any, role: Role) -> jax.ShapeDtypeStruct:
    try:
        x = abstract_args(leaf)
        # Python numbers in the state become arrays when it is placed: the same program before and after
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if role == "state" else x
    except TypeError as error:
        raise TraceError(
            f"{name} is a {type(leaf).__name__}, not an array. Leave it out of the arguments, make it static with "
            "static_argnums, or make it part of the function."
        ) from error


def _common_size(
    signature: Signature, leaves: Sequence[jax.ShapeDtypeStruct], names: Sequence[str], roles: Sequence[Role]
) -> int:
    arrays = [(n, x) for n, x, r in zip(names, leaves, roles, strict=True) if r == "batch" and x.shape]
    if not arrays:
        which = ", ".join(signature.argument_name(i) for i in signature.batch_argnums)
        raise TraceError(
            f"the batch ({which}) has no array with a leading dimension, so there are no examples to make "
            f"micro-batches of. batch_argnums={signature.batch_argnums} says which arguments are the batch."
        )
    sizes = {x.shape[0] for _, x in arrays}
    if len(sizes) > 1:
        table = "\n".join(f"  {n} : {x.dtype}{list(x.shape)}" for n, x in arrays)
        raise TraceError(
            "the arrays of the batch don't share their leading size, the number of examples: "
            f"{sorted(sizes)}.\n{table}\n"
            "Pass what isn't one row per example as another argument of the step."
        )
    if sizes == {0}:
        raise TraceError(
            f"the batch ({arrays[0][0]} : {arrays[0][1].dtype}{list(arrays[0][1].shape)}) has no examples."
        )
    return sizes.pop()


def compare_leaves(name: str, state: Any, expected: Any) -> list[str]:
    """Lines that say which leaves of a state are not as expected: other paths, shapes or dtypes."""
    found, wanted = (
        {f"{name}{keystr(path)}": x for path, x in jax.tree_util.tree_flatten_with_path(abstract_args(tree))[0]}
        for tree in (state, expected)
    )
    lines = [f"  {path} : not expected" for path in found if path not in wanted]
    lines += [f"  {path} : missing" for path in wanted if path not in found]
    if not lines and list(found) != list(wanted):
        lines.append(f"  {name} : its leaves are in another order")
    return lines + [
        f"  {path} : {x.dtype}{list(x.shape)} instead of {wanted[path].dtype}{list(wanted[path].shape)}"
        for path, x in found.items()
        if path in wanted and (x.shape, x.dtype) != (wanted[path].shape, wanted[path].dtype)
    ]


@dataclass(frozen=True, eq=False)
class OutputTree:
    """The step's output, with one leaf in place of each new state.

    `marks[i]`: position in `state_argnums` of the state argument whose new value leaf i is, or -1. `state_outputs`:
    number of the state input by index of the program's output.
    """

    tree: Any
    marks: tuple[int, ...]
    state_outputs: Mapping[int, int]

    @property
    def updated(self) -> tuple[int, ...]:
        return tuple(sorted(m for m in self.marks if m >= 0))


NewState = Literal["auto"] | Callable[[Any], Any] | None


def match_state_outputs(
    arguments: Arguments, outputs: Any, carries_over: Callable[[int, int], bool], new_state: NewState
) -> OutputTree:
    """Find the new state among the outputs.

    "auto": a subtree with the tree, shapes and dtypes of a state argument, some leaf of which is computed from its
    own old value by the update (gradients returned as they are have the same tree, but are no new state).

    Args:
        outputs: the output as a tree of shapes.
        carries_over: whether output i is computed from state input k other than through the batch.
        new_state: "auto"; or a function from the output to its new states, in the order of `state_argnums`; or None.
    """
    wanted = list(_state_trees(arguments))
    chosen = _choose_by_function(outputs, new_state) if callable(new_state) else None
    taken: dict[int, tuple[int, int]] = {}  # first output index -> (state argument, its first leaf)
    leaf_index = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(outputs))}

    def is_state(node: Any) -> bool:
        leaves, tree = jax.tree.flatten(node)
        if not leaves or new_state is None:
            return False
        shapes = [(x.shape, x.dtype) for x in leaves]
        start = leaf_index[id(leaves[0])]
        for k, (state_tree, state_shapes, first) in enumerate(wanted):
            if any(k == argument for argument, _ in taken.values()) or (tree, shapes) != (state_tree, state_shapes):
                continue
            if chosen is not None:
                agrees = chosen.get(start) == k
            else:
                agrees = any(carries_over(start + j, first + j) for j in range(len(leaves)))
            if agrees:
                taken[start] = (k, first)
                return True
        return False

    nodes, tree = jax.tree.flatten(outputs, is_leaf=is_state)
    marks, state_outputs = [], {}
    for node in nodes:
        leaves = jax.tree.leaves(node)
        argument, first = taken.get(leaf_index[id(leaves[0])], (-1, 0))
        marks.append(argument)
        if argument >= 0:
            start = leaf_index[id(leaves[0])]
            state_outputs.update({start + j: first + j for j in range(len(leaves))})
    if chosen is not None and len(taken) != len(chosen):
        raise TraceError(
            f"new_state picks {len(chosen)} subtrees of {arguments.signature.name}'s output, but only {len(taken)} of "
            "them have the tree, shapes and dtypes of the state arguments, in the order of state_argnums."
        )
    return OutputTree(tree, tuple(marks), state_outputs)


def _state_trees(arguments: Arguments) -> Iterator[tuple[Any, list[Any], int]]:
    """Tree, shapes, and number of the first leaf of each state argument."""
    flat, first = 0, 0
    found = {}
    for i, tree in enumerate(arguments.trees):
        count = 0 if tree is None else tree.num_leaves
        if i in arguments.signature.state_argnums:
            found[i] = (tree, [(x.shape, x.dtype) for x in arguments.leaves[flat : flat + count]], first)
            first += count
        flat += count
    for i in arguments.signature.state_argnums:
        yield found[i]


def _choose_by_function(outputs: Any, new_state: Callable[[Any], Any]) -> dict[int, int]:
    """First output index of each subtree that the user's function picks, with its position."""
    index = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(outputs))}
    picked = new_state(outputs)
    states = picked if isinstance(picked, tuple) and type(picked) is tuple else (picked,)
    return {index[id(jax.tree.leaves(s)[0])]: k for k, s in enumerate(states) if jax.tree.leaves(s)}
