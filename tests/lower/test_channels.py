"""Channels: proper colourings with as few colours as there can be."""

from __future__ import annotations

from collections import Counter

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxpar
from jaxpar.lower.channels import colour_channels, colour_edges
from tests.equality.grid import small_case

_EDGES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40)


def max_degree(edges):
    """Of the bipartite multigraph from sending to receiving ranks."""
    counts = [*Counter(src for src, _ in edges).values(), *Counter(dst for _, dst in edges).values()]
    return max(counts, default=0)


@given(_EDGES)
def test_proper_and_minimal(edges):
    """König: a bipartite multigraph needs as many colours as its largest degree."""
    colours = colour_edges(edges)
    assert len(set(zip((src for src, _ in edges), colours, strict=True))) == len(edges)
    assert len(set(zip((dst for _, dst in edges), colours, strict=True))) == len(edges)
    assert len(set(colours)) == max_degree(edges)
    assert set(colours) == set(range(max_degree(edges)))


def test_a_chain_takes_one_channel_each_way():
    assert set(colour_edges([(s, s + 1) for s in range(7)])) == {0}


def test_a_v_takes_two_channels_one_for_each_direction():
    """So stages between two others send alike, and share their programs."""
    down, up = [(r, r + 1) for r in range(7)], [(r + 1, r) for r in reversed(range(7))]
    assert colour_edges([*down, *up]) == [0] * 7 + [1] * 7


@pytest.mark.parametrize("name", ["mlp", "towers", "unet"])
def test_bundles_travel_on_permutations(name):
    """Every rank sends to at most one other on a channel, and receives from one at most."""
    case = small_case(name)
    mesh = jax.make_mesh((8,), ("stage",))
    graph = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4).plan(case.state, case.batch).graph
    routing = colour_channels(graph)
    for channel in routing.channels:
        for side in (0, 1):
            assert len({pair[side] for pair in channel.pairs}) == len(channel.pairs)
    travelling = [b for b in graph.bundles if b.travels]
    assert set(routing.channel_of) == set(travelling)
    for bundle in travelling:
        assert (bundle.source[1], bundle.stage) in routing.channels[routing.channel_of[bundle]].pairs
    for kind in "FB":
        used = {routing.channel_of[b] for b in travelling if b.source[0] == kind}
        assert len(used) == max_degree({(b.source[1], b.stage) for b in travelling if b.source[0] == kind})
