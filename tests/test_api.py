"""The public surface: the decorator, its arguments, placed state, and what can be looked at without running."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax.training import train_state
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpar
from tests.equality.grid import small_case
from tests.oracle import assert_same, run_reference, run_steps, to_host
from tests.zoo import BAD_CASES, CASES
from tests.zoo.mlp import init_mlp, regression_batch, sgd, squared_errors

WIDTHS = [12, 12, 12, 4]
MESH_SHAPE = {"stage": 2, "data": 2}
OPTIMIZER = optax.adam(1e-2)


def make_mesh(shape=MESH_SHAPE):
    size = int(np.prod(list(shape.values())))
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:size])


def make_params(key=None):
    return init_mlp(jax.random.key(0) if key is None else key, WIDTHS)


def make_batch(size=16, seed=0):
    return regression_batch(WIDTHS[0])(size, seed)


def train_step(params, batch):
    loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
    return sgd(params, grads), loss


def adam_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def eval_step(params, batch):
    errors = squared_errors(params, batch)
    return {"loss": errors.mean(), "errors": errors}


def parallelize(step=train_step, *, num_microbatches=4, mesh=None, **options):
    return jaxpar.parallelize(step, mesh=mesh or make_mesh(), num_microbatches=num_microbatches, **options)


def num_builds(step):
    """For how many kinds of arguments the step was traced, planned and compiled."""
    return len(step._built)


def as_shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


# -- the decorator and the arguments ----------------------------------------------------------------------------------


def test_decorator_with_arguments():
    @jaxpar.parallelize(mesh=make_mesh(), num_microbatches=4)
    def my_step(params, batch):
        """Its own words."""
        return train_step(params, batch)

    assert (my_step.__name__, my_step.__doc__) == ("my_step", "Its own words.")
    assert "my_step" in repr(my_step)
    assert "2 stage x 2 data" in repr(my_step)
    params, batch = make_params(), make_batch()
    new_params, loss = my_step(params, batch)
    expected_params, expected_loss = jax.jit(my_step.__wrapped__)(params, batch)
    assert_same(loss, expected_loss)
    assert_same(my_step.gather(new_params), expected_params)


def test_decorator_without_arguments_of_its_own():
    step = jaxpar.parallelize(train_step, mesh=make_mesh(), num_microbatches=4)
    assert isinstance(step, jaxpar.PipelinedStep)
    assert_same(step(make_params(), make_batch())[1], jax.jit(train_step)(make_params(), make_batch())[1])


def test_arguments_by_name_and_defaults():
    def scaled(params, batch, scale=1.0):
        params, loss = train_step(params, batch)
        return params, loss * scale

    step, params, batch = parallelize(scaled), make_params(), make_batch()
    loss = step(params, batch)[1]
    assert_same(step(params, batch=batch)[1], loss)
    assert_same(step(batch=batch, params=params)[1], loss)
    assert_same(step(params, batch, 3.0)[1], 3.0 * loss)
    assert_same(step(params, batch, scale=3.0)[1], 3.0 * loss)


def test_keyword_only_arguments_keep_their_defaults():
    def scaled(params, batch, *, scale=2.0):
        params, loss = train_step(params, batch)
        return params, loss * scale

    step, params, batch = parallelize(scaled), make_params(), make_batch()
    assert_same(step(params=params, batch=batch)[1], step(params, batch)[1])
    with pytest.raises(jaxpar.TraceError, match="keyword-only arguments \\(scale\\)"):
        step(params, batch, scale=1.0)


def test_static_arguments():
    traced = []

    def step(params, batch, power, name):
        traced.append((power, name))
        errors = squared_errors(params, batch)
        return {name: (errors**power).mean()}

    pipelined = parallelize(step, static_argnums=(2, 3))
    params, batch = make_params(), make_batch()
    for power, name in ((1, "a"), (2, "b"), (1, "a")):
        output = pipelined(params, batch, power, name)
        assert list(output) == [name]
        assert_same(output[name], (squared_errors(params, batch) ** power).mean())
    assert num_builds(pipelined) == 2
    assert set(traced) == {(1, "a"), (2, "b")}


def test_a_new_value_of_another_argument_is_no_new_program():
    step = parallelize(lambda params, batch, rate: (sgd(params, jax.grad(mean_error)(params, batch), rate), rate))
    params, batch = make_params(), make_batch()
    for rate in (0.1, 0.2):
        got, same = step(params, batch, rate)
        assert_same(step.gather(got), sgd(params, jax.jit(jax.grad(mean_error))(params, batch), rate))
        assert float(same) == rate
    assert num_builds(step) == 1


def mean_error(params, batch):
    return squared_errors(params, batch).mean()


def test_numbers_of_arguments_in_any_order():
    def step(rate, batch, params):
        loss, grads = jax.value_and_grad(mean_error)(params, batch)
        return loss, sgd(params, grads, rate)

    pipelined = parallelize(step, state_argnums=2, batch_argnums=1)
    params, batch = make_params(), make_batch()
    loss, placed = pipelined(0.1, batch, params)
    assert_same((loss, pipelined.gather(placed)), jax.jit(step)(0.1, batch, params))


def test_two_batch_arguments():
    step = parallelize(lambda params, x, y: mean_error(params, {"x": x, "y": y}), batch_argnums=(1, 2))
    params, batch = make_params(), make_batch()
    assert_same(step(params, batch["x"], batch["y"]), mean_error(params, batch))


def test_batches_of_any_kind_of_array():
    step, params, batch = parallelize(), make_params(), make_batch()
    mesh = make_mesh()
    kinds = {
        "numpy": batch,
        "jax": jax.tree.map(jnp.asarray, batch),
        "on another device": jax.device_put(batch, jax.devices()[5]),
        "sharded": jax.device_put(batch, NamedSharding(mesh, P("data"))),
        "sharded in another way": jax.device_put(batch, NamedSharding(mesh, P("stage"))),
        "sharded over another mesh": jax.device_put(batch, NamedSharding(jax.make_mesh((8,), ("all",)), P("all"))),
    }
    losses = {name: float(step(params, kind)[1]) for name, kind in kinds.items()}
    assert len(set(losses.values())) == 1, losses
    assert num_builds(step) == 1


def test_a_scalar_in_the_batch_is_shared():
    """A leaf of the batch without dimensions has no rows: every example sees it."""
    case = BAD_CASES["batch_of_scalars"]() if "batch_of_scalars" in BAD_CASES else CASES["batch_of_scalars"]()
    step = parallelize(case.step)
    placed, outputs = run_steps(case, step, case.state, 2)
    assert_same(outputs, run_reference(case, 2).outputs)
    assert_same(step.gather(placed), run_reference(case, 2).state)


def test_another_batch_size_with_the_same_state():
    """The state stays where it is; a program is made for each size."""
    step, reference = parallelize(), jax.jit(train_step)
    params = expected = make_params()
    for seed, size in enumerate((16, 32, 8, 16)):
        batch = make_batch(size, seed)
        params, loss = step(params, batch)
        expected, expected_loss = reference(expected, batch)
        assert_same(loss, expected_loss)
    assert_same(step.gather(params), expected)
    assert num_builds(step) == 3


def test_outputs_keep_their_structure():
    class Output(NamedTuple):
        metrics: Any
        nothing: None
        state: Any

    def step(params, batch):
        new_params, loss = train_step(params, batch)
        errors = squared_errors(params, batch)
        return [Output({"loss": loss, "none": None, "one": 1.0}, None, new_params), (errors, batch["x"][:, 0], ())]

    pipelined = parallelize(step)
    params, batch = make_params(), make_batch()
    (output, (errors, column, empty)) = pipelined(params, batch)
    assert isinstance(output, Output)
    assert isinstance(output.state, jaxpar.PlacedState)
    expected = jax.jit(step)(params, batch)
    actual = [output._replace(state=pipelined.gather(output.state)), (errors, column, empty)]
    assert_same(actual, expected)


# -- states -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    params: Any
    count: Any


@flax.struct.dataclass
class Struct:
    params: Any
    count: Any
    name: str = flax.struct.field(pytree_node=False, default="a name")


def dict_state(params, count):
    return {"params": params, "count": count}


@pytest.mark.parametrize("make", [Pair, Struct, dict_state, lambda p, c: (p, c), lambda p, c: [c, p]])
def test_states_of_any_tree(make):
    """With a Python number for a leaf: the second call, with the array that it became, is no new program."""

    def step(state, batch):
        if isinstance(state, dict):
            params, count = state["params"], state["count"]
        elif isinstance(state, Pair | Struct):
            params, count = state.params, state.count
        else:
            params, count = sorted(state, key=lambda x: not isinstance(x, list))
        params, loss = train_step(params, batch)
        return make(params, count + 1), loss

    pipelined, reference = parallelize(step), jax.jit(step)
    state = expected = make(make_params(), 0)
    for seed in range(3):
        state, loss = pipelined(state, make_batch(seed=seed))
        expected, expected_loss = reference(expected, make_batch(seed=seed))
        assert_same(loss, expected_loss)
    assert_same(jax.tree.map(jnp.asarray, pipelined.gather(state)), jax.tree.map(jnp.asarray, expected))
    assert num_builds(pipelined) == 1


def test_a_bare_array_is_a_state():
    def step(w, x):
        loss, grad = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2))(w)
        return w - 0.1 * grad, loss

    w, x = jnp.eye(12) + 0.1, make_batch()["x"]
    pipelined = parallelize(step)
    placed, loss = pipelined(w, x)
    assert_same((pipelined.gather(placed), loss), jax.jit(step)(w, x))


def test_several_state_arguments():
    step, reference = parallelize(adam_step, state_argnums=(0, 1), batch_argnums=(2,)), jax.jit(adam_step)
    params = make_params()
    expected = (params, OPTIMIZER.init(params))
    placed = step.place(*expected)
    for seed in range(3):
        *placed, loss = step(*placed, make_batch(seed=seed))
        *expected, expected_loss = reference(*expected, make_batch(seed=seed))
        assert_same(loss, expected_loss)
    assert_same(list(step.gather(*placed)), list(expected))
    assert_same(list(step.gather(*step.place(*expected))), list(expected))
    moments = {leaf.name: leaf.rank for leaf in placed[1].layout.leaves}
    owners = {leaf.name: leaf.rank for leaf in placed[0].layout.leaves}
    for name, rank in owners.items():
        path = name.removeprefix("params")
        assert moments[f"opt_state[0].mu{path}"] == moments[f"opt_state[0].nu{path}"] == rank


def test_a_state_that_is_only_read_is_not_donated():
    def step(params, frozen, batch):
        loss_fn = lambda p: mean_error(jax.tree.map(jnp.add, p, frozen), batch)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        return sgd(params, grads), loss

    pipelined = parallelize(step, state_argnums=(0, 1), batch_argnums=2)
    params, frozen = make_params(), jax.tree.map(lambda x: 0.1 * x, make_params())
    batch = make_batch()
    pipelined.plan(params, frozen, batch)
    placed, placed_frozen = pipelined.place(params, frozen)
    new, _ = pipelined(placed, placed_frozen, batch)
    assert placed.is_deleted
    assert not placed_frozen.is_deleted
    expected, _ = jax.jit(step)(params, frozen, batch)
    assert_same(pipelined(new, placed_frozen, batch)[1], jax.jit(step)(expected, frozen, batch)[1])


def test_unplaced_state_is_placed():
    """A call with the user's own state is allowed, and leaves that state alone."""
    step, params, batch = parallelize(), make_params(), make_batch()
    before = to_host(params)
    first, second = step(params, batch), step(params, batch)
    assert_same(step.gather(first[0]), step.gather(second[0]))
    assert_same(params, before)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", [np.array, jnp.array])
