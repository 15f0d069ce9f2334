"""Channels: the transfers between stages, on as few permutations as possible.

A permutation lets each rank send to one other and receive from one. The transfers are the edges of a bipartite graph
from sending to receiving ranks; its edge colouring with as many colours as the largest degree (König 1916) is the
least number of permutations. A channel's payload has two parts, for values that are last read by a forward and by a
backward: each part waits in a mailbox of its own, as long as it is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.plan import Bundle, Node, StageGraph


@dataclass(frozen=True)
class Channel:
    """One `ppermute` per tick: `pairs` of (sending rank, receiving rank)."""

    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Routing:
    """`channel_of[bundle]`, for bundles that travel to another rank."""

    channels: tuple[Channel, ...]
    channel_of: dict[Bundle, int]


def colour_channels(graph: StageGraph) -> Routing:
    """Spread the travelling bundles over channels.

    Bundles of one action to one stage travel together. Different actions of one rank never run in the same tick: what
    they send to the same rank shares a channel. Forward and backward values have channels of their own.
    """
    groups: dict[tuple[Node, int], list[Bundle]] = {}
    for bundle in graph.bundles:
        if graph.changes_rank(bundle):
            groups.setdefault((bundle.source, bundle.stage), []).append(bundle)
    channels: list[Channel] = []
    channel_of: dict[Bundle, int] = {}
    for forward in (True, False):
        lanes: dict[tuple[int, int, int], list[tuple[Node, int]]] = {}
        taken: dict[tuple[Node, int], int] = {}
        for source, stage in groups:
            if (source[0] == "F") == forward:
                pair = (graph.rank_of[source[1]], graph.rank_of[stage])
                number = taken[source, pair[1]] = taken.get((source, pair[1]), -1) + 1
                lanes.setdefault((*pair, number), []).append((source, stage))
        colours = colour_edges([(src, dst) for src, dst, _ in lanes])
        for keys, colour in zip(lanes.values(), colours, strict=True):
            for key in keys:
                channel_of.update(dict.fromkeys(groups[key], len(channels) + colour))
        for c in range(max(colours, default=-1) + 1):
            pairs = {(src, dst) for (src, dst, _), colour in zip(lanes, colours, strict=True) if colour == c}
            channels.append(Channel(tuple(sorted(pairs))))
    return Routing(tuple(channels), channel_of)


def colour_edges(edges: Sequence[tuple[int, int]]) -> list[int]:
    """A colour for each (source, destination), no two of a source or of a destination alike, with as few colours as
    possible: equal neighbours get equal ones where they can, so that equal stages send alike.

    >>> colour_edges([(0, 1), (1, 2), (0, 2)])
    [0, 0, 1]
    """
    degree = max(Counter(end for src, dst in edges for end in (("out", src), ("in", dst))).values(), default=0)
    colour: list[int] = []
    out: dict[tuple[int, int], int] = {}  # (source, colour) -> edge
    into: dict[tuple[int, int], int] = {}  # (destination, colour) -> edge
    for i, (src, dst) in enumerate(edges):
        colour.append(-1)
        both = (c for c in range(degree) if (src, c) not in out and (dst, c) not in into)
        a = next(both, -1)
        if a < 0:
            a = next(c for c in range(degree) if (src, c) not in out)
            b = next(c for c in range(degree) if (dst, c) not in into)
            _swap_path(edges, colour, out, into, dst, a, b)
        colour[i] = a
        out[src, a] = into[dst, a] = i
    return colour


def _swap_path(
    edges: Sequence[tuple[int, int]], colour: list[int], out: dict, into: dict, dst: int, a: int, b: int
) -> None:
    """Free colour a at `dst`: exchange a and b along the alternating path that starts there."""
    path, at, side, c = [], dst, into, a
    while (at, c) in side:
        edge = side[at, c]
        path.append(edge)
        at = edges[edge][0] if side is into else edges[edge][1]
        side = out if side is into else into
        c = b if c == a else a
    for edge in path:
        src, d = edges[edge]
        del out[src, colour[edge]], into[d, colour[edge]]
    for edge in path:
        src, d = edges[edge]
        colour[edge] = b if colour[edge] == a else a
        out[src, colour[edge]] = into[d, colour[edge]] = edge
