"""Bad input: the right error, that names the user's own things and a way out, and nothing is changed."""

from __future__ import annotations

import re

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import ad, mlir

import jaxpar
from jaxpar import LowerError, PlanError, ScheduleError, TraceError
from jaxpar.schedule import StageDag, gpipe
from jaxpar.trace.rules.registry import _RULES
from tests.oracle import assert_same, to_host
from tests.zoo import BAD_CASES
from tests.zoo.mlp import init_mlp, regression_batch, sgd, squared_errors

WIDTHS = [12, 12, 12, 4]


def make_mesh(shape=None):
    shape = shape or {"stage": 2, "data": 2}
    size = int(np.prod(list(shape.values())))
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:size])


def make_params(widths=WIDTHS):
    return init_mlp(jax.random.key(0), widths)


def make_batch(size=16, seed=0):
    return regression_batch(WIDTHS[0])(size, seed)


def train_step(params, batch):
    loss, grads = jax.value_and_grad(lambda p: squared_errors(p, batch).mean())(params)
    return sgd(params, grads), loss


def named_step(params, batch):
    """With modules that have names."""

    def loss_fn(params):
        x = batch["x"]
        for i, layer in enumerate(params):
            with jax.named_scope(f"layer_{i}"):
                x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.mean((x - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return sgd(params, grads), loss


def parallelize(step=train_step, *, num_microbatches=4, mesh=None, **options):
    return jaxpar.parallelize(step, mesh=mesh or make_mesh(), num_microbatches=num_microbatches, **options)


def message_of(error, *words):
    """The message: short, no dump of anything, and with `words` in it."""
    text = str(error.value)
    lines = text.splitlines()
    assert len(lines) < 25, text
    assert max(map(len, lines)) < 600, text
    assert not re.search(r"PyTreeDef|\bjaxpr\b|lambda ;|0x[0-9a-f]{6}|Traced<|ShapedArray", text), text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    return text


def check_still_works(step, placed, batch):
    """The step runs, and the state is as it was."""
    before = to_host(step.gather(placed))
    new, loss = step(placed, batch)
    expected, expected_loss = jax.jit(step.__wrapped__)(before, batch)
    assert_same((step.gather(new), loss), (expected, expected_loss))


@pytest.fixture
def running():
    """A step that has run, its state, and a batch."""
    step, batch = parallelize(), make_batch()
    placed, _ = step(make_params(), batch)
    return step, placed, batch


# -- steps that can't be split into micro-batches ----------------------------------------------------------------------

# What the message must name, beside the file: what the user did, and what to do.
_COUPLED = {
    "batch_norm": ["statistic of the whole batch", "running averages", "GroupNorm"],
    "sort_along_batch": ["sorts along the batch", "outside the pipelined step"],
    "cumsum_along_batch": ["accumulates along the batch", "outside the pipelined step"],
    "reverse_along_batch": ["batch['x']", "reverses the order of the examples", "outside the pipelined step"],
    "contrastive": ["multiplies examples with other examples", "kept in the state"],
    "log_of_mean_loss": ["backward", "value of the whole batch", "Differentiate a sum or a mean"],
    "control_flow_on_batch_size": ["32 examples", "4", "jnp.where"],
    "loop_over_examples": ["32 examples", "loops over it"],
    "branch_on_batch_value": ["cond", "chooses what is computed", "jnp.where"],
}
_OF_THE_BATCH = {
    "batch_not_used": ["batch['x']", "batch['y']", "batch_argnums"],
    "batch_without_array": ["(batch)", "no array", "batch_argnums=(1,)"],
    "batch_of_different_sizes": [
        "[31, 32]",
        "batch['extra'] : float64[31]",
        "batch['x'] : float64[32, 12]",
        "another argument",
    ],
}
_ACCEPTED = {"batch_of_scalars"}  # see test_api.py


def test_every_bad_case_is_tested():
    assert set(BAD_CASES) - _ACCEPTED == {*_COUPLED, *_OF_THE_BATCH}


@pytest.mark.parametrize("name", [*_COUPLED, *_OF_THE_BATCH])
def test_bad_cases(name):
    case = BAD_CASES[name]()
    step = parallelize(case.step)
    placed = step.place(case.state)
    with pytest.raises(TraceError) as error:
        step(placed, case.batch, *case.extra)
    text = message_of(error, *(_COUPLED | _OF_THE_BATCH)[name])
    if name in _COUPLED:
        assert re.search(r"tests/zoo/(bad|mlp)\.py:\d+", text), text
    assert_same(step.gather(placed), case.state)
    jax.jit(case.step)(case.state, case.batch, *case.extra)  # the undecorated step is as good as before


def test_the_line_is_the_users():
    """Not that of the library which the user called, nor jaxpar's."""
    case = BAD_CASES["batch_norm"]()
    with pytest.raises(TraceError) as error:
        parallelize(case.step)(case.state, case.batch)
    lines = re.findall(r"(\S+\.py):(\d+)", message_of(error))
    assert {file.rsplit("/", 1)[-1] for file, _ in lines} == {"bad.py"}
    with open(lines[0][0]) as source:
        assert "model.apply" in source.read().splitlines()[int(lines[0][1]) - 1]


def test_a_good_step_after_a_bad_batch(running):
    step, placed, batch = running
    with pytest.raises(TraceError):
        step(placed, batch | {"x": batch["x"][:-1]})
    check_still_works(step, placed, batch)


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_batch_that_does_not_split_evenly(running):
    step, placed, _ = running
    with pytest.raises(TraceError) as error:
        step(placed, make_batch(20))
    message_of(error, "batch['x']", "20 examples", "4 micro-batches on 2 replicas", "multiple of 8", "16 or 24")
    check_still_works(step, placed, make_batch())


def test_batch_that_is_too_small():
    with pytest.raises(TraceError) as error:
        parallelize()(make_params(), make_batch(4))
    assert " 0 or" not in message_of(error, "4 examples", "multiple of 8", "8")


def test_empty_batch(running):
    step, placed, batch = running
    with pytest.raises(TraceError) as error:
        step(placed, make_batch(0))
    message_of(error, "batch['x'] : float64[0, 12]", "no examples")
    check_still_works(step, placed, batch)


def test_something_that_is_no_array():
    params, batch = make_params(), make_batch()
    with pytest.raises(TraceError) as error:
        parallelize(lambda state, batch: train_step(state["params"], batch))({"params": params, "name": "mine"}, batch)
    message_of(error, "state['name']", "str", "static_argnums")
    with pytest.raises(TraceError) as error:
        parallelize()(params, batch | {"ids": ["a"] * 16})
    message_of(error, "batch['ids'][0]", "str")


# -- the arguments of the step and of parallelize ---------------------------------------------------------------------


def test_missing_arguments():
    with pytest.raises(TraceError) as error:
        parallelize()(make_params())
    message_of(error, "batch_argnums has 1", "train_step", "1 argument")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_argnums": -1}, ["state_argnums has -1", "counted from 0"]),
        ({"state_argnums": (0, 1)}, ["batch (argument 1 of train_step)", "state_argnums", "batch_argnums"]),
        ({"static_argnums": 0}, ["params (argument 0 of train_step)", "state_argnums", "static_argnums"]),
    ],
)
def test_argument_numbers_that_make_no_sense(options, words):
    with pytest.raises(TraceError) as error:
        parallelize(**options)
    message_of(error, *words)


