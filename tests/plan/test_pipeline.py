import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import (
    ClusterSpec,
    DeviceSpec,
    Op,
    OpEdge,
    OpGraph,
    PipelinePlan,
    PlannedStage,
    check_request,
    resolve_pins,
    sort_stages,
    stage_memory,
)
from jaxpar.plan.op_names import describe_ops
from jaxpar.plan.plan_check import find_stage_cycle, find_way_back
from jaxpar.schedule import Link

from .strategies import op_graphs, plans

TOY = DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1000.0, memory_bandwidth=1e9)
CLUSTER = ClusterSpec.homogeneous(TOY, 8, Link(0.0, 1e3))


def two_branches():
    """in -> a_0 -> a_1 -> out, in -> b_0 -> b_1 -> out."""
    names = ["net/in", "net/a_0", "net/a_1", "net/b_0", "net/b_1", "net/out"]
    ops = [Op(n, 1.0, 1.0, 1.0, parameter_bytes=10.0, residual_bytes=5.0, output_bytes=8.0, kind=n[4]) for n in names]
    edges = [("in", "a_0"), ("a_0", "a_1"), ("a_1", "out"), ("in", "b_0"), ("b_0", "b_1"), ("b_1", "out")]
    return OpGraph.build(ops, [(f"net/{a}", f"net/{b}") for a, b in edges])


def diamond(**options):
    stages = (
        PlannedStage((0,), (0,)),
        PlannedStage((1, 2), (1,)),
        PlannedStage((3, 4), (2, 3)),
        PlannedStage((5,), (4,)),
    )
    options = {"schedule_options": {"extra": 0}, **options}
    return PipelinePlan(two_branches(), CLUSTER, stages, 2, 8, **options)


def reaches(graph):
    """Pairs (a, b) with a path from a to b, by brute force."""
    found = {(e.source, e.target) for e in graph.edges}
    for k, a, b in itertools.product(range(graph.num_ops), repeat=3):
        if (a, k) in found and (k, b) in found:
            found.add((a, b))
    return found


def test_stage_graph():
    plan = diamond()
    plan.check()
    assert plan.stage_of == (0, 1, 1, 2, 2, 3)
    assert plan.edges == {(0, 1): 8.0, (0, 2): 8.0, (1, 3): 8.0, (2, 3): 8.0}
    assert plan.depth == (3, 2, 2, 1)
    assert plan.in_flight == (3, 2, 2, 1)
    assert plan.dag.backward == ((1, 0), (2, 0), (3, 1), (3, 2))
    assert plan.batch_size == 16
    assert plan.bottleneck == 6.0  # two operators of 3 s an example, without replicas
    assert plan.costs.sent_bytes[0, 1] == 16.0
    assert plan.costs.residual_bytes == (10.0, 20.0, 10.0, 10.0)


def test_a_value_goes_to_a_stage_once():
    ops = [Op(n, 1.0, output_bytes=8.0) for n in "abcd"]
    graph = OpGraph.build(ops, [("a", "b"), ("a", "c", 3.0), ("a", "d", 20.0), ("b", "d", 1.0)])
    plan = PipelinePlan(graph, CLUSTER, (PlannedStage((0, 1), (0,)), PlannedStage((2, 3), (1,))), 1, 1)
    assert plan.edges == {(0, 1): 21.0}


@given(op_graphs(max_ops=6), st.data())
@settings(deadline=None)
def test_cycles_of_stages_are_found_and_explained(graph, data):
    count = data.draw(st.integers(1, graph.num_ops))
    stage_of = [data.draw(st.integers(0, count - 1)) for _ in range(graph.num_ops)]
    edges = {(stage_of[e.source], stage_of[e.target]) for e in graph.edges if stage_of[e.source] != stage_of[e.target]}
    orders = (dict(zip(order, range(count), strict=True)) for order in itertools.permutations(range(count)))
    fine = any(all(place[a] < place[b] for a, b in edges) for place in orders)
    assert (find_stage_cycle(graph, stage_of) == "") == fine
    paths = reaches(graph)
    for stage in range(count):
        ops = [i for i, s in enumerate(stage_of) if s == stage]
        way = find_way_back(graph, ops)
        outside = [i for i in range(graph.num_ops) if i not in ops]
        convex = not any((a, v) in paths and (v, b) in paths for a in ops for b in ops for v in outside)
        assert bool(way) != convex
        if way:
            assert way[0] in ops
            assert way[-1] in ops
            assert all(op in outside for op in way[1:-1])
            assert all(pair in graph.edge_bytes for pair in itertools.pairwise(way))


@given(plans())
@settings(max_examples=60, deadline=None)
def test_round_trip(plan):
    again = PipelinePlan.from_json(plan.to_json())
    assert again == plan
    assert again.predict() == plan.predict()


