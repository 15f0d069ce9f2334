"""The command line: plan a training step with no device at hand, and print what would be done.

    python -m jaxpar plan train.py:train_step --devices 32 --cluster h100 --batch-size 512 --save plan.json

`train.py` has the step, decorated or not, and a function that says what it is called with:

    def example_args():
        state = jax.eval_shape(make_state)                               # shapes are enough
        batch = {"x": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
        return state, batch

Nothing is computed and no accelerator is touched, unless `--measure` is given.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxpar.arguments import Signature, read_arguments
from jaxpar.errors import JaxparError, PlanError
from jaxpar.measure import MeasuredCosts
from jaxpar.plan import DEVICES, PRESETS, ClusterSpec, OpGraph, PipelinePlan, TimeCurve, planners
from jaxpar.plan.analytic import AnalyticCosts
from jaxpar.plan.program_graph import replace_times
from jaxpar.planning import build_graph, read_signature
from jaxpar.text import format_table
from jaxpar.trace import abstract_args
from jaxpar.tracing import trace_step

ARGS = "example_args"
_COMPARED = ("graphpipe", "pipedream", "piper", "data_parallel")


def main(argv: Sequence[str] | None = None, *, own_process: bool = False) -> int:
    """Run a command.

    Args:
        argv: its words; those of the process by default.
        own_process: JAX has not been used yet and may be set up: to see no accelerator, and as many CPU devices as are
            planned for, since the step's file may make a mesh of them.

    Returns: the exit status: 0, or 1 after an error, which is printed.
    """
    options = _make_parser().parse_args(argv)
    if own_process and not options.measure:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(options.devices, 1))
    try:
        options.run(options)
    except JaxparError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxpar", description="Pipeline parallelism for JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="plan a training step, with no device", description=(__doc__ or "").strip())
    plan.formatter_class = argparse.RawDescriptionHelpFormatter
    add = plan.add_argument
    add("step", metavar="FILE:FUNCTION", help="the training step; FILE is a path, or the name of a module")
    add("--args", metavar="[FILE:]FUNCTION", help=f"returns the step's arguments or their shapes (default: {ARGS})")
    add("--devices", type=int, required=True, metavar="N", help="how many devices there will be")
    add(
        "--cluster", default="h100", choices=sorted(PRESETS), help="kind of device and its links (default: %(default)s)"
    )
    add("--node-size", type=int, metavar="N", help="devices in a node, if not as usual")
    add("--batch-size", type=int, metavar="B", help="examples in a step (default: as the arguments have it)")
    add("--planner", default="auto", help="default: %(default)s")
    add(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="for the planner; may be given several times"
    )
    add("--compare", action="store_true", help=f"also plan with {', '.join(_COMPARED)}")
    add("--max-blocks", type=int, default=256, metavar="N", help="operators to plan with (default: %(default)s)")
    add("--times", metavar="FILE", help='JSON {"operator or module": [F, I, W]}: seconds per example, or [[n, s], ...]')
    add("--measure", action="store_true", help="time the operators on the device that is there, for --cluster's links")
    add("--graph", metavar="FILE", help="write the graph of operators as JSON")
    add("--save", metavar="FILE", help="write the plan as JSON, for parallelize(plan=...)")
    add("--draw", metavar="FILE", help="draw the stage graph and the timetable (needs matplotlib)")
    for name, help_text in (("state", "training state"), ("batch", "one row per example"), ("static", "not arrays")):
        default = {"state": "0", "batch": "1", "static": ""}[name]
        add(
            f"--{name}-argnums",
            default=default,
            metavar="I,J",
            help=f"arguments that are {help_text} ({default or 'none'})",
        )
    plan.set_defaults(run=_run_plan)
    return parser


def _run_plan(options: argparse.Namespace) -> None:
    cluster = ClusterSpec.preset(options.cluster, options.devices, options.node_size)
    chosen = _read_options(options.option)
    signature, args = _load_step(options)
    start = time.perf_counter()
    traced = trace_step(read_arguments(signature, args))
    print(f"{traced.program}\ntraced in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    costs = MeasuredCosts(num_examples=traced.program.num_examples) if options.measure else None
    found = build_graph(traced, costs or AnalyticCosts(DEVICES[options.cluster]), max_blocks=options.max_blocks)
    graph = _use_times(found.graph, options.times) if options.times else found.graph
    how = "measured" if options.measure else "analytic"
    print(f"{found}; {how} times for {graph.device}, in {time.perf_counter() - start:.1f} s\n")
    if options.graph:
        graph.save(options.graph)
    batch_size = traced.program.num_examples
    plan = planners.plan(graph, cluster, batch_size, planner=options.planner, **chosen)
    print(plan)
    if options.draw:
        plan.draw(options.draw)
    if options.compare:
        print(f"\n{_compare(plan, planners.plan)}")
    if options.save:
        plan.save(options.save)
        print(f"\nsaved: {options.save}")


def _compare(plan: PipelinePlan, make: Callable[..., PipelinePlan]) -> str:
    """What the other planners would have done, in a table."""
    rows: list[tuple[str, ...]] = [
        ("planner", "stages", "depth", "micro-batch", "step ms", "examples/s", "against this", "search s")
    ]
    best = plan.predict().step_seconds
    found, failed = {plan.planner or "this": plan}, []
    for name in _COMPARED:
        try:
            found.setdefault(name, make(plan.graph, plan.cluster, plan.batch_size, planner=name))
        except PlanError as error:
            failed.append(f"{name}: no plan: {str(error).splitlines()[0]}")
    for name, each in found.items():
        forecast = each.predict()
        rows.append((
            name,
            str(len(each.stages)),
            str(max(each.depth)),
            str(each.microbatch),
            f"{forecast.step_seconds * 1e3:.4g}",
            f"{forecast.throughput:.4g}",
            f"{best / forecast.step_seconds:.2f}",
            f"{each.search_seconds:.2g}",
        ))  # fmt: skip
    return "\n".join([format_table(rows), *failed])


# -- what the user named -----------------------------------------------------------------------------------------------


def _load_step(options: argparse.Namespace) -> tuple[Signature, tuple[Any, ...]]:
    """The step's signature, and the shapes of its arguments with `--batch-size` examples."""
    module, fun = _find(options.step, "the step")
    if not callable(fun):
        raise PlanError(f"{options.step} is a {type(fun).__name__}, not a function.")
    where = options.args or ARGS
    try:
        _, maker = _find(where, "its arguments", module)
    except PlanError as error:
        raise PlanError(
            f"{error} Planning needs the shapes of the step's arguments: define `def {ARGS}(): return state, batch` "
            f"beside it, with arrays or jax.ShapeDtypeStructs, or name another function with --args."
        ) from error
    args = maker() if callable(maker) else maker
    if not isinstance(args, tuple | list):
        raise PlanError(f"{where} gives a {type(args).__name__}; it must be a tuple of the step's arguments.")
    numbers = {key: _read_numbers(key, getattr(options, f"{key}_argnums")) for key in ("state", "batch", "static")}
    signature = read_signature(fun, numbers["state"], numbers["batch"], numbers["static"])
    full = signature.normalise(args, {})
    shapes = [a if i in signature.static_argnums else _shapes_of(a) for i, a in enumerate(full)]
    if options.batch_size is not None:
        if options.batch_size < 1:
            raise PlanError(f"--batch-size is {options.batch_size}; it must be at least 1.")
        for i in signature.batch_argnums:
            shapes[i] = jax.tree.map(lambda x: _with_rows(x, options.batch_size), shapes[i])
    return signature, tuple(shapes)


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: abstract_args(x) if hasattr(x, "dtype") or isinstance(x, int | float) else x, tree)