def test_static_argument_that_is_not_hashable():
    step = parallelize(lambda params, batch, sizes: train_step(params, batch), static_argnums=2)
    with pytest.raises(TraceError) as error:
        step(make_params(), make_batch(), [1, 2])
    message_of(error, "sizes is static", "list", "tuple")


def test_mesh_without_the_stage_axis():
    with pytest.raises(PlanError) as error:
        parallelize(mesh=make_mesh({"data": 2, "model": 2}))
    message_of(error, "'stage'", "{'data': 2, 'model': 2}", "jax.make_mesh", "stage_axis=")


def test_mesh_without_the_data_axis_asked_for():
    with pytest.raises(PlanError) as error:
        parallelize(data_axis="batch")
    message_of(error, "'batch'", "{'stage': 2, 'data': 2}")


def test_one_axis_for_both():
    with pytest.raises(PlanError) as error:
        parallelize(data_axis="stage")
    message_of(error, "stage_axis and data_axis are both 'stage'")


@pytest.mark.parametrize("count", [0, -4, 2.5])
def test_number_of_microbatches(count):
    with pytest.raises(PlanError) as error:
        parallelize(num_microbatches=count)
    message_of(error, f"num_microbatches is {count}", "at least 1")


# -- plans -------------------------------------------------------------------------------------------------------------