@pytest.mark.parametrize("shape", [{"stage": 1}, {"stage": 2}], ids=str)
def test_the_users_arrays_are_never_written(kind, shape):
    """Also where a device could use their memory as it is, and donation would write there."""
    width = 64  # large and aligned enough for that
    params = jax.tree.map(kind, init_mlp(jax.random.key(0), [width] * 4))
    batch = regression_batch(width, width)(16, 0)
    before = to_host(params)
    step = parallelize(mesh=make_mesh(shape))
    for _ in range(2):
        placed = step.place(params)
        for _ in range(2):
            placed, _ = step(placed, batch)
    assert_same(params, before)


def test_new_state_is_found_where_it_is():
    """Not the gradients, which have the same tree."""

    def step(params, batch):
        loss, grads = jax.value_and_grad(mean_error)(params, batch)
        return {"gradients": grads, "loss": loss, "new": sgd(params, grads)}

    output = parallelize(step)(make_params(), make_batch())
    assert isinstance(output["new"], jaxpar.PlacedState)
    assert not isinstance(output["gradients"], jaxpar.PlacedState)


def test_new_state_by_hand():
    """Two outputs could be it: the user says which."""

    def step(params, batch):
        new_params, loss = train_step(params, batch)
        return new_params, jax.tree.map(lambda p, q: 0.5 * (p + q), params, new_params), loss

    params, batch = make_params(), make_batch()
    expected = jax.jit(step)(params, batch)
    for k in (0, 1):
        pipelined = parallelize(step, new_state=lambda output, k=k: output[k])
        output = list(pipelined(params, batch))
        assert [isinstance(x, jaxpar.PlacedState) for x in output[:2]] == [k == 0, k == 1]
        output[k] = pipelined.gather(output[k])
        assert_same(tuple(output), expected)