def _with_rows(x: Any, count: int) -> Any:
    return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) if getattr(x, "shape", ()) else x


def _find(name: str, what: str, beside: ModuleType | None = None) -> tuple[ModuleType, Any]:
    """The module and the object that `FILE:FUNCTION` is; `FUNCTION` alone is in the module `beside`."""
    file, colon, path = name.rpartition(":")
    if not colon and beside is None:
        raise PlanError(f"{name!r} doesn't say where {what} is: write FILE:FUNCTION, such as train.py:train_step.")
    module = _import(file) if colon else beside
    assert module is not None
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            mine = [key for key in names if getattr(getattr(module, key), "__module__", "") == module.__name__] or names
            raise PlanError(f"{module.__file__} has no {path!r}; it has {', '.join(mine) or 'no functions'}.")
        found = getattr(found, part)
    return module, found


def _import(file: str) -> ModuleType:
    path = Path(file)
    if path.suffix != ".py":
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(file)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{file}.".startswith(f"{error.name}."):
                raise  # of something that the module imports
            raise PlanError(f"there is no module {file!r}; a file's name ends in .py.") from error
    if not path.exists():
        raise PlanError(f"there is no file {file}.")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _read_numbers(what: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise PlanError(f"--{what}-argnums is {text!r}; write numbers of arguments, such as 0,1.") from error


def _read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE`s, the values as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise PlanError(f"--option {pair}: write KEY=VALUE.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def _use_times(graph: OpGraph, file: str) -> OpGraph:
    """The graph with the times of a user's table."""
    try:
        table = json.loads(Path(file).read_text())
        times = {name: [_read_time(t) for t in given] for name, given in table.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(
            f"--times {file} can't be read: {error}. It holds JSON: "
            '{"operator or module": [F, I, W]}, each seconds per example, or points [[examples, seconds], ...].'
        ) from error
    return replace_times(graph, times)


def _read_time(given: Any) -> TimeCurve | float:
    return TimeCurve(tuple((n, t) for n, t in given)) if isinstance(given, list) else float(given)