def test_more_stages_than_blocks():
    def step(params, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(batch["x"] @ p["w"]))(params)
        return sgd(params, grads), loss

    pipelined = parallelize(step, mesh=make_mesh({"stage": 8}))
    state = pipelined.place({"w": jnp.ones((12, 4))})
    with pytest.raises(PlanError) as error:
        pipelined(state, make_batch())
    message_of(error, "8 stages", "at most 2 stages", "deeper model")


def test_cuts_of_the_wrong_number():
    with pytest.raises(PlanError) as error:
        parallelize(named_step, cuts=["layer_1", "layer_2"]).plan(make_params(), make_batch())
    message_of(error, "2 cuts make 3 stages", "the mesh has 2")


def test_cuts_at_unknown_modules():
    with pytest.raises(PlanError) as error:
        parallelize(named_step, cuts=["layer_7"]).plan(make_params(), make_batch())
    message_of(error, "'layer_7'", "layer_0", "layer_1", "layer_2")


def test_cuts_where_nothing_has_a_name():
    with pytest.raises(PlanError) as error:
        parallelize(cuts=["layer_1"]).plan(make_params(), make_batch())
    message_of(error, "'layer_1'", "jax.named_scope")


@pytest.mark.parametrize("cuts", [["layer_2", "layer_1"], ["layer_1", "layer_1"], ["layer_0", "layer_1"]])
def test_cuts_out_of_order(cuts):
    """Or twice the same, or at the first module, where the first stage begins anyway."""
    with pytest.raises(PlanError) as error:
        parallelize(named_step, cuts=cuts, mesh=make_mesh({"stage": 3})).plan(make_params(), make_batch())
    message_of(error, *cuts, "one stage each", "in this order")


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ("2f2b", {}, ["'2f2b'", "'gpipe'", "'1f1b'"]),
        ("1f1b", {"chunks": 2}, ["'1f1b'", "extra", "exchange", "chunks"]),
        ("gpipe", {"extra": 1}, ["'gpipe'", "exchange", "extra"]),
        ("1f1b", {"extra": -1}, ["extra", "-1"]),
        ("1f1b", {"exchange": 3}, ["exchange is 1 or 2", "3"]),
        (gpipe(StageDag.chain(2), 8), {}, ["8 micro-batches", "has 4"]),
        (gpipe(StageDag.chain(3), 4), {}, ["another stage graph"]),
        (gpipe(StageDag.chain(2), 4), {"extra": 1}, ["takes no options", "extra"]),
        (lambda dag, num_microbatches: "gpipe", {}, ["returns a Timetable", "str"]),
    ],
)
def test_schedules(schedule, options, words):
    step = parallelize(schedule=schedule, schedule_options=options)
    placed = step.place(make_params())
    with pytest.raises(ScheduleError) as error:
        step(placed, make_batch())
    message_of(error, *words)
    assert_same(step.gather(placed), make_params())


# -- placed states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"stage": 4}, ["another mesh", "{'stage': 2, 'data': 2}", "{'stage': 4}"]),
        ({"stage": 1, "data": 4}, ["another mesh", "{'stage': 1, 'data': 4}"]),
    ],
    ids=str,
)
def test_state_of_another_mesh(running, shape, words):
    step, placed, batch = running
    other = parallelize(mesh=make_mesh(shape), num_microbatches=2)
    for _ in range(2):  # before and after it has been planned
        with pytest.raises(LowerError) as error:
            other(placed, batch)
        message_of(error, "params was placed", *words, "Gather it", "state_of=")
    with pytest.raises(LowerError):
        other.place(placed)
    check_still_works(step, placed, batch)