def test_files(tmp_path):
    options = {"schedule": "kfkb", "schedule_options": {"k": (1, 2, 1, 1)}}
    plan = diamond(planner="by hand", search_seconds=0.5, notes=["It is by hand."], **options)
    plan.save(tmp_path / "plan.json")
    again = PipelinePlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.notes == ("It is by hand.",)
    assert str(again).endswith("\nIt is by hand.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"format": "jaxpar plan, version 1"',
            '"format": "jaxpar plan, version 0"',
            "format is 'jaxpar plan, version 0'",
        ),
        ('"microbatch": 2', '"microbatch": "two"', "its plan has a value of the wrong kind"),
        ('"num_microbatches": 8,', "", "its plan lacks 'num_microbatches'"),
        ('"ops": ["net/in"]', '"ops": ["net/inn"]', "stage 0 has operators that its graph doesn't have: 'net/inn'"),
        ('"ops": ["net/in"]', '"ops": []', "(?s)stage 0 has no operators.*in no stage: 'net/in'"),
        ('"latency": 0.0', '"latency": -1', "latency of at least 0"),
        ('"kinds": [', '"kind": [', "its cluster lacks 'kinds'"),
    ],
)
def test_bad_json(old, new, message):
    text = diamond().to_json()
    assert old in text
    with pytest.raises(PlanError, match=message):
        PipelinePlan.from_json(text.replace(old, new))


def test_plans_that_are_no_plans():
    graph = two_branches()
    with pytest.raises(PlanError) as failure:
        PipelinePlan(
            graph,
            CLUSTER,
            (PlannedStage((0, 1, 2), (0, 8)), PlannedStage((2, 3, 9), ()), PlannedStage((), (1, 1))),
            0,
            1,
        )
    for part in (
        "b and M are at least 1, got 0 and 1",
        "stage 0 has the devices [8], but devices are 0 ... 7",
        "operator 'net/a_1' is in the stages 0 and 1",
        "stage 1 has the operators [9], but operators are 0 ... 5",
        "stage 1 has no devices",
        "stage 2 has no operators",
        "stage 2 has some devices more than once",
        "in no stage: 'net/b_1', 'net/out'",
    ):
        assert part in str(failure.value)


def test_check_names_everything():
    plan = replace(diamond(), stages=diamond().stages[::-1], microbatch=3)
    with pytest.raises(PlanError) as failure:
        replace(plan, stages=(replace(plan.stages[0], devices=(3, 1)), *plan.stages[1:])).check()
    for part in (
        "stages 0 and 1",
        "stage 0 has 2 replicas, which can't share a micro-batch of 3 examples evenly",
        "stage 3 feeds stage 1: list stages in a topological order",
    ):
        assert part in str(failure.value)


