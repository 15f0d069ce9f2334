"""Layouts of the state: any leaves, on any ranks, come back as they were."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from jaxpar import LowerError
from jaxpar.lower import PlacedState
from jaxpar.lower.layout import gather_leaves, make_layout, place_leaves
from tests.oracle import assert_same

_DTYPES = ["float32", "float64", "bfloat16", "float8_e4m3fn", "int8", "int32", "uint32", "bool", "complex64"]


def make_mesh(shape):
    size = int(np.prod(list(shape.values())))
    devices = np.array(jax.devices()[:size]).reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def lay_out(mesh, values, ranks, specs=None):
    """A layout for a list of arrays, rank by rank."""
    specs = specs or [()] * len(values)
    leaves = [(f"state[{i}]", v.shape, v.dtype, spec) for i, (v, spec) in enumerate(zip(values, specs, strict=True))]
    tree = jax.tree.structure(list(values))
    every = range(mesh.shape["stage"])
    order = {i: (0, i) for i in range(len(values))}
    return make_layout(mesh, "stage", (tree,), leaves, ranks, every, [(r,) for r in every], order)


def random_values(rng, kinds):
    values = []
    for shape, dtype in kinds:
        if dtype == "key":
            values.append(
                jax.random.split(jax.random.key(int(rng.integers(100))), shape) if shape else jax.random.key(7)
            )
        else:
            values.append(jnp.asarray(rng.integers(0, 2 if dtype == "bool" else 100, shape)).astype(dtype))
    return values


_KINDS = st.lists(
    st.tuples(st.sampled_from([(), (1,), (3,), (5, 7), (16, 16), (64, 8)]), st.sampled_from([*_DTYPES, "key"])),
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(_KINDS, st.data())
def test_what_is_placed_comes_back(kinds, data):
    mesh = make_mesh({"stage": 4, "data": 2})
    values = random_values(np.random.default_rng(0), kinds)
    ranks = data.draw(st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=len(kinds), max_size=len(kinds)))
    layout = lay_out(mesh, values, ranks)
    placed = place_leaves(layout, values)
    gathered = gather_leaves(placed)
    assert_same(gathered, values)
    for got, value in zip(gathered, values, strict=True):
        assert got.dtype == value.dtype
    for buffer, abstract in zip(placed.buffers, layout.abstract().buffers, strict=True):
        assert (buffer.shape, buffer.dtype, buffer.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)


def test_leaves_lie_on_their_ranks():
    mesh = make_mesh({"stage": 4})
    values = [jnp.full((32, 32), float(i)) for i in range(4)]
    placed = place_leaves(lay_out(mesh, values, [2, 0, 3, 1]), values)
    (buffer,) = (b for b in placed.buffers if b.size)
    found = {shard.index[0].start: float(shard.data[0, 0, 0]) for shard in buffer.addressable_shards}
    assert found == {2: 0.0, 0: 1.0, 3: 2.0, 1: 3.0}
    devices = {shard.index[0].start: shard.device for shard in buffer.addressable_shards}
    assert devices == dict(enumerate(mesh.devices.flat))


def test_python_numbers_and_numpy_arrays_are_placed_too():
    mesh = make_mesh({"stage": 2})
    values = [jnp.asarray(3), jnp.asarray(2.5), jnp.ones((4, 4))]
    layout = lay_out(mesh, values, [None, 1, 0])
    placed = place_leaves(layout, [3, 2.5, np.ones((4, 4))])
    assert_same(gather_leaves(placed), values)


def test_layouts_are_equal_where_everything_lies_in_the_same_place():
    mesh = make_mesh({"stage": 2, "data": 2})
    values = [jnp.ones((16, 16)), jnp.ones((16, 16)), jnp.ones(3)]
    layout = lay_out(mesh, values, [0, 1, None])
    assert layout == lay_out(mesh, values, [0, 1, None])
    assert hash(layout) == hash(lay_out(mesh, values, [0, 1, None]))
    others = {
        "ranks": lay_out(mesh, values, [1, 0, None]),
        "shapes": lay_out(mesh, [values[0], jnp.ones((16, 8)), values[2]], [0, 1, None]),
        "dtypes": lay_out(mesh, [v.astype(jnp.float32) for v in values], [0, 1, None]),
        "devices": lay_out(Mesh(mesh.devices[::-1], mesh.axis_names), values, [0, 1, None]),
        "mesh": lay_out(make_mesh({"stage": 2}), values, [0, 1, None]),
        "sharding": lay_out(make_mesh({"stage": 2, "model": 2}), values, [0, 1, None], [("model",), (), ()]),
    }
    for name, other in others.items():
        assert other != layout, name


def test_static_parts_of_the_tree_do_not_matter():
    mesh, values = make_mesh({"stage": 2}), [jnp.ones((16, 16))]
    layout = lay_out(mesh, values, [0])
    other = dataclasses.replace(layout, trees=(jax.tree.structure({"a": 1}),))
    assert other == layout


def test_sharding_over_other_axes():
    mesh = make_mesh({"stage": 2, "model": 2})
    values = [jnp.arange(64.0).reshape(8, 8), jnp.arange(64.0, 128.0).reshape(8, 8), jnp.ones(5)]
    placed = place_leaves(lay_out(mesh, values, [0, 1, 1], [(None, "model"), ("model",), ()]), values)
    assert_same(gather_leaves(placed), values)
    specs = {b.sharding.spec for b in placed.buffers if b.size}
    assert {("stage", None, "model"), ("stage", "model"), ("stage",)} == {tuple(s) for s in specs}
    for buffer in placed.buffers:
        shards = 4 if "model" in buffer.sharding.spec else 2
        assert buffer.addressable_shards[0].data.size * shards == buffer.size


def test_a_deleted_state_is_not_gathered():
    mesh, values = make_mesh({"stage": 2}), [jnp.ones((16, 16))]
    placed = place_leaves(lay_out(mesh, values, [0]), values)
    assert not placed.is_deleted
    placed.buffers[0].delete()
    assert placed.is_deleted
    with pytest.raises(LowerError, match="donated"):
        gather_leaves(placed)


def test_a_placed_state_is_a_pytree_of_its_arrays():
    mesh, values = make_mesh({"stage": 2}), [jnp.ones((16, 16)), jnp.ones(2)]
    placed = place_leaves(lay_out(mesh, values, [0, None]), values)
    leaves, tree = jax.tree.flatten(placed)
    assert len(leaves) == len(placed.buffers) + 1
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, PlacedState)
    assert again.layout is placed.layout