def test_state_on_other_devices(running):
    step, placed, batch = running
    mesh = jax.make_mesh((2, 2), ("stage", "data"), devices=jax.devices()[4:8])
    with pytest.raises(LowerError) as error:
        parallelize(mesh=mesh)(placed, batch)
    message_of(error, "params was placed on other devices", "Gather it")
    check_still_works(step, placed, batch)


def test_state_of_another_plan():
    first, second = (parallelize(named_step, cuts=[cut]) for cut in ("layer_1", "layer_2"))
    batch = make_batch()
    placed, _ = first(make_params(), batch)
    with pytest.raises(LowerError) as error:
        second(placed, batch)
    message_of(error, "params was placed by another step or plan", "Gather it", "place it anew")
    check_still_works(first, placed, batch)
    check_still_works(second, second.place(make_params()), batch)


def test_state_of_another_step(running):
    """With other leaves."""
    step, placed, batch = running
    other = parallelize(lambda state, batch: train_step(state["params"], batch))
    other({"params": make_params()}, batch)
    with pytest.raises(LowerError) as error:
        other(placed, batch)
    message_of(error, "state[0]['b'] : not expected", "state['params'][0]['b'] : missing")
    check_still_works(step, placed, batch)


def test_state_that_was_donated(running):
    step, placed, batch = running
    new, _ = step(placed, batch)
    with pytest.raises(LowerError) as error:
        step(placed, batch)
    message_of(error, "params was donated", "Use the state that the step returned", "donate=False")
    with pytest.raises(LowerError) as error:
        step.gather(placed)
    message_of(error, "donated", "donate=False")
    with pytest.raises(LowerError):
        step.place(placed)
    check_still_works(step, new, batch)


def test_state_of_other_shapes(running):
    step, placed, batch = running
    for use in (step.place, lambda state: step(state, batch), lambda state: step.init(lambda: state)):
        with pytest.raises(LowerError) as error:
            use(make_params([12, 20, 12, 4]))
        message_of(error, "params[0]['w'] : float64[12, 20] instead of float64[12, 12]", "another step")
        with pytest.raises(LowerError) as error:
            use(make_params([12, 12, 4]))
        message_of(error, "params[2]['w'] : missing")
        with pytest.raises(LowerError) as error:
            use(jax.tree.map(lambda x: x.astype(jnp.float32), make_params()))
        message_of(error, "params[0]['b'] : float32[12] instead of float64[12]")
    check_still_works(step, placed, batch)


def test_a_large_difference_is_told_in_short():
    step, batch = parallelize(), make_batch()
    step.plan(make_params([12] * 40 + [4]), batch)
    with pytest.raises(LowerError) as error:
        step.place(make_params([12] * 20 + [4]))
    message_of(error, "... and ")


def test_wrong_number_of_states(running):
    step, placed, batch = running
    for use in (step.place, step.gather):
        with pytest.raises(LowerError) as error:
            use(placed, placed)
        message_of(error, "1 state argument", "2 states were given")
    check_still_works(step, placed, batch)


@pytest.mark.parametrize("thing", [3, [1, 2], {"a": np.ones(3)}], ids=str)
def test_gather_of_something_else(running, thing):
    with pytest.raises(LowerError) as error:
        running[0].gather(thing)
    message_of(error, "what place or the step returned", type(thing).__name__)


def test_gather_of_a_state_that_is_not_created_yet():
    step = parallelize()
    with pytest.raises(LowerError) as error:
        step.gather(step.init(make_params))
    message_of(error, "not created yet", "train_step", "plan")


def test_evaluation_on_another_mesh():
    with pytest.raises(LowerError) as error:
        parallelize(state_of=parallelize(), mesh=make_mesh({"stage": 4}))
    message_of(error, "train_step", "{'stage': 2, 'data': 2}", "{'stage': 4}", "the same mesh")


def test_evaluation_before_anything_is_placed():
    train = parallelize()
    evaluate = parallelize(lambda params, batch: squared_errors(params, batch).mean(), state_of=train)
    pending = train.place(make_params())
    with pytest.raises(jaxpar.JaxparError) as error:
        evaluate(pending, make_batch())
    message_of(error, "train_step", "plan")
    check_still_works(train, pending, make_batch())