def test_check_of_schedules_and_devices():
    plan = diamond()
    for options, message in (
        ({"schedule": "2f2b"}, "no schedule is called '2f2b'; known: gpipe, 1f1b"),
        ({"schedule_options": {"extras": 1}}, "schedule '1f1b' takes extra, exchange, not extras"),
        ({"schedule_options": {"extra": -1}}, "extra .* is at least 0, got -1"),
        ({"graph": replace(plan.graph, device="abacus")}, "times are for the device 'abacus'"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(plan, **options).check()


def test_stages_may_share_all_of_their_devices():
    plan = diamond()
    shared = replace(plan, stages=(*plan.stages[:3], replace(plan.stages[3], devices=(0,))))
    shared.check()
    assert shared.rank_of == (0, 1, 2, 0)
    assert shared.dag.num_ranks == 3
    assert shared.bottleneck == 6.0


def test_too_little_memory_says_how_much_and_what_would_help():
    plan = replace(diamond(), microbatch=256, num_microbatches=4)
    with pytest.raises(PlanError) as failure:
        plan.check()
    need = stage_memory(plan, 0, 3)
    assert need == 40 + 3 * 5 * 256
    text = str(failure.value)
    assert "stage 0 needs 3.8 KiB on each device, 2.8 KiB more than the 1000 B of toy: 40 B of state" in text
    assert "stage 3" in text  # all stages that are too large, not only the first
    assert "micro-batches of 64 examples" in text
    replace(plan, microbatch=16).check()
    heavy = [replace(op, state_bytes=2000.0) for op in plan.graph.ops]
    with pytest.raises(PlanError, match="Its state alone is too much"):
        replace(plan, graph=OpGraph(tuple(heavy), plan.graph.edges)).check()


@given(plans())
@settings(max_examples=60, deadline=None)
def test_the_check_draws_the_line_at_what_devices_have(plan):
    each = [stage_memory(plan, s, plan.in_flight[s]) for s in range(len(plan.stages))]
    need = max(sum(x for x, r in zip(each, plan.rank_of, strict=True) if r == rank) for rank in set(plan.rank_of))
    assume(need > 0)
    assert all(a <= b for a, b in zip(plan.predict().memory_bytes, each, strict=True))
    enough, less = (
        ClusterSpec.homogeneous(replace(TOY, memory_bytes=need * x), plan.cluster.num_devices, Link())
        for x in (1, 0.99)
    )
    replace(plan, cluster=enough).check()
    with pytest.raises(PlanError, match=r"needs? .* on each device, .* more than the .* of toy"):
        replace(plan, cluster=less).check()


def test_move():
    plan = diamond()
    moved = plan.move("net/a_1", to=3)
    assert moved.stage_of == (0, 1, 3, 2, 2, 3)
    assert plan.stage_of == (0, 1, 1, 2, 2, 3)
    assert moved.planner == "edited"
    moved.check()
    with pytest.raises(PlanError, match=r"leaves stage 0 without operators: .* plan.merge"):
        plan.move("net/in", to=1)
    with pytest.raises(
        PlanError, match="stage 0 is not convex: 'net/in' -> 'net/a_0' -> 'net/a_1' leaves it for stage 1"
    ):
        plan.move("net/a_1", to=0)
    with pytest.raises(PlanError, match=r"called 'net/a_2' \(did you mean 'net/a_"):
        plan.move("net/a_2", to=0)
    with pytest.raises(PlanError, match=r"there is no stage 7: stages are 0 \.\.\. 3"):
        plan.move("net/a_1", to=7)


def test_stages_that_wait_for_each_other_without_a_path_through_one():
    graph = OpGraph.build([Op(n, 1.0) for n in "abcd"], [("a", "b"), ("c", "d")])
    problem = find_stage_cycle(graph, [0, 1, 1, 0])
    assert problem.startswith("the stages wait for each other: ")
    assert "stage 0 feeds stage 1 by 'a' -> 'b'" in problem
    assert "stage 1 feeds stage 0 by 'c' -> 'd'" in problem


def test_merge_and_split():
    plan = diamond()
    merged = plan.merge(1, 2)
    assert merged.stages[1] == PlannedStage((1, 2, 3, 4), (1, 2, 3))
    assert len(merged.stages) == 3
    again = merged.split(1, ["net/b_0", "net/b_1"], devices=(2, 3))
    assert set(again.stages) == set(plan.stages)
    with pytest.raises(PlanError, match="stage 0 is not convex"):
        plan.merge(0, 3)
    with pytest.raises(PlanError, match="can't give away 'net/in', which it doesn't hold"):
        plan.split(1, "net/in", devices=(5,))
    with pytest.raises(PlanError, match=r"has the devices .1,. and keeps none"):
        plan.split(1, "net/a_0", devices=(1,))


@given(plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_every_move_gives_a_plan_in_order_or_says_why_not(plan, data):
    op, to = data.draw(st.integers(0, plan.graph.num_ops - 1)), data.draw(st.integers(0, len(plan.stages) - 1))
    try:
        moved = plan.move(op, to)
    except PlanError as error:
        assert any(words in str(error) for words in ("not convex", "wait for each other", "without operators"))  # noqa: PT017
        return
    assert all(a < b for a, b in moved.edges)
    assert sorted(stage.devices for stage in moved.stages) == sorted(stage.devices for stage in plan.stages)
    target = next(s for s in moved.stages if op in s.ops)
    assert target.devices == plan.stages[to].devices
    assert set(target.ops) == {*plan.stages[to].ops, op}


@given(op_graphs(max_ops=6), st.data())
@settings(deadline=None)
def test_pins_are_accepted_exactly_when_stages_can_keep_them(graph, data):
    names = data.draw(st.lists(st.sampled_from([op.name for op in graph.ops]), unique=True))
    pins = {name: data.draw(st.integers(0, 2)) for name in names}
    pinned = {graph.index[name]: stage for name, stage in pins.items()}
    fits = [
        stages
        for stages in itertools.product(range(3), repeat=graph.num_ops)
        if all(stages[i] == s for i, s in pinned.items())
        and all(stages[e.source] <= stages[e.target] for e in graph.edges)
    ]
    if not fits:
        with pytest.raises(PlanError, match="no stages are convex and in order with these pins"):
            resolve_pins(graph, pins)
        return
    between = {
        i: stages.pop()
        for i in range(graph.num_ops)
        if len(stages := {fit[i] for fit in fits}) == 1 and (i in pinned or stages not in ({0}, {2}))
    }
    found = resolve_pins(graph, pins)
    assert found.items() >= pinned.items()
    assert found.items() >= between.items()
    assert all({fit[i] for fit in fits} == {stage} for i, stage in found.items())


def test_pins():
    graph = two_branches()
    assert resolve_pins(graph, {"net": 1, "net/in": 0}) == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    with pytest.raises(
        PlanError, match=r"'net/a_0' \(stage 1\) -> 'net/a_1' -> 'net/out' \(stage 0\) leads from stage 1"
    ):
        resolve_pins(graph, {"net/a_0": 1, "net/out": 0})
    with pytest.raises(PlanError, match="called 'nett'"):
        resolve_pins(graph, {"nett": 0})
    with pytest.raises(PlanError, match="not to negative ones: 'net/in'"):
        resolve_pins(graph, {"net/in": -1})
    assert diamond().with_pins({"net/a_1": 3}).stage_of == (0, 1, 3, 2, 2, 3)


def test_sort_stages():
    plan = diamond()
    assert sort_stages(plan.graph, plan.stages) == plan.stages
    back = sort_stages(plan.graph, plan.stages[::-1])
    assert back == (plan.stages[0], plan.stages[2], plan.stages[1], plan.stages[3])


def test_a_changed_program():
    plan = diamond()
    plan.check_program(two_branches())
    graph = two_branches()
    ops = [
        Op("net/a_0", 9.0, kind="other"),
        *[op for op in graph.ops if op.name not in ("net/a_0", "net/b_1")],
        Op("new", 1.0),
    ]
    index = {op.name: i for i, op in enumerate(ops)}
    edges = [
        OpEdge(index[a], index[b], 1.0)
        for a, b in [
            ("net/in", "net/a_0"),
            ("net/a_0", "net/a_1"),
            ("net/a_1", "net/out"),
            ("net/in", "net/b_0"),
            ("new", "net/out"),
        ]
    ]
    with pytest.raises(PlanError) as failure:
        plan.check_program(OpGraph(tuple(ops), tuple(edges)))
    for part in (
        "stage 1: 'net/a_0' computes something else",
        "stage 2: 'net/b_1' is gone",
        "stage 3: 'net/out' reads no longer 'net/b_1' and now also 'new'",
        "in no stage: 'new' is new",
    ):
        assert part in str(failure.value)


def test_requests():
    graph = two_branches()
    check_request(graph, CLUSTER, 4)
    with pytest.raises(PlanError, match="the batch has 0 examples"):
        check_request(graph, CLUSTER, 0)
    with pytest.raises(PlanError, match="9 devices are asked for, and the cluster has 8"):
        check_request(graph, CLUSTER, 4, 9)
    with pytest.raises(
        PlanError, match=r"8 devices are more than can be used: 6 operators .* take 6; ask for num_devices=6"
    ):
        check_request(graph, CLUSTER, 1)


def test_table():
    plan = diamond(planner="hand", search_seconds=0.25)
    plan = replace(plan, stages=(*plan.stages[:3], replace(plan.stages[3], recompute=True)))
    assert (
        str(plan)
        == """\
Plan by hand, found in 0.25 s: 4 stages, depth 3, on 5 of 8 devices; 8 micro-batches of 2 examples, 1f1b extra=0
Cluster: 8 x toy; 1e-06 GB/s among 8
stage  operators  devices  replicas  share  F ms  B ms  memory   of  in flight  recompute  sends
    0  in               0         1  15.8%  2000  4000    70 B   7%          3  no         to 1: 16 B, to 2: 16 B
    1  a_0, a_1         1         1  31.6%  4000  8000   120 B  12%          2  no         to 3: 16 B
    2  b_0, b_1       2,3         2  31.6%  2000  4000   100 B  10%          2  no         to 3: 16 B
    3  out              4         1  21.1%  2000  6000    82 B   8%          1  yes        -
Predicted: 116.2 s a step in the executor's lockstep, 0.1377 examples/s; 106.1 s if ranks ran freely
  timetable 116.2 s with a bubble of 47.7%, gradients 0.02 s, update 1.4e-07 s"""
    )


def test_operators_in_words():
    names = [f"net/branch_{k}/layer_{i}" for k in range(2) for i in range(10)] + ["net/norm", "net/head"]
    graph = OpGraph.build([Op(n, 1.0) for n in names], [])
    assert describe_ops(graph, range(10)) == "branch_0/layer_0 ... layer_9 (10)"
    assert describe_ops(graph, range(14)) == "branch_0/layer_0 ... layer_9, branch_1/layer_0 ... layer_3 (14)"
    assert describe_ops(graph, range(22)) == "branch_0, branch_1, norm, head (22)"
    assert describe_ops(graph, [18, 19, 20, 21]) == "branch_1/layer_8, layer_9, norm, head"
    blocks = [f"layer_{i}/{part}" for i in range(4) for part in ("attention", "mlp", "norm_1", "norm_2")]
    graph = OpGraph.build([Op(n, 1.0) for n in blocks], [])
    assert describe_ops(graph, range(2, 13)) == "layer_0 ... layer_3 (11)"
    assert describe_ops(graph, range(2)) == "layer_0/attention, layer_0/mlp"
