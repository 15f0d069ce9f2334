"""The command line: plans from a file, and errors that name what is wrong in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from jaxpar.cli import main
from jaxpar.plan import OpGraph, PipelinePlan

FILE = """
import jax
import jax.numpy as jnp


def train_step(params, batch):
    def loss_fn(p):
        h = batch["x"]
        for name in "abcd":
            with jax.named_scope(name):
                h = jnp.tanh(h @ p[name])
        return jnp.mean(h)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def sorting_step(params, batch):
    return jax.grad(lambda p: jnp.sort(batch["x"] @ p["a"], axis=0)[0].sum())(params)


def example_args():
    params = {name: jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for name in "abcd"}
    return params, {"x": jax.ShapeDtypeStruct((64, 1024), jnp.float32)}


def not_a_tuple():
    return {}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train_for_cli.py"
    path.write_text(FILE)
    return str(path)


def run(capsys, *words):
    status = main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_plans_and_saves(file, tmp_path, capsys):
    words = ["--devices", 4, "--cluster", "v100", "--batch-size", 256, "--planner", "graphpipe"]
    saved = ["--save", tmp_path / "plan.json", "--graph", tmp_path / "graph.json"]
    status, out, err = run(capsys, f"{file}:train_step", *words, *saved, "--option", "microbatches=[64]")
    assert (status, err) == (0, "")
    assert "for 256 examples" in out
    assert "4 operators" in out
    assert "examples/s" in out
    plan = PipelinePlan.load(tmp_path / "plan.json")
    assert plan.batch_size == 256
    assert plan.microbatch == 64
    assert [op.name for op in plan.graph.ops] == list("abcd")
    assert OpGraph.load(tmp_path / "graph.json") == plan.graph
    assert plan.graph.device == "v100"


def test_given_times_count(file, tmp_path, capsys):
    table = tmp_path / "times.json"
    table.write_text(json.dumps({"a": [1.0, 1.0, 1.0], "b": [[[1, 0.5], [64, 2.0]], 0, 0]}))
    graph = tmp_path / "graph.json"
    words = ["--devices", 1, "--planner", "data_parallel", "--times", table, "--graph", graph]
    assert run(capsys, f"{file}:train_step", *words)[0] == 0
    seconds = OpGraph.load(graph).forward_seconds(64)
    assert seconds[:2].tolist() == [64.0, 2.0]


def test_compares_planners(file, capsys):
    status, out, _ = run(capsys, f"{file}:train_step", "--devices", 2, "--planner", "pipedream", "--compare")
    assert status == 0
    rows = {line.split()[0]: line.split()[6] for line in out.splitlines() if line.startswith(("pipedream ", "data_"))}
    assert rows["pipedream"] == "1.00"
    assert float(rows["data_parallel"]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}:train"], "has no 'train'; it has train_step, sorting_step, example_args, not_a_tuple"),
        (["{file}"], "write FILE:FUNCTION"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (["no_such_module:f"], "there is no module 'no_such_module'"),
        (["{file}:jax"], "is a module, not a function"),
        (["{file}:train_step", "--args", "shapes"], "has no 'shapes'; .* define `def example_args"),
        (["{file}:train_step", "--args", "not_a_tuple"], "gives a dict; it must be a tuple"),
        (["{file}:train_step", "--batch-size", "0"], "--batch-size is 0"),
        (["{file}:train_step", "--state-argnums", "x"], "--state-argnums is 'x'"),
        (["{file}:train_step", "--option", "fast"], "--option fast: write KEY=VALUE"),
        (["{file}:train_step", "--times", "{file}"], "can't be read: .*seconds per example"),
        (["{file}:train_step", "--planner", "gambler"], "gambler"),
        (["{file}:sorting_step"], "(?s)examples of the batch are coupled.*train_for_cli.py:19"),
    ],
)
def test_errors(file, capsys, words, message):
    status, _, err = run(capsys, *(word.format(file=file) for word in words), "--devices", 2)
    assert status == 1
    assert re.search(message, err), err
    assert err.startswith("error: ")


def test_runs_as_a_module_on_a_machine_without_the_devices(file):
    """A step that is decorated for a mesh of the devices to come."""
    decorated = (
        FILE
        + """

import jaxpar
train_step = jaxpar.parallelize(train_step, mesh=jax.make_mesh((16,), ("stage",)), num_microbatches=4)
"""
    )
    with open(file, "w") as f:
        f.write(decorated)
    words = [f"{file}:train_step", "--devices", "16", "--planner", "graphpipe"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": ""}
    command = [sys.executable, "-m", "jaxpar", "plan", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "of 16 devices" in done.stdout