def test_pending_state_of_another_mesh():
    """It is not on any mesh yet, so any step can place or create it."""
    batch, other = make_batch(), parallelize(mesh=make_mesh({"stage": 4}))
    expected = jax.jit(train_step)(make_params(), batch)[1]
    assert_same(other(parallelize().place(make_params()), batch)[1], expected)
    assert_same(other(parallelize().init(make_params), batch)[1], expected)


def test_new_state_that_is_not_like_the_state():
    step = parallelize(new_state=lambda output: output[1])
    placed = step.place(make_params())
    with pytest.raises(TraceError) as error:
        step(placed, make_batch())
    message_of(error, "new_state picks 1", "train_step", "state_argnums")
    assert_same(step.gather(placed), make_params())


# -- exceptions on the way ---------------------------------------------------------------------------------------------

twice_p = jex_core.Primitive("twice_of_the_error_tests")
twice_p.def_impl(lambda x: 2 * x)
twice_p.def_abstract_eval(lambda x: x)
ad.deflinear2(twice_p, lambda ct, x: [twice_p.bind(ct)])
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))


def twice_step(params, batch):
    loss_fn = lambda p: (twice_p.bind(squared_errors(p, batch)) / 2).mean()
    loss, grads = jax.value_and_grad(loss_fn)(params)
    return sgd(params, grads), loss


def test_primitive_without_a_rule():
    step = parallelize(twice_step)
    with pytest.raises(TraceError) as error:
        step(make_params(), make_batch())
    text = message_of(error, "twice_of_the_error_tests", "register_batch_rule")
    assert re.search(r"test_errors\.py:\d+", text), text


def test_a_rule_that_raises():
    """The user's exception comes through; the rule is put right, and the same state and step go on."""

    def broken(eqn, types):
        raise RuntimeError("this rule is not finished")

    step, batch = parallelize(twice_step), make_batch()
    placed = step.place(make_params())
    jaxpar.register_batch_rule(twice_p, broken)
    try:
        with pytest.raises(RuntimeError, match="not finished"):
            step(placed, batch)
        jaxpar.register_batch_rule(twice_p, lambda eqn, types: [types[0]])
        check_still_works(step, placed, batch)
    finally:
        _RULES.pop(twice_p.name)


def test_exceptions_of_the_users_own_step_come_through(running):
    step, placed, batch = running
    with pytest.raises(KeyError, match="'y'"):
        step(placed, {"x": batch["x"]})
    check_still_works(step, placed, batch)


def fail(*args, **kwargs):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    "name", ["trace_step", "arrange_stages", "plan_stages", "make_timetable", "build_machine", "jit_step"]
)
def test_an_exception_in_the_middle_of_compiling(running, monkeypatch, name):
    """Any pass: the state can be used, the step too, and the next try succeeds."""
    step, placed, batch = running
    larger = make_batch(32)
    with monkeypatch.context() as patched:
        patched.setattr(f"jaxpar.passes.{name}", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            step(placed, larger)
    assert not placed.is_deleted
    expected = jax.jit(train_step)(step.gather(placed), larger)
    new, loss = step(placed, larger)
    assert_same((step.gather(new), loss), expected)
    check_still_works(step, new, batch)


def test_an_exception_while_xla_compiles(running, monkeypatch):
    """The state is donated to a program that runs, not to one that doesn't compile."""
    step, placed, batch = running
    larger = make_batch(32)
    step.plan(placed, larger)
    with monkeypatch.context() as patched:
        patched.setattr("jaxpar.lower.step.run_machine", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            step(placed, larger)
    assert not placed.is_deleted
    check_still_works(step, placed, batch)


def test_exceptions_before_the_first_plan():
    """The pending state is the user's own, and stays so."""
    step, params = parallelize(), make_params()
    placed = step.place(params)
    with pytest.raises(TraceError):
        step(placed, make_batch(20))
    check_still_works(step, placed, make_batch())
    assert_same(params, make_params())


def test_all_errors_are_of_one_family():
    for kind in (TraceError, PlanError, ScheduleError, LowerError):
        assert issubclass(kind, jaxpar.JaxparError)
        assert issubclass(kind, ValueError)
