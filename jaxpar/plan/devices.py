"""Well-known devices and the nodes that they come in: peak figures from their vendors' data sheets.

Peaks are of dense arithmetic, without structured sparsity. Bandwidths of links are in one direction; where a data sheet
gives the sum of both, it is halved. Latencies are not in data sheets: they are of the size that collective libraries
show for small messages, a few microseconds inside a node and some ten between nodes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec, DeviceSpec, Level, LinkMatrix
from jaxpar.schedule.costs import Link

_T, _G, _GIB = 1e12, 1e9, 2.0**30


@dataclass(frozen=True)
class Preset:
    """A device, how many share a node, and the links in the node and between nodes.

    Args:
      device: its figures.
      kinds: a regular expression for the `device_kind` that JAX reports, in lower case.
      node_size: devices joined by `inside`. For TPUs this is the largest slice, all of it joined by the chips' own
        links, whatever the hosts.
      inside: the link of two devices in a node.
      outside: the link between nodes.
      shared: the devices of a node share one way out with the bandwidth of `outside`; else each has it for itself.
      links_source: where the links' figures are from.
    """

    device: DeviceSpec
    kinds: str
    node_size: int
    inside: Link
    outside: Link
    shared: bool = False
    links_source: str = ""


_NEAR, _FAR = 5e-6, 15e-6

_V100 = DeviceSpec(
    "v100",
    {"float64": 7.8 * _T, "float32": 15.7 * _T, "float16": 125 * _T},
    16 * _G,
    900 * _G,
    "NVIDIA V100 Tensor Core GPU data sheet (2020), V100 SXM2 16 GB",
)
_A100 = DeviceSpec(
    "a100",
    {"float64": 19.5 * _T, "float32": 19.5 * _T, "tf32": 156 * _T, "bfloat16": 312 * _T, "float16": 312 * _T},
    80 * _G,
    2039 * _G,
    "NVIDIA A100 Tensor Core GPU data sheet (2021), A100 80GB SXM",
)
_HOPPER = {
    "float64": 67 * _T,
    "float32": 67 * _T,
    "tf32": 494.7 * _T,
    "bfloat16": 989.4 * _T,
    "float16": 989.4 * _T,
    "float8": 1978.9 * _T,
}
_H100 = DeviceSpec(
    "h100",
    _HOPPER,
    80 * _G,
    3.35 * _T,
    "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM; H100 architecture white paper",
)
_H200 = DeviceSpec("h200", _HOPPER, 141 * _G, 4.8 * _T, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM")
_B200 = DeviceSpec(
    "b200",
    {
        "float64": 37 * _T,
        "float32": 75 * _T,
        "tf32": 1100 * _T,
        "bfloat16": 2250 * _T,
        "float16": 2250 * _T,
        "float8": 4500 * _T,
    },
    180 * _G,
    8 * _T,
    "NVIDIA DGX B200 and HGX B200 data sheets, an eighth of the system; sparse figures halved",
)


def _tpu(name: str, bfloat16: float, memory: float, bandwidth: float, source: str) -> DeviceSpec:
    # JAX multiplies float32 matrices on a TPU in one pass of bfloat16 unless it is told another precision.
    return DeviceSpec(name, {"float32": bfloat16, "bfloat16": bfloat16}, memory, bandwidth, source)


_TPU_V4 = _tpu("tpu_v4", 275 * _T, 32 * _GIB, 1200 * _G, "Google Cloud documentation, TPU v4: system architecture")
_TPU_V5E = _tpu("tpu_v5e", 197 * _T, 16 * _GIB, 819 * _G, "Google Cloud documentation, TPU v5e: system architecture")
_TPU_V5P = _tpu("tpu_v5p", 459 * _T, 95 * _GIB, 2765 * _G, "Google Cloud documentation, TPU v5p: system architecture")
_TPU_V6E = _tpu("tpu_v6e", 918 * _T, 32 * _GIB, 1638 * _G, "Google Cloud documentation, TPU v6e: system architecture")
_CPU = DeviceSpec(
    "cpu",
    {"float64": 25 * _G, "float32": 50 * _G},
    16 * _GIB,
    20 * _G,
    "round figures of one core of a present-day CPU; measured costs are what counts there",
)

_PAGES = "system architecture pages of the Google Cloud TPU documentation: "
PRESETS: Mapping[str, Preset] = {
    "v100": Preset(
        _V100,
        r"v100",
        4,
        Link(_NEAR, 50 * _G),
        Link(_FAR, 12.5 * _G),
        True,
        "V100 data sheet: six NVLinks of 25 GB/s a direction, two to each of three peers; one 100 Gb/s card a node",
    ),
    "a100": Preset(
        _A100,
        r"a100",
        8,
        Link(_NEAR, 300 * _G),
        Link(_FAR, 25 * _G),
        False,
        "A100 data sheet: NVLink 600 GB/s both ways; DGX A100 data sheet: 200 Gb/s for each GPU",
    ),
    "h100": Preset(
        _H100,
        r"h100",
        8,
        Link(_NEAR, 450 * _G),
        Link(_FAR, 50 * _G),
        False,
        "H100 data sheet: NVLink 900 GB/s both ways; DGX H100 data sheet: 400 Gb/s for each GPU",
    ),
    "h200": Preset(
        _H200,
        r"(?<!g)h200",  # not of a GH200, whose name tells the memory of its CPU
        8,
        Link(_NEAR, 450 * _G),
        Link(_FAR, 50 * _G),
        False,
        "H200 data sheet: NVLink 900 GB/s both ways; DGX H200 data sheet: 400 Gb/s for each GPU",
    ),
    "b200": Preset(
        _B200,
        r"b200",
        8,
        Link(_NEAR, 900 * _G),
        Link(_FAR, 50 * _G),
        False,
        "DGX B200 data sheet: NVLink 14.4 TB/s both ways for eight GPUs; 400 Gb/s for each GPU",
    ),
    "tpu_v4": Preset(
        _TPU_V4,
        r"tpu v4",
        4096,
        Link(1e-6, 50 * _G),
        Link(_FAR, 6.25 * _G),
        links_source="Jouppi et al. 2023, https://arxiv.org/abs/2304.01433: six links of 50 GB/s; outside as v5p",
    ),
    "tpu_v5e": Preset(
        _TPU_V5E,
        r"tpu v5 ?lite|tpu v5e",
        256,
        Link(1e-6, 50 * _G),
        Link(_FAR, 3.125 * _G),
        links_source=_PAGES + "400 GB/s both ways over four ports; two 100 Gb/s cards for eight chips",
    ),
    "tpu_v5p": Preset(
        _TPU_V5P,
        r"tpu v5p|tpu v5$",
        8960,
        Link(1e-6, 100 * _G),
        Link(_FAR, 6.25 * _G),
        links_source=_PAGES + "1200 GB/s both ways over six ports; 50 Gb/s a chip between slices",
    ),
    "tpu_v6e": Preset(
        _TPU_V6E,
        r"tpu v6 ?lite|tpu v6e",
        256,
        Link(1e-6, 100 * _G),
        Link(_FAR, 12.5 * _G),
        links_source=_PAGES + "800 GB/s both ways over four ports; four 200 Gb/s cards for eight chips",
    ),
    "cpu": Preset(
        _CPU,
        r"cpu",
        64,
        Link(_NEAR, 10 * _G),
        Link(5e-5, 1.25 * _G),
        True,
        "round figures: a copy through memory in a host, 10 Gb/s Ethernet between hosts",
    ),
}

DEVICES: Mapping[str, DeviceSpec] = {name: preset.device for name, preset in PRESETS.items()}


def find_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
      PlanError: there is none, and which there are.
    """
    if name not in PRESETS:
        raise PlanError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}; or make a ClusterSpec by hand")
    return PRESETS[name]


