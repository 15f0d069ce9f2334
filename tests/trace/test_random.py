"""Random draws: a micro-batch makes exactly its own rows of what the undecorated step draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.trace import Batched

from .law import check_law, check_refused, trace

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4))
T = RNG.normal(size=(6, 5, 4))
KEY = jax.random.key(7)


def dropout(x, key):
    keep = jax.random.bernoulli(key, 0.7, x.shape)
    return jnp.where(keep, x / 0.7, 0.0)


def own_keys(draw):
    """`draw(key)` for each example, with a key of its own."""
    return lambda x, key: jax.vmap(draw)(jax.random.split(key, x.shape[0]))


DRAWS = {
    **{f"bits {w}": lambda x, k, w=w: jax.random.bits(k, x.shape, f"uint{w}") for w in (8, 16, 32, 64)},
    "vector": lambda x, k: jax.random.bits(k, x.shape[:1]),
    "batch second": lambda x, k: jax.random.bits(k, (3, x.shape[0], 2)),
    "batch second, 64": lambda x, k: jax.random.bits(k, (3, x.shape[0], 2), "uint64"),
    "batch last": lambda x, k: jax.random.normal(k, (3, x.shape[0])),
    "merged": lambda x, k: jax.random.normal(k, (x.shape[0] * 5, 2)).reshape(-1, 5, 2),
    "uniform": lambda x, k: jax.random.uniform(k, x.shape, minval=-1),
    "normal f32": lambda x, k: jax.random.normal(k, x.shape, "float32"),
    "normal bf16": lambda x, k: jax.random.normal(k, x.shape, "bfloat16"),
    "normal complex": lambda x, k: jax.random.normal(k, x.shape, complex),
    "truncated": lambda x, k: jax.random.truncated_normal(k, -1, 1, x.shape),
    "bernoulli": lambda x, k: jax.random.bernoulli(k, 0.3, x.shape),
    "gumbel": lambda x, k: jax.random.gumbel(k, x.shape),
    "categorical": lambda x, k: jax.random.categorical(k, x),
    "randint": lambda x, k: jax.random.randint(k, x.shape, 0, 13),
    "exponential": lambda x, k: jax.random.exponential(k, x.shape),
    "laplace": lambda x, k: jax.random.laplace(k, x.shape),
    "choice": lambda x, k: jax.random.choice(k, 9, x.shape),
    "dropout": dropout,
    "dropout's gradient": lambda x, k: jax.grad(lambda x: (dropout(x, k) ** 2).sum())(x),
    "folded": lambda x, k: dropout(x, jax.random.fold_in(k, 3)),
    "split": lambda x, k: jax.random.split(k, x.shape[0]),
    "split, drawn": own_keys(lambda k: jax.random.normal(k, (3,))),
    "split twice": own_keys(lambda k: jax.random.normal(jax.random.split(k, 3)[1], (2,))),
    "split, permuted": own_keys(lambda k: jax.random.permutation(k, 5)),
    "split, gamma": own_keys(lambda k: jax.random.gamma(k, 2.0)),
    "split, data": own_keys(jax.random.key_data),
    "folded by position": lambda x, k: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(k, i), (2,)))(
        jnp.arange(x.shape[0])
    ),
    "key for each of some": lambda x, k: jax.vmap(lambda k: jax.random.normal(k, x.shape), 0, 1)(
        jax.random.split(k, 3)
    ),
    "raw key": lambda x, k: jax.random.normal(jax.random.PRNGKey(3), x.shape),
    "in a branch": lambda x, k: jax.lax.cond(jax.random.bernoulli(k), lambda: dropout(x, k), lambda: x),
    "in a loop": lambda x, k: jax.lax.scan(lambda x, k: (dropout(x, k), None), x, jax.random.split(k, 3))[0],
}


@pytest.mark.parametrize("name", DRAWS)
def test_threefry(name):
    check_law(DRAWS[name], (X,), (KEY,), expect=[Batched], sizes=(2,))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize(
    "name", ["bits 8", "bits 64", "batch second", "merged", "dropout", "split", "key for each of some"]
)
def test_other_generators(impl, name):
    check_law(DRAWS[name], (X,), (jax.random.key(7, impl=impl),), expect=[Batched], sizes=(2,))


@pytest.mark.parametrize("name", ["bits 8", "bits 32", "bits 64", "batch second", "dropout", "split", "split, drawn"])
def test_threefry_that_does_not_partition(name):
    with jax.threefry_partitionable(False):
        check_law(DRAWS[name], (X,), (KEY,), expect=[Batched], sizes=(2,))


def test_rows_cost_no_more_than_they_are():
    """With the default generator nothing of the whole batch's size is made."""
    traced = trace(DRAWS["normal f32"], (X,), (KEY,))
    assert [eqn.form for eqn in traced.typed.body.eqns if eqn.name == "random_bits"] == ["rows"]


def permutation(x, key):
    return x[jax.random.permutation(key, x.shape[0])]


def one_key_for_gammas(x, key):
    return jax.random.gamma(key, jnp.exp(x))


def draws_of_own_keys(x, key):
    return jax.vmap(lambda k: jax.random.bits(k, (3,)))(jax.random.split(key, x.shape[0]))


def splits_of_own_keys(x, key):
    return jax.random.key_data(jax.vmap(jax.random.split)(jax.random.split(key, x.shape[0])))


def draws_of_pairs(x, key):
    return jax.random.normal(key, (x.shape[0], x.shape[0]))


def draws_of_others(x, key):
    return x + jax.random.normal(key, (x.shape[0] + 1, 4))[1:]


RBG, UNSAFE = jax.random.key(7, impl="rbg"), jax.random.key(7, impl="unsafe_rbg")
ILLEGAL = {
    "permutation": (permutation, KEY, "sorts along the batch"),
    "gammas": (one_key_for_gammas, KEY, "from one key"),
    "rbg": (draws_of_own_keys, RBG, "draws for each example from rbg keys"),
    "unsafe_rbg": (draws_of_own_keys, UNSAFE, "draws for each example from unsafe_rbg keys"),
    "unsafe_rbg split": (splits_of_own_keys, UNSAFE, "draws for each example from unsafe_rbg keys"),
    "pairs": (draws_of_pairs, KEY, "two batch dimensions"),
    "others": (draws_of_others, KEY, "n+1 rows for n examples"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_refused(name):
    f, key, clause = ILLEGAL[name]
    check_refused(f, (X,), (key,), clause)


def test_splits_of_rbg_keys_are_their_own():
    check_law(splits_of_own_keys, (X,), (RBG,), expect=[Batched])