def test_no_new_state():
    """Then nothing is donated, and all outputs are the user's."""
    step, params, batch = parallelize(new_state=None), make_params(), make_batch()
    step.plan(params, batch)
    placed = step.place(params)
    output = step(placed, batch)
    assert not placed.is_deleted
    assert_same(output, jax.jit(train_step)(params, batch))


# -- place, gather, init ----------------------------------------------------------------------------------------------


def test_place_and_gather():
    step, params, batch = parallelize(), make_params(), make_batch()
    pending = step.place(params)
    assert isinstance(pending, jaxpar.PendingState)
    assert_same(step.gather(pending), params)
    step.plan(params, batch)
    placed = step.place(params)
    assert isinstance(placed, jaxpar.PlacedState)
    assert_same(step.gather(placed), params)
    assert step.place(placed) is placed
    assert_same(step.gather(step.place(pending)), params)
    assert_same(step(pending, batch)[1], step(placed, batch)[1])


def test_placed_state_is_spread_over_the_ranks():
    """Each rank has its own rows of the buffers, and hardly more than its own leaves."""
    case = small_case("gpt")
    step = parallelize(case.step, mesh=make_mesh({"stage": 4, "data": 2}))
    step.plan(case.state, case.batch)
    placed = step.place(case.state)
    whole = sum(np.asarray(x).nbytes for x in jax.tree.leaves(case.state.params)) * 3  # with the moments
    for buffer in placed.buffers:
        assert buffer.sharding.spec[0] == "stage"
        assert {shard.data.shape[0] for shard in buffer.addressable_shards} == {1}
    per_device = sum(buffer.addressable_shards[0].data.nbytes for buffer in placed.buffers)
    assert per_device <= 1.1 * max(placed.layout.rank_bytes) < 0.5 * whole
    assert sum(placed.layout.rank_bytes) == whole


