"""Packing: every item has a place of its own, equal ranks are equal, and little is wasted."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.lower.packing import Item, add_to_buffers, fill_buffers, pack_items, read_place

_SHAPES = st.sampled_from([(), (1,), (7,), (16, 16), (16, 64), (64, 16), (33, 5), (3, 3, 8)])


def items(dtypes=("float32", "float64", "int32"), tags=(None, ("model",))):
    build = lambda shape, dtype, tag: Item(shape, np.dtype(dtype), tag, whole=tag is not None)
    return st.builds(build, _SHAPES, st.sampled_from(dtypes), st.sampled_from(tags))


def ranks_of(item):
    return st.lists(st.lists(item, max_size=12), min_size=1, max_size=5)


def spans(packing, rank):
    """Buffer, first and last element of each of a rank's items."""
    for place in packing.places[rank]:
        size = int(np.prod(place.shape, dtype=np.int64))
        start = place.offset or 0
        yield place.buffer, start, start + size


@given(ranks_of(items()))
def test_every_item_has_a_place_that_fits(ranks):
    packing = pack_items(ranks)
    for row, places in zip(ranks, packing.places, strict=True):
        for item, place in zip(row, places, strict=True):
            buffer = packing.buffers[place.buffer]
            assert (place.shape, buffer.dtype, buffer.tag) == (item.shape, item.dtype, item.tag)
            if place.offset is None:
                assert place.buffer < packing.num_slots
                assert buffer.shape == item.shape
            else:
                assert place.buffer >= packing.num_slots
                assert not item.whole
                assert place.offset + item.elements <= buffer.elements


@given(ranks_of(items()))
def test_places_of_a_rank_do_not_overlap(ranks):
    packing = pack_items(ranks)
    for rank in range(len(ranks)):
        taken = sorted(span for span in spans(packing, rank) if span[1] < span[2])
        for (buffer, _, end), (other, start, _) in itertools.pairwise(taken):
            assert buffer != other or end <= start


@given(st.lists(items(), max_size=12), st.lists(items(), max_size=12))
def test_equal_ranks_get_equal_places(row, other):
    packing = pack_items([row, other, list(row)])
    assert packing.places[0] == packing.places[2]


@given(st.lists(items(), max_size=12), st.integers(1, 5))
def test_ranks_that_are_all_equal_waste_nothing(row, count):
    packing = pack_items([row] * count)
    assert packing.bytes == sum(item.bytes for item in row) == max(packing.used_bytes)


@given(ranks_of(items(dtypes=("float32",), tags=(None,))))
def test_little_is_wasted(ranks):
    """Buffers are at most 5 % larger than the fullest rank's items, where these are of one dtype."""
    packing = pack_items(ranks)
    assert packing.used_bytes == tuple(sum(item.bytes for item in row) for row in ranks)
    assert max(packing.used_bytes) <= packing.bytes <= 1.05 * max(packing.used_bytes)
    if packing.bytes:
        assert packing.waste <= 0.05


@given(ranks_of(items()))
def test_pools_are_not_made_for_what_they_never_hold(ranks):
    """A flat pool has no dimensions that a sharding could speak of."""
    packing = pack_items(ranks)
    for buffer in packing.buffers[packing.num_slots :]:
        assert len(buffer.shape) == 1
        if buffer.tag is not None:
            assert buffer.elements == 0


def test_a_shape_that_few_ranks_have_goes_to_the_pool():
    """A vocabulary's matrix on one rank costs the others nothing that they don't use."""
    layer, table = Item((64, 64), np.dtype("float32")), Item((256, 64), np.dtype("float32"))
    packing = pack_items([[table, layer], [layer] * 5, [layer] * 5, [layer] * 4])
    assert packing.bytes == 5 * layer.bytes
    assert packing.places[0][0].offset is not None


def test_an_item_of_its_own_gets_a_slot_at_any_price():
    sharded = Item((64, 64), np.dtype("float32"), tag=(None, "model"), whole=True)
    packing = pack_items([[sharded], [Item((64, 64), np.dtype("float32"))]])
    assert packing.places[0][0].offset is None
    assert packing.buffers[packing.places[0][0].buffer] == sharded


@settings(max_examples=30, deadline=None)
@given(ranks_of(items(tags=(None,))), st.randoms())
def test_values_come_back_from_their_places(ranks, random):
    packing = pack_items(ranks)
    for row, places in zip(ranks, packing.places, strict=True):
        values = [jnp.full(item.shape, random.randrange(1, 100), item.dtype) for item in row]
        order = random.sample(range(len(row)), len(row))
        buffers = fill_buffers(packing, [places[i] for i in order], [values[i] for i in order])
        assert [b.shape for b in buffers] == [item.shape for item in packing.buffers]
        for value, place in zip(values, places, strict=True):
            np.testing.assert_array_equal(read_place(buffers, place), value)
        filled = sum(float(jnp.sum(v)) for v in values)
        assert sum(float(jnp.sum(b)) for b in buffers) == filled  # and zero elsewhere


@settings(max_examples=30, deadline=None)
@given(ranks_of(items(tags=(None,))))
def test_adding_at_places(ranks):
    """Only what is asked for is changed."""
    packing = pack_items(ranks)
    for row, places in zip(ranks, packing.places, strict=True):
        ones = [jnp.ones(item.shape, item.dtype) for item in row]
        buffers = fill_buffers(packing, places, ones)
        chosen = [i for i in range(len(row)) if i % 2]
        values = [jnp.full(row[i].shape, i, row[i].dtype) for i in chosen]
        added = add_to_buffers(buffers, [places[i] for i in chosen], values, jnp.add)
        for i, place in enumerate(places):
            expected = np.full(row[i].shape, 1 + (i if i % 2 else 0), row[i].dtype)
            np.testing.assert_array_equal(read_place(added, place), expected)
