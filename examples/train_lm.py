#!/usr/bin/env python3
"""Trains a GPT on the text of Python's standard library, byte by byte, on a pipeline.

    python examples/train_lm.py                        4 stages x 2 replicas on eight emulated CPU devices
    python examples/train_lm.py --undecorated          the same script on one device
    python examples/train_lm.py --stages 8 --data 1 --schedule gpipe
    python examples/train_lm.py --devices real         on the devices that JAX finds

The model and `train_step` are written for one device. `parallelize_step` holds all that the pipeline asks for.
"""

from __future__ import annotations

import argparse
import csv
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import jaxpar

VOCAB = 256  # a token is a byte


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a residual connection."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, dim = x.shape
        qkv = nn.Dense(3 * dim, use_bias=False, name="qkv")(nn.LayerNorm()(x))
        q, k, v = jnp.split(qkv.reshape(batch, length, self.heads, -1), 3, axis=-1)  # [B, T, H, D/H]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(dim // self.heads)
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        x = x + nn.Dropout(self.dropout, deterministic=False)(nn.Dense(dim, name="out")(y))
        y = nn.Dense(dim, name="down")(nn.gelu(nn.Dense(4 * dim, name="up")(nn.LayerNorm()(x))))
        return x + nn.Dropout(self.dropout, deterministic=False)(y)