def test_placed_state_says_what_it_is():
    step, params = parallelize(), make_params()
    step.plan(params, make_batch())
    placed = step.place(params)
    assert repr(placed).startswith(f"PlacedState({len(jax.tree.leaves(params))} leaves on 2 stage x 2 data")
    assert "placed at the first step" in repr(parallelize().place(params))
    step(placed, make_batch())
    assert "given away to a step" in repr(placed)


def test_placed_state_is_a_pytree():
    step, params, batch = parallelize(), make_params(), make_batch()
    step.plan(params, batch)
    placed = step.place(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(placed)]
    assert names == [f".buffers[{i}]" for i in range(len(placed.buffers))]
    copied = jax.tree.map(jnp.copy, placed)
    step(placed, batch)
    assert_same(step.gather(copied), params)
    assert_same(step(copied, batch)[1], train_step(params, batch)[1])


def make_train_state(key):
    """As users of Flax make theirs: `step` is a Python number."""
    return train_state.TrainState.create(apply_fn=None, params=make_params(key), tx=OPTIMIZER)


def flax_step(state, batch):
    loss, grads = jax.value_and_grad(mean_error)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


def test_init_is_place_of_the_initial_state():
    step, key, batch = parallelize(flax_step), jax.random.key(3), make_batch()
    pending = step.init(make_train_state, key)
    assert isinstance(pending, jaxpar.PendingState)
    created, loss = step(pending, batch)
    placed, same = step(step.place(make_train_state(key)), batch)
    assert_same(loss, same)
    assert_same(step.gather(created), step.gather(placed))
    assert num_builds(step) == 1
    created, placed = step.init(make_train_state, key), step.place(make_train_state(key))
    assert isinstance(created, jaxpar.PlacedState)
    assert created.layout == placed.layout
    assert_same(step.gather(created), step.gather(placed))
    for a, b in zip(created.buffers, placed.buffers, strict=True):
        assert a.sharding == b.sharding


