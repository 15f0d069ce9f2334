import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import PlanError
from jaxpar.plan import DEVICES, PRESETS, ClusterSpec, DeviceSpec, Level, LinkMatrix
from jaxpar.plan.plan_json import cluster_from_dict, cluster_to_dict
from jaxpar.schedule import Link

from .strategies import clusters

TOY = DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1e9, memory_bandwidth=1e9)


@st.composite
def groups(draw):
    senders, receivers = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cluster = draw(clusters(senders + receivers))
    ids = draw(st.permutations(range(senders + receivers)))
    return cluster, tuple(ids[:senders]), tuple(ids[senders:])


@given(groups())
def test_group_links_carry_each_row_from_where_it_is_to_where_it_is_needed(case):
    cluster, senders, receivers = case
    rows = math.lcm(len(senders), len(receivers))
    busy, latency = {}, 0.0
    for row in range(rows):
        a, b = senders[row * len(senders) // rows], receivers[row * len(receivers) // rows]
        link = cluster.link(a, b)
        latency = max(latency, link.latency)
        places = [("from", a), ("to", b)]
        if not isinstance(cluster.links, LinkMatrix) and cluster.links[1].shared:
            size = cluster.links[0].size
            places += [("from node", a // size), ("to node", b // size)] * (a // size != b // size)
        for place in places:
            busy[place] = busy.get(place, 0) + Fraction(1, rows) * Fraction(1 / link.bandwidth)
    found = cluster.group_link(senders, receivers)
    assert found.latency == latency
    assert 1 / found.bandwidth == pytest.approx(float(max(busy.values())))


@given(st.integers(1, 6).flatmap(clusters))
def test_clusters_round_trip(cluster):
    assert cluster_from_dict(cluster_to_dict(cluster)) == cluster


def test_levels_nest():
    cluster = ClusterSpec.hierarchy(TOY, [Level(2, Link(0, 4e9)), Level(4, Link(1, 2e9)), Level(8, Link(2, 1e9))])
    assert [cluster.link(0, b).bandwidth for b in (1, 2, 3, 4, 7)] == [4e9, 2e9, 2e9, 1e9, 1e9]
    assert cluster.link(3, 3) == Link()
    assert cluster.all_reduce_seconds((5,), 1e9) == 0
    assert cluster.all_reduce_seconds((0, 1), 1e9) == pytest.approx(0.25)
    assert cluster.all_reduce_seconds((0, 1, 2, 3), 1e9) == pytest.approx(2 * 3 / 4 / 2 + 2 * 3 * 1)


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ((Level(2, Link()), Level(3, Link())), "groups of 3 devices don't consist of groups of 2"),
        ((Level(2, Link()),), "the outermost link joins 2 devices, so the rest has none: give a Level of size 3"),
        (
            LinkMatrix.of([[0, 1], [1, 0]], np.ones((3, 3))),
            r"the latency matrix has 2 rows of 2 numbers, but 3 devices",
        ),
        (
            LinkMatrix.of(np.zeros((3, 3)), [[1, 2, 3]] * 3),
            r"bandwidth\[0\]\[1\] is 2, \[1\]\[0\] is 1: links are the same",
        ),
        (LinkMatrix.of(np.full((3, 3), np.nan), np.ones((3, 3))), r"latency\[0\]\[1\] is nan, but must be finite"),
        (
            LinkMatrix.of(-np.ones((3, 3)), np.ones((3, 3))),
            r"latency\[2\]\[1\] is -1, but must be finite and at least 0",
        ),
        (LinkMatrix.of(np.zeros((3, 3)), np.zeros((3, 3))), r"bandwidth\[0\]\[2\] is 0, but must be above 0"),
    ],
)
def test_bad_links(links, message):
    with pytest.raises(PlanError, match=message):
        ClusterSpec((TOY,) * 3, links)


def test_bad_devices():
    with pytest.raises(PlanError, match=r"'x': flops\['bfloat16'\] is nan.*memory_bytes is 0.*no 'float32'"):
        DeviceSpec("x", {"bfloat16": math.nan}, 0, 1e9)
    with pytest.raises(PlanError, match="two different kinds of device are called 'toy'"):
        ClusterSpec((TOY, DeviceSpec("toy", {"float32": 2e12}, 1e9, 1e9)), (Level(2, Link()),))
    with pytest.raises(PlanError, match=r"no preset is called 'v1'; known: v100, a100"):
        ClusterSpec.preset("v1", 4)


def test_presets_are_what_they_should_be():
    for name, preset in PRESETS.items():
        assert DEVICES[name] == preset.device
        assert preset.device.name == name
        assert preset.device.source
        assert preset.links_source
        assert preset.inside.bandwidth > preset.outside.bandwidth
        assert preset.device.peak("bfloat16") >= preset.device.peak("float32")
    v100 = ClusterSpec.preset("v100", 32)
    assert v100.num_devices == 32
    assert (v100.link(0, 3).bandwidth, v100.link(3, 4).bandwidth) == (50e9, 12.5e9)
    assert v100.group_link((0, 1, 2, 3), (4, 5, 6, 7)).bandwidth == pytest.approx(12.5e9)  # one card for the node
    h100 = ClusterSpec.preset("h100", 16)
    assert h100.group_link(range(8), range(8, 16)).bandwidth == pytest.approx(8 * 50e9)  # one for each device


def _mesh(kinds, processes, platform="gpu"):
    devices = [
        SimpleNamespace(device_kind=kind, platform=platform, process_index=p)
        for kind, p in zip(kinds, processes, strict=True)
    ]
    return SimpleNamespace(devices=np.array(devices, dtype=object).reshape(2, -1))


def test_from_mesh():
    two_nodes = ClusterSpec.from_mesh(_mesh(["NVIDIA H100 80GB HBM3"] * 8, [0] * 4 + [1] * 4))
    assert two_nodes == ClusterSpec.preset("h100", 8, node_size=4)
    mixed_up = ClusterSpec.from_mesh(_mesh(["NVIDIA H100 80GB HBM3"] * 4, [0, 1, 0, 1]))
    assert [mixed_up.link(0, b).bandwidth for b in (1, 2, 3)] == [50e9, 450e9, 50e9]
    small = ClusterSpec.from_mesh(_mesh(["NVIDIA A100-SXM4-40GB"] * 2, [0, 0]))
    assert small.devices[0].memory_bytes == 40e9
    assert small.devices[0].flops == DEVICES["a100"].flops
    slice_of_tpus = ClusterSpec.from_mesh(_mesh(["TPU v5 lite"] * 8, [0] * 4 + [1] * 4, "tpu"))
    assert slice_of_tpus.link(0, 7) == PRESETS["tpu_v5e"].inside  # hosts don't matter within a slice
    unequal = ClusterSpec.from_mesh(_mesh(["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"], [0, 0]))
    assert unequal.link(0, 1).bandwidth == 300e9
    assert unequal.speed(1) == pytest.approx(312 / 989.4)
    assert ClusterSpec.from_mesh(_mesh(["cpu"] * 4, [0] * 4, "cpu")) == ClusterSpec.preset("cpu", 4, node_size=4)


def test_from_mesh_of_unknown_devices():
    mesh = _mesh(["Abacus 9000"] * 2, [0, 0])
    with pytest.raises(PlanError, match=r"of the kind 'Abacus 9000'; known: v100.*device=DeviceSpec"):
        ClusterSpec.from_mesh(mesh)
    assert ClusterSpec.from_mesh(mesh, TOY).devices == (TOY, TOY)


def test_from_a_real_mesh():
    import jax

    mesh = jax.make_mesh((4, 2), ("stage", "data"))
    cluster = ClusterSpec.from_mesh(mesh)
    assert cluster.num_devices == 8
    assert cluster.devices[0] == DEVICES["cpu"]