def preset_cluster(name: str, num_devices: int, node_size: int | None = None) -> ClusterSpec:
    """See `ClusterSpec.preset`."""
    return _lay_out(find_preset(name), num_devices, node_size)


def _lay_out(preset: Preset, num_devices: int, node_size: int | None) -> ClusterSpec:
    node = preset.node_size if node_size is None else node_size
    if num_devices < 1 or node < 1:
        raise PlanError(f"a cluster has at least one device in nodes of at least one, got {num_devices} and {node}")
    nodes = -(-num_devices // node)
    levels = [Level(node, preset.inside)]
    if nodes > 1:
        levels.append(Level(node * nodes, preset.outside, preset.shared))
    return ClusterSpec.hierarchy(preset.device, levels, num_devices)


def match_device_kind(kind: str) -> str | None:
    """The preset of a `device_kind` as JAX reports it; None if there is none.

    >>> [match_device_kind(k) for k in ("NVIDIA H100 80GB HBM3", "TPU v5 lite", "TPU v5p", "cpu", "Abacus")]
    ['h100', 'tpu_v5e', 'tpu_v5p', 'cpu', None]
    """
    return next((name for name, preset in PRESETS.items() if re.search(preset.kinds, kind.lower())), None)


_NEAREST = {"gpu": "a100", "cuda": "a100", "rocm": "a100", "tpu": "tpu_v4"}  # whose links unknown kinds are given


def cluster_of_mesh(mesh: Any, device: DeviceSpec | None = None) -> ClusterSpec:
    """See `ClusterSpec.from_mesh`."""
    found = list(mesh.devices.flat)
    kinds = [str(getattr(d, "device_kind", d.platform)) for d in found]
    names = ["cpu" if d.platform == "cpu" else match_device_kind(k) for d, k in zip(found, kinds, strict=True)]
    unknown = sorted({kind for kind, name in zip(kinds, names, strict=True) if name is None})
    if unknown and device is None:
        raise PlanError(
            f"no preset is known for devices of the kind {', '.join(map(repr, unknown))}; known: {', '.join(PRESETS)}. "
            "Give ClusterSpec.from_mesh(mesh, device=DeviceSpec(...))"
        )
    presets = [PRESETS[name or _NEAREST.get(d.platform, "cpu")] for d, name in zip(found, names, strict=True)]
    specs = [device or _fit_memory(p.device, k) for p, k in zip(presets, kinds, strict=True)]
    nodes = [_node_of(d) for d in found]
    size = max(nodes.count(node) for node in nodes)
    in_order = all(a == b for a, b in zip(nodes, (n for n in dict.fromkeys(nodes) for _ in range(size)), strict=False))
    if in_order and len({p.device.name for p in presets}) == 1:
        levels = _lay_out(presets[0], len(found), size).links
        return ClusterSpec(tuple(specs), levels)
    return ClusterSpec(tuple(specs), _join_pairs(nodes, presets))


def _node_of(device: Any) -> int:
    """TPU chips of one slice are joined whatever their hosts; other devices are in the node of their process."""
    if device.platform == "tpu":
        return int(getattr(device, "slice_index", None) or 0)
    return int(device.process_index)


def _fit_memory(spec: DeviceSpec, kind: str) -> DeviceSpec:
    """The variant with the memory that the kind's name tells, such as 40 GB in "NVIDIA A100-SXM4-40GB"."""
    told = re.search(r"(\d+) ?gb", kind.lower())
    if told is None or float(told[1]) * _G == spec.memory_bytes:
        return spec
    return replace(spec, name=f"{spec.name}_{told[1]}gb", memory_bytes=float(told[1]) * _G)


def _join_pairs(nodes: Sequence[int], presets: Sequence[Preset]) -> LinkMatrix:
    """The slower of both devices' links; devices that share a node's way out have each their part of it."""
    count = len(nodes)
    links = [[Link() for _ in range(count)] for _ in range(count)]
    for a in range(count):
        for b in range(count):
            if a != b:
                links[a][b] = _slower(*(_link_of(i, nodes[a] == nodes[b], nodes, presets) for i in (a, b)))
    latency, bandwidth = ([[getattr(x, what) for x in row] for row in links] for what in ("latency", "bandwidth"))
    return LinkMatrix.of(latency, bandwidth)


def _link_of(i: int, same_node: bool, nodes: Sequence[int], presets: Sequence[Preset]) -> Link:
    if same_node:
        return presets[i].inside
    outside = presets[i].outside
    share = nodes.count(nodes[i]) if presets[i].shared else 1
    return Link(outside.latency, outside.bandwidth / share)


def _slower(a: Link, b: Link) -> Link:
    return Link(max(a.latency, b.latency), min(a.bandwidth, b.bandwidth))
