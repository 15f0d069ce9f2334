"""Random stage graphs, and what is scheduled on them."""

from hypothesis import strategies as st

from jaxpar.schedule import StageDag, place_stages


def _edges(num_stages: int):
    pairs = [(a, b) for b in range(num_stages) for a in range(b)]
    return st.lists(st.sampled_from(pairs), unique=True).map(tuple) if pairs else st.just(())


@st.composite
def dags(draw, max_stages: int = 7, has_backward: bool | None = None) -> StageDag:
    """Edges from lower to higher stages; backwards the mirror, or edges of their own; ranks shared, or empty."""
    num_stages = draw(st.integers(1, max_stages))
    num_ranks = draw(st.integers(1, num_stages + 1))
    rank_of = tuple(draw(st.integers(0, num_ranks - 1)) for _ in range(num_stages))
    return _connect(draw, rank_of, num_ranks, has_backward)


@st.composite
def placed_dags(draw, placement: str, has_backward: bool | None = None) -> StageDag:
    """Like `dags`, but laid out in full rounds, or in a V."""
    num_ranks = draw(st.integers(1, 4))
    num_stages = num_ranks * (2 if placement == "v" else draw(st.integers(1, 3)))
    return _connect(draw, place_stages(num_stages, num_ranks, placement), num_ranks, has_backward)


def _connect(draw, rank_of: tuple[int, ...], num_ranks: int, has_backward: bool | None) -> StageDag:
    num_stages = len(rank_of)
    forward = draw(_edges(num_stages))
    if has_backward is None:
        has_backward = draw(st.booleans())
    mirrored = draw(st.booleans())
    backward = tuple((b, a) for a, b in (forward if mirrored else draw(_edges(num_stages)))) if has_backward else ()
    return StageDag(num_stages, forward, backward, rank_of, num_ranks, has_backward)


microbatches = st.integers(1, 9)
exchanges = st.sampled_from([1, 2])