class GPT(nn.Module):
    """tokens[B, T] -> logits[B, T, VOCAB]; the embedding is also the last layer."""

    dim: int
    heads: int
    num_layers: int
    dropout: float

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        embed = nn.Embed(VOCAB, self.dim, embedding_init=nn.initializers.normal(0.02), name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (length, self.dim))
        x = nn.Dropout(self.dropout, deterministic=False)(embed(tokens) + position)
        mask = jnp.tril(jnp.ones((length, length), bool))
        for i in range(self.num_layers):
            x = Block(self.heads, self.dropout, name=f"block_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class TrainState(train_state.TrainState):
    """Parameters, optimizer state, and the key that dropout starts from."""

    dropout_key: jax.Array


def init_state(args: argparse.Namespace) -> TrainState:
    """The state before the first step: the same for the same arguments."""
    model = GPT(args.dim, args.dim // 32, args.layers, args.dropout)
    tokens = jnp.zeros((1, args.length), jnp.int32)
    params_key, dropout_key = jax.random.split(jax.random.key(args.seed))
    params = jax.jit(model.init)({"params": params_key, "dropout": dropout_key}, tokens)["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx, dropout_key=dropout_key)


def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on `batch`, as on one device: tokens and targets [B, T]."""
    dropout_key = jax.random.fold_in(state.dropout_key, state.step)

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, batch["tokens"], rngs={"dropout": dropout_key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def parallelize_step(args: argparse.Namespace) -> Any:
    """`train_step` on a mesh of `args.stages` x `args.data` devices."""
    devices = jax.devices()[: args.stages * args.data]
    mesh = jax.make_mesh((args.stages, args.data), ("stage", "data"), devices=devices)
    return jaxpar.parallelize(train_step, mesh=mesh, num_microbatches=args.microbatches, schedule=args.schedule)


def read_text() -> np.ndarray:
    """The modules of Python's standard library, one after the other, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        sys.exit("This Python has no source files in its standard library to train on.")
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)


def make_batches(args: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """Windows of the text at random places: the same in each run."""
    text = read_text().astype(np.int32)
    rng = np.random.default_rng(args.seed)
    while True:
        starts = rng.integers(0, text.size - args.length - 1, (args.batch_size, 1))
        windows = text[starts + np.arange(args.length + 1)]  # [B, T + 1]
        yield {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line every few seconds."""

    def __init__(self, steps: int, tokens_per_step: int):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.live = sys.stdout.isatty()
        self.start = self.printed = time.perf_counter()

    def show(self, done: int, loss: float) -> None:
        """After `done` steps; the first one, which compiles, is left out of the speed."""
        now = time.perf_counter()
        if done == 1:
            print(f"first step, with its compilation: {now - self.start:.1f} s, loss {loss:.3f}", flush=True)
            self.start = self.printed = now
            return
        if not self.live and done < self.steps and now - self.printed < 10:
            return
        self.printed = now
        seconds = (now - self.start) / (done - 1)
        line = (
            f"step {done:4d}/{self.steps}  loss {loss:.3f}  {seconds:.2f} s/step  "
            f"{self.tokens_per_step / seconds:,.0f} tokens/s  {seconds * (self.steps - done):.0f} s left"
        )
        print(f"\r{line}\033[K" if self.live else line, end="" if self.live and done < self.steps else "\n", flush=True)


def train(
    step: Callable[..., Any],
    state: Any,
    batches: Iterator[Any],
    args: argparse.Namespace,
    after_step: Callable[[list[float], Any], None] = lambda losses, state: None,
) -> list[float]:
    """`args.steps` steps; returns the losses. `after_step(losses, state)` sees what each one left."""
    losses = []
    progress = Progress(args.steps, args.batch_size * args.length)
    for done in range(1, args.steps + 1):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
        progress.show(done, losses[-1])
        after_step(losses, state)
    return losses


def run_undecorated(state: TrainState, args: argparse.Namespace) -> None:
    """The whole training on one device."""
    losses = train(jax.jit(train_step, donate_argnums=0), state, make_batches(args), args)
    write_losses(args.out / "loss_undecorated.csv", losses)


def run_pipelined(state: TrainState, args: argparse.Namespace) -> None:
    """The whole training on the mesh; its first steps are compared with the undecorated ones."""
    step = parallelize_step(args)
    first_batch = next(make_batches(args))
    plan = f"{step.explain(state, first_batch)}\n"
    print(f"\n{plan}")
    (args.out / "plan.txt").write_text(plan)
    step.timetable(state, first_batch).draw(args.out / "timetable.png")
    print(f"timetable: {args.out / 'timetable.png'}")
    expected_losses, expected_state = first_undecorated_steps(state, args)

    def compare(losses: list[float], placed: Any) -> None:
        if len(losses) == args.compare_steps:
            report_difference(losses, expected_losses, step.gather(placed), expected_state)

    losses = train(step, step.place(state), make_batches(args), args, compare)
    write_losses(args.out / "loss.csv", losses)


def first_undecorated_steps(state: TrainState, args: argparse.Namespace) -> tuple[list[float], TrainState]:
    """The losses of the first `args.compare_steps` steps on one device, and the state after them."""
    losses = []
    step = jax.jit(train_step)
    for _, batch in zip(range(args.compare_steps), make_batches(args), strict=False):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def report_difference(
    losses: list[float], expected_losses: list[float], state: TrainState, expected: TrainState
) -> None:
    """Prints two runs' losses, and the largest difference of a parameter relative to its norm."""

    def relative(path: Any, a: jax.Array, e: jax.Array) -> tuple[float, str]:
        difference, size = float(np.linalg.norm(np.asarray(a) - np.asarray(e))), float(np.linalg.norm(np.asarray(e)))
        return difference / max(size, 1e-30), jax.tree_util.keystr(path)

    print("\nstep  pipelined  undecorated  difference")
    for i, (loss, expected_loss) in enumerate(zip(losses, expected_losses, strict=True), start=1):
        print(f"{i:4d}  {loss:9.6f}  {expected_loss:11.6f}  {loss - expected_loss:+10.1e}")
    differences = jax.tree_util.tree_map_with_path(relative, state.params, expected.params)
    worst, name = max(jax.tree.leaves(differences, is_leaf=lambda x: isinstance(x, tuple)))
    print(f"largest relative difference of a parameter after these steps: {worst:.1e}, {name}\n", flush=True)


def write_losses(path: Path, losses: list[float]) -> None:
    """One row per step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(losses, start=1))
    print(f"losses: {path}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--undecorated", action="store_true", help="plain jax.jit on one device")
    parser.add_argument("--devices", choices=["emulated", "real"], default="emulated")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--data", type=int, default=2, help="data-parallel replicas of each stage")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--schedule", default="1f1b", help="gpipe, zb_h1, zb_v, auto, ...; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare-steps", type=int, default=3, help="steps to compare with the undecorated step")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the losses and pictures go")
    args = parser.parse_args()
    if not args.undecorated and args.batch_size % (args.microbatches * args.data):
        parser.error(
            f"--batch-size {args.batch_size} is not a multiple of "
            f"--microbatches {args.microbatches} x --data {args.data}"
        )
    return args


def main() -> None:
    """Sets up the devices, then trains."""
    args = parse_args()
    wanted = 1 if args.undecorated else args.stages * args.data
    if args.devices == "emulated":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", wanted)
    found = jax.devices()
    if len(found) < wanted:
        sys.exit(f"{args.stages} stages x {args.data} replicas need {wanted} devices; JAX finds {len(found)}: {found}")
    args.out.mkdir(parents=True, exist_ok=True)

    state = init_state(args)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"model: {size / 1e6:.1f} million parameters, {args.layers} layers; {wanted} x {found[0].device_kind}")
    print(
        f"data: {read_text().size / 1e6:.1f} million bytes of Python's standard library, batches of {args.batch_size}"
    )
    (run_undecorated if args.undecorated else run_pipelined)(state, args)


if __name__ == "__main__":
    main()