def test_init_never_makes_the_whole_state_on_one_device():
    """Each device gets its own rows of the buffers, an eighth of them."""
    width, depth = 128, 16
    init = lambda key: init_mlp(key, [width] * (depth + 1))
    whole = depth * width * width * 8
    step = parallelize(mesh=make_mesh({"stage": 8}))
    step.plan(jax.eval_shape(init, jax.random.key(0)), regression_batch(width, width)(16, 0))
    created = step.init(init, jax.random.key(0))
    for buffer in created.buffers:
        assert buffer.sharding.spec[0] == "stage"
        assert {shard.data.nbytes for shard in buffer.addressable_shards} == {buffer.nbytes // 8}
    assert sum(b.addressable_shards[0].data.nbytes for b in created.buffers) < whole / 4
    assert_same(step.gather(created), init(jax.random.key(0)), rtol=1e-12)


def test_init_of_several_states():
    step = parallelize(adam_step, state_argnums=(0, 1), batch_argnums=(2,))

    def init(key):
        params = make_params(key)
        return params, OPTIMIZER.init(params)

    key, batch = jax.random.key(1), make_batch()
    params, opt_state, loss = step(*step.init(init, key), batch)
    assert_same([*step.gather(params, opt_state), loss], list(jax.jit(adam_step)(*init(key), batch)))
    assert_same(list(step.gather(*step.init(init, key))), list(init(key)), rtol=1e-12)


def test_init_with_keys_and_integers():
    case = CASES["integers_and_keys"]()
    step = parallelize(case.step)
    init = lambda key: case.state | {"key": key, "step": jnp.int32(7)}
    step.plan(case.state, case.batch)
    created = step.init(init, jax.random.key(11))
    assert_same(step.gather(created), init(jax.random.key(11)))


# -- donation ---------------------------------------------------------------------------------------------------------


def test_placed_state_is_donated():
    step, batch = parallelize(), make_batch()
    first, _ = step(make_params(), batch)
    second, _ = step(first, batch)
    assert first.is_deleted
    assert not second.is_deleted
    with pytest.raises(jaxpar.LowerError, match="params was donated"):
        step(first, batch)
    with pytest.raises(jaxpar.LowerError, match="donated"):
        step.gather(first)
    step(second, batch)  # nothing happened to this one


def test_without_donation_the_old_state_stays():
    step, batch = parallelize(donate=False), make_batch()
    first, _ = step(make_params(), batch)
    second, _ = step(first, batch)
    again, _ = step(first, batch)
    assert not first.is_deleted
    assert_same(step.gather(second), step.gather(again))


# -- evaluation beside training ---------------------------------------------------------------------------------------


def test_evaluation_reads_the_state_where_training_placed_it():
    train = parallelize()
    evaluate = parallelize(eval_step, state_of=train, num_microbatches=2)
    params, batch = make_params(), make_batch()
    placed, _ = train(params, batch)
    output = evaluate(placed, batch)
    expected_params, _ = jax.jit(train_step)(params, batch)
    assert_same(output, jax.jit(eval_step)(expected_params, batch))
    assert not placed.is_deleted
    assert evaluate(placed, make_batch(8))["errors"].shape == (8,)
    assert_same(evaluate.gather(placed), expected_params)
    placed, loss = train(placed, batch)  # it goes on
    assert_same(loss, jax.jit(train_step)(expected_params, batch)[1])
    assert_same(evaluate(params, batch), jax.jit(eval_step)(params, batch))


def test_evaluation_of_a_model_with_tied_parameters():
    """The embedding is read by the first stage and by the last one, and lies with one of them."""
    case = small_case("gpt")

    def evaluate(state, batch):
        logits = state.apply_fn({"params": state.params}, batch["tokens"], deterministic=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return {"loss": (losses * batch["weights"]).sum() / batch["weights"].sum(), "best": logits.argmax(-1)}

    mesh = make_mesh({"stage": 4, "data": 2})
    train = parallelize(case.step, mesh=mesh)
    pipelined = parallelize(evaluate, mesh=mesh, state_of=train)
    placed, _ = train(case.state, case.batch)
    assert_same(pipelined(placed, case.batch), jax.jit(evaluate)(train.gather(placed), case.batch))
    assert not placed.is_deleted


def test_planning_the_training_step_is_enough_for_evaluation():
    train = parallelize()
    evaluate = parallelize(eval_step, state_of=train)
    params, batch = make_params(), make_batch()
    with pytest.raises(jaxpar.JaxparError, match=r"train_step\.plan"):
        evaluate(params, batch)
    train.plan(params, batch)
    assert_same(evaluate(train.place(params), batch), jax.jit(eval_step)(params, batch))


# -- looking inside, ahead of time ------------------------------------------------------------------------------------


def test_everything_can_be_looked_at_without_arrays():
    step = parallelize(flax_step)
    shapes = as_shapes((jax.eval_shape(make_train_state, jax.random.key(0)), make_batch()))
    printed = [str(look(*shapes)) for look in (step.trace, step.plan, step.timetable, step.memory, step.explain)]
    program, plan, timetable, memory, explained = printed
    assert program.startswith("Program:")
    assert plan.startswith("Plan: 2 stages")
    assert timetable.startswith("1f1b  microbatches=4")
    for text in (program, plan):
        assert text in explained
    assert memory
    assert num_builds(step) == 1
    for text in printed:
        assert max(map(len, text.splitlines())) < 200


def test_looking_at_what_ran():
    """Without arguments: of the last call."""
    step = parallelize()
    with pytest.raises(jaxpar.JaxparError, match="train_step has not run yet"):
        step.explain()
    step(make_params(), make_batch())
    assert step.plan().microbatch == 2
    step.plan(make_params(), make_batch(32))
    assert step.plan().microbatch == 4


def test_compiled_ahead_of_time():
    step, params, batch = parallelize(flax_step), make_train_state(jax.random.key(0)), make_batch()
    lowered = step.lower(*as_shapes((params, batch)))
    assert len(repr(lowered)) < 200
    assert "stablehlo" in lowered.as_text()
    assert lowered.num_programs <= 4
    compiled = lowered.compile()
    assert "HloModule" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    assert compiled.cost_analysis()
    state, loss = compiled(step.place(params), batch)
    expected, expected_loss = jax.jit(flax_step)(params, batch)
    assert_same((step.gather(state), loss), (jax.tree.map(jnp.asarray, expected), expected_loss))
    state, loss = compiled(state, batch)
    assert_same(loss, jax.jit(flax_step)(expected, batch)[1])


def test_compiled_once():
    """Ahead of time, at the first call and the next, for arrays of NumPy and of JAX: one program."""
    step, batch = parallelize(), make_batch()
    compiled = step.lower(make_params(), batch).compile().compiled
    params, _ = step(make_params(), batch)
    params, _ = step(params, batch)
    step(params, jax.tree.map(jnp.asarray, batch))
    assert list(step._compiled.values()) == [compiled]


def test_inside_a_jitted_function():
    """A loop over batches: the pipelined step is traced into it."""
    step, params, batch = parallelize(), make_params(), make_batch()
    batches = jax.tree.map(lambda x: np.stack([x, 2 * x]), batch)
    expected, losses = jax.lax.scan(train_step, params, batches)
    train = jax.jit(lambda state: jax.lax.scan(step, state, batches))
    with pytest.raises(jaxpar.LowerError, match=r"can't place params.*train_step.place"):
        train(params)
    state, found = train(step.place(params))
    assert_same((step.gather(state), found), (expected, losses))


# -- saving and restoring ---------------------------------------------------------------------------------------------


def test_checkpoint_of_the_placed_state(tmp_path):
    """Orbax saves each device's rows and restores them there, in a step that was made anew."""
    case = CASES["integers_and_keys"]()
    step = parallelize(case.step)
    placed, _ = step(case.state, case.batch)
    expected = to_host(step.gather(placed))
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(tmp_path / "placed", placed)
    checkpointer.wait_until_finished()

    again = parallelize(case.step)
    again.plan(case.state, case.batch)
    target = again.place(case.state)
    restored = checkpointer.restore(tmp_path / "placed", target)
    assert isinstance(restored, jaxpar.PlacedState)
    assert restored.layout == placed.layout
    for a, b in zip(restored.buffers, target.buffers, strict=True):
        assert a.sharding == b.sharding
    assert_same(again.gather(restored), expected)
    assert_same(again(restored, case.batch)[1], step(placed, case.batch)[1])


def test_checkpoint_of_the_users_tree(tmp_path):
    """The gathered state is the user's own: it can be restored for any other mesh, or for none."""
    case = CASES["batch_tuple"]()
    step = parallelize(case.step)
    placed, _ = step(case.state, case.batch)
    gathered = step.gather(placed)
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(tmp_path / "tree", gathered)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "tree", jax.tree.map(np.zeros_like, gathered))
    expected = jax.jit(case.step)(restored, case.batch)[1]
    for shape in ({"stage": 4}, {"stage": 1, "data": 2}):
        other = parallelize(case.step, mesh=make_mesh(shape))
        assert_same(other(other.place(restored), case.batch)[1], expected)


def test_a_state_moves_to_another_mesh():
    case = CASES["integers_and_keys"]()
    first, second = parallelize(case.step), parallelize(case.step, mesh=make_mesh({"stage": 4, "data": 2}))
    placed, _ = first(case.state, case.batch)
    moved, _ = second(first.gather(placed), case.batch)
    expected = run_steps(
        dataclasses.replace(case, make_batch=lambda n, s: case.batch), jax.jit(case.step), case.state, 2
    )
    assert_same(second.gather(moved), expected[0])


def test_a_new_optimizer_object_is_the_same_state():
    """Functions in a TrainState are static, and a restored state has others."""
    make = lambda: make_train_state(jax.random.key(0)).replace(tx=optax.adam(1e-2))
    step, batch = parallelize(flax_step), make_batch()
    state, loss = step(make(), batch)
    fresh = make()
    placed = step.place(fresh)
    assert step.gather(placed).tx is fresh.tx
    state, same = step(placed, batch)
    assert_same(same, loss)
    assert step.gather(state).tx is fresh.tx


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_flow_as_they_do(value):
    step, batch = parallelize(adam_step, state_argnums=(0, 1), batch_argnums=(2,)), make_batch()
    params = make_params()
    opt_state = OPTIMIZER.init(params)
    batch["y"][3, 2] = value
    expected = jax.jit(adam_step)(params, opt_state, batch)
    *placed, loss = step(params, opt_state, batch)
    assert not np.isfinite(loss)
    assert_same([*step.gather(*placed), loss], list(expected))


def test_one_bad_example_stays_alone():
    batch = make_batch()
    batch["x"][5] = np.nan
    errors = parallelize(eval_step)(make_params(), batch)["errors"]
    assert np.flatnonzero(np.isnan(errors)).tolist() == [5]


def test_nan_in_the_state():
    params = make_params()
    params[2]["b"] = params[2]["b"].at[1].set(np.nan)
    step, batch = parallelize(), make_batch()
    placed, loss = step(params, batch)
    assert_same((step.gather(placed), loss), jax.jit(train_step)(params, batch))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_dropout_with_other_generators(impl):
    """The whole batch's bits are drawn and a micro-batch takes its rows: the same masks, at a higher cost."""
    case = small_case("gpt")
    state = case.state.replace(dropout_key=jax.random.key(0, impl=impl))
    case = dataclasses.replace(case, name=f"gpt {impl}", state=state)
    step = parallelize(case.step, mesh=make_mesh({"stage": 4, "data": 2}))
    placed, outputs = run_steps(case, step, step.place(state), 2)
    assert_same(outputs, run_reference(case, 2).outputs)
    assert_same(step.gather(placed), run_reference(case, 2).state)
