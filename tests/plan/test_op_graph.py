import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import Op, OpEdge, OpGraph, TimeCurve

from .strategies import op_graphs


def chain(*names):
    return OpGraph.build([Op(name, 1.0) for name in names], list(pairwise(names)))


@given(op_graphs())
@settings(deadline=None)
def test_round_trip(graph):
    again = OpGraph.from_json(graph.to_json())
    assert again == graph
    assert hash(again) == hash(graph)


def test_files(tmp_path):
    graph = chain("a", "b")
    graph.save(tmp_path / "graph.json")
    assert OpGraph.load(tmp_path / "graph.json") == graph


@given(op_graphs())
@settings(deadline=None)
def test_order_and_neighbours(graph):
    position = {op: i for i, op in enumerate(graph.order)}
    assert sorted(position) == list(range(graph.num_ops))
    for e in graph.edges:
        assert position[e.source] < position[e.target]
        assert e.target in graph.successors[e.source]
        assert e.source in graph.predecessors[e.target]
        assert graph.edge_bytes[e.source, e.target] == e.bytes
    assert sum(map(len, graph.successors)) == sum(map(len, graph.predecessors)) == len(graph.edges)


@given(op_graphs(), st.integers(1, 100))
@settings(deadline=None)
def test_seconds_are_those_of_the_operators(graph, n):
    for what in ("forward", "input_backward", "weight_backward"):
        found = getattr(graph, f"{what}_seconds")(n)
        assert found.tolist() == [getattr(op, what)(n) for op in graph.ops]
        assert getattr(graph, f"{what}_seconds")(n) is found
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1.0
    whole = graph.input_backward_seconds(n) + graph.weight_backward_seconds(n)
    np.testing.assert_array_equal(graph.backward_seconds(n), whole)


def test_defaults():
    op = Op("a", 1.0, parameter_bytes=4.0)
    assert (op.state_bytes, op.gradient_bytes) == (12.0, 4.0)
    assert Op("a", 1.0, parameter_bytes=4.0, state_bytes=0.0).state_bytes == 0.0
    assert not op.has_backward
    assert OpGraph.build([Op("a", 1.0, output_bytes=8.0), Op("b", 1.0)], [("a", "b")]).edges == (OpEdge(0, 1, 8.0),)
    assert op.forward == TimeCurve.per_example(1.0)


def test_bad_operators():
    with pytest.raises(PlanError) as failure:
        Op("mlp", -1.0, float("nan"), parameter_bytes=-8.0, residual_bytes=float("inf"))
    for part in (
        "'mlp'",
        "forward:",
        "-1 s",
        "input_backward:",
        "nan s",
        "parameter_bytes is -8",
        "residual_bytes is inf",
    ):
        assert part in str(failure.value)


def test_bad_graphs_name_everything():
    ops = (Op("a", 1.0), Op("b", 1.0), Op("b", 1.0))
    edges = (OpEdge(0, 0, 1.0), OpEdge(0, 1, -2.0), OpEdge(0, 1, float("nan")), OpEdge(1, 7, 1.0))
    with pytest.raises(PlanError) as failure:
        OpGraph(ops, edges)
    for part in (
        "2 operators are called 'b'",
        "'a' -> 'a' joins an operator to itself",
        "'a' -> 'b' is given 2 times",
        "edge 1 -> 7 leaves the graph",
        "has -2 bytes",
        "has nan bytes",
    ):
        assert part in str(failure.value)
    with pytest.raises(PlanError, match="at least one operator"):
        OpGraph((), ())
    with pytest.raises(PlanError, match=r"form a cycle: ('b' -> 'c' -> 'b'|'c' -> 'b' -> 'c')"):
        OpGraph.build([Op(n, 1.0) for n in "abc"], [("a", "b"), ("b", "c"), ("c", "b")])
    with pytest.raises(PlanError, match="'a' -> 'x': there is no operator 'x'"):
        OpGraph.build([Op("a", 1.0)], [("a", "x")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "starts with '\\[1\\]'"),
        ("{}", "ops is a list.*\n.*edges is a list"),
        ({"ops": [{"name": "a"}], "edges": []}, r"ops\[0\] is an object with a name and forward seconds"),
        ({"ops": [{"name": "a", "forward": 1, "speed": 2}], "edges": []}, r"unknown fields speed; known: name"),
        ({"ops": [{"name": "a", "forward": "fast"}], "edges": []}, r"ops\[0\] 'a': forward is a number, got 'fast'"),
        (
            {"ops": [{"name": "a", "forward": [1, 2]}], "edges": []},
            r"forward is seconds or \[\[examples, seconds\], ...\]",
        ),
        ({"ops": [{"name": "a", "forward": -1}, {"name": "b", "forward": -2}], "edges": []}, "(?s)'a': .*'b': "),
        ({"ops": [{"name": "a", "forward": 1}], "edges": [["a"]]}, r"edges\[0\] is \[source name, target name, bytes"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(PlanError, match=message):
        OpGraph.from_json(text if isinstance(text, str) else json.dumps(text))


def test_large_graphs_are_quick():
    names = [f"layer_{i}" for i in range(10_000)]
    graph = chain(*names)
    assert OpGraph.from_json(graph.to_json()) == graph
    assert graph.forward_seconds(4).sum() == 40_000
