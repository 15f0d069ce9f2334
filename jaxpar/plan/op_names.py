"""Operators by what people call them: module paths, their prefixes, and short forms for tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches

from jaxpar.errors import PlanError
from jaxpar.plan.op_graph import OpGraph

Named = str | int | Iterable[str | int]  # a name, the prefix of several, an index, or several of these

_MOST_PIECES = 3


def find_ops(graph: OpGraph, named: Named) -> tuple[int, ...]:
    """The operators that a name means, in order: the one of that name, or all in the module of that name.

    Args:
      graph: the operators.
      named: a name such as `GPT/layer_0/mlp`; the start of names up to the end of a word of them, such as `GPT/layer_0`
        (which is not `GPT/layer_01`); a part of the path, such as `layer_0`; an index; or several of these.

    Raises:
      PlanError: a name means no operator, with those that look like it.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op("net/embed", 1.0), Op("net/layer_1", 1.0), Op("net/layer_10", 1.0)], [])
    >>> find_ops(graph, "net/layer_1"), find_ops(graph, "net"), find_ops(graph, ["embed", 2])
    ((1,), (0, 1, 2), (0, 2))
    """
    found: set[int] = set()
    unknown = []
    for name in [named] if isinstance(named, str | int) else named:
        if isinstance(name, str):
            meant = {graph.index[name]} if name in graph.index else _in_module(graph, name)
        else:
            meant = {name} if 0 <= name < graph.num_ops else set()
        found |= meant
        if not meant:
            unknown.append(f"{name!r}{_suggest(graph, name)}")
    if unknown:
        raise PlanError(f"no operator of the graph is called {', '.join(unknown)}")
    return tuple(sorted(found))


def _in_module(graph: OpGraph, module: str) -> set[int]:
    """Those whose names start with the module's path, or else have it somewhere within theirs, in whole words."""
    words = re.escape(module) + r"(?=$|[^A-Za-z0-9_])"
    starts = {i for i, op in enumerate(graph.ops) if re.match(words, op.name)}
    return starts or {i for i, op in enumerate(graph.ops) if re.search("/" + words, op.name)}


def _suggest(graph: OpGraph, name: str | int) -> str:
    if isinstance(name, int):
        return f" (indices are 0 ... {graph.num_ops - 1})"
    modules = {op.name[: m.start()] for op in graph.ops for m in re.finditer(r"[/.]", op.name)}
    near = get_close_matches(name, [*graph.index, *sorted(modules)], n=3)
    names = ", ".join(map(repr, near or list(graph.index)[:3]))
    return f" (did you mean {names}?)" if near else f" (there are {names}{', ...' * (graph.num_ops > 3)})"


def resolve_pins(graph: OpGraph, pins: Mapping[str, int]) -> dict[int, int]:
    """The stage of each operator that pins decide: those that they name, and those that lie between two of one stage.

    Stages are numbered in a topological order, so pins can be kept by some plan if and only if no path leads from an
    operator of a stage to one of a lower stage.

    Args:
      graph: the operators.
      pins: stages by names of operators or modules; the longest name that fits an operator counts.

    Raises:
      PlanError: a name means no operator, a stage is negative, or no stages can be convex and in order with these pins,
        with the path that shows it.

    >>> from jaxpar.plan.op_graph import Op
    >>> graph = OpGraph.build([Op(f"layer_{i}", 1.0) for i in range(4)],
    ...                       [(f"layer_{i}", f"layer_{i + 1}") for i in range(3)])
    >>> resolve_pins(graph, {"layer_1": 1, "layer_3": 1})
    {1: 1, 2: 1, 3: 1}
    """
    if negative := [name for name, stage in pins.items() if stage < 0]:
        raise PlanError(f"pins are to stages 0, 1, 2 ..., not to negative ones: {', '.join(map(repr, negative))}")
    find_ops(graph, list(pins))
    pinned: dict[int, int] = {}
    for name in sorted(pins, key=len):
        pinned |= dict.fromkeys(find_ops(graph, name), pins[name])
    low = _spread(graph.order, graph.predecessors, pinned, max)  # the highest stage that is pinned upstream, or here
    high = _spread(graph.order[::-1], graph.successors, pinned, min)  # the lowest downstream, or here
    for i, stage in pinned.items():
        before = max((low[p] for p in graph.predecessors[i] if p in low), default=stage)
        if before > stage:
            raise PlanError(_explain_pins(graph, pinned, i, before))
    return {i: low[i] for i in range(graph.num_ops) if i in low and low[i] == high.get(i)}


def _spread(
    order: Sequence[int],
    sources: Sequence[Sequence[int]],
    pinned: Mapping[int, int],
    choose: Callable[[list[int]], int],
) -> dict[int, int]:
    found: dict[int, int] = {}
    for i in order:
        stages = [found[p] for p in sources[i] if p in found]
        stages += [pinned[i]] if i in pinned else []
        if stages:
            found[i] = choose(stages)
    return found


def _explain_pins(graph: OpGraph, pinned: Mapping[int, int], end: int, stage: int) -> str:
    """Why `end` can't be where it is pinned: a path from an operator of `stage`, which is higher, to it."""
    came_from = {end: end}
    queue = [end]
    while queue:
        op = queue.pop(0)
        for source in graph.predecessors[op]:
            if source not in came_from:
                came_from[source] = op
                queue.append(source)
                if pinned.get(source) == stage:
                    queue.clear()
                    break
    start = next(i for i in reversed(came_from) if pinned.get(i) == stage)
    path = [start]
    while path[-1] != end:
        path.append(came_from[path[-1]])
    steps = " -> ".join(
        f"{graph.ops[i].name!r} (stage {pinned[i]})" if i in pinned else repr(graph.ops[i].name) for i in path
    )
    return (
        f"no stages are convex and in order with these pins: {steps} leads from stage {stage} back to stage "
        f"{pinned[end]}; stages are numbered in a topological order"
    )


def describe_ops(graph: OpGraph, ops: Sequence[int]) -> str:
    """A short form of a stage's operators, without the module that all of the graph are in.

    >>> from jaxpar.plan.op_graph import Op
    >>> names = ["GPT/embed", *(f"GPT/layer_{i}/{part}" for i in range(8) for part in ("attn", "mlp")), "GPT/head"]
    >>> graph = OpGraph.build([Op(name, 1.0) for name in names], [])
    >>> describe_ops(graph, range(1, 17)), describe_ops(graph, [0, 1]), describe_ops(graph, range(18))
    ('layer_0 ... layer_7 (16)', 'embed, layer_0/attn', 'embed, layer_0 ... layer_7, head (18)')
    """
    cut = len(_common_module([op.name for op in graph.ops]))
    names = [graph.ops[i].name[cut:] for i in ops]
    pieces = _fold_numbers(names, last=True)
    if len(pieces) > _MOST_PIECES:
        pieces = _fold_numbers(names, last=False)
    text = ", ".join(pieces) if len(pieces) <= _MOST_PIECES else f"{pieces[0]}, ..., {pieces[-1]}"
    return text if text.count(",") + 1 == len(ops) and "..." not in text else f"{text} ({len(ops)})"


def _common_module(names: Sequence[str]) -> str:
    """The longest `a/b/` that all names start with; "" for a single one, which keeps its name."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1] if first != last else ""


def _fold_numbers(names: Sequence[str], *, last: bool) -> list[str]:
    """Names that differ in one number as `first ... last`: in their last number, or in the first that differs.

    What comes after the number is left out.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)  # text and numbers in turn
        groups.setdefault((*parts[:-2], parts[-1]) if last else tuple(parts[::2]), []).append(parts)
    numbers: dict[str, set[int]] = {}  # by what comes before them; a name without is there by itself
    for group in groups.values():
        at = next((k for k in range(1, len(group[0]), 2) if len({parts[k] for parts in group}) > 1), None)
        for parts in group:
            found = numbers.setdefault("".join(parts[:at]), set())
            found |= {int(parts[at])} if at is not None else set()
    return [_join_numbers(prefix, sorted(found)) for prefix, found in numbers.items()]


def _join_numbers(prefix: str, numbers: Sequence[int]) -> str:
    """
    >>> _join_numbers("a/b_", [1, 2, 3]), _join_numbers("a/b_", [7]), _join_numbers("a/b", [])
    ('a/b_1 ... b_3', 'a/b_7', 'a/b')
    """
    if len(numbers) < 2:
        return prefix + "".join(map(str, numbers))
    between = ", " if len(numbers) == 2 else " ... "
    return f"{prefix}{numbers[0]}{between}{prefix[prefix.rfind('/') + 1 :]}{numbers[-1]}"
