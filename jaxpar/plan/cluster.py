"""The machine that a plan is for: devices, and the links between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from jaxpar.errors import PlanError
from jaxpar.schedule.costs import Link


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device.

    Args:
      name: what people call it; unique among the kinds of a cluster.
      flops: peak floating-point operations per second by the name of the number type; "float32" at least.
      memory_bytes: of the device's own memory.
      memory_bandwidth: bytes per second between it and that memory.
      source: where the figures are from.

    Raises:
      PlanError: a figure is not above 0, or float32 is missing.

    >>> DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1e9, memory_bandwidth=1e11).peak("int8")
    1000000000000.0
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    source: str = ""

    def __post_init__(self) -> None:
        figures = {**{f"flops[{t!r}]": x for t, x in self.flops.items()}}
        figures |= {"memory_bytes": self.memory_bytes, "memory_bandwidth": self.memory_bandwidth}
        problems = [f"{what} is {x:g}, but must be above 0" for what, x in figures.items() if not x > 0]
        if "float32" not in self.flops:
            problems.append(f"flops has no 'float32', only {', '.join(map(repr, self.flops)) or 'nothing'}")
        if problems:
            raise PlanError(f"device {self.name!r}: " + "; ".join(problems))

    def __hash__(self) -> int:
        return hash((self.name, self.memory_bytes, self.memory_bandwidth))

    def peak(self, dtype: str) -> float:
        """Floating-point operations per second in `dtype`; a type with no figure of its own runs as float32 does."""
        return self.flops.get(dtype, self.flops["float32"])

    @property
    def fastest(self) -> float:
        """Floating-point operations per second in the type that it is fastest at, of those that people train in."""
        return max(self.peak(t) for t in ("float16", "bfloat16", "float32"))


@dataclass(frozen=True)
class Level:
    """Groups of devices joined by equal links: devices `0 ... size-1` are the first group, and so on.

    Args:
      size: devices in a group.
      link: between any two devices of a group that no smaller group holds.
      shared: the bandwidth is that of each smaller group's way out, which its devices share, as those of a node do
        that has one network card; else each device has it for itself.
    """

    size: int
    link: Link
    shared: bool = False


@dataclass(frozen=True)
class LinkMatrix:
    """A link for each pair of devices; the diagonal is not looked at.

    Args:
      latency: seconds, `latency[a][b]`.
      bandwidth: bytes per second, `bandwidth[a][b]`, in one direction; the directions don't disturb each other.
    """

    latency: tuple[tuple[float, ...], ...]
    bandwidth: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, latency: Any, bandwidth: Any) -> LinkMatrix:
        """From nested sequences or arrays."""
        return cls(*(tuple(tuple(float(x) for x in row) for row in matrix) for matrix in (latency, bandwidth)))


@dataclass(frozen=True)
class ClusterSpec:
    """Devices and links.

    Args:
      devices: one entry for each device; its position is the device's id.
      links: levels of a hierarchy, innermost first; or a matrix.

    Raises:
      PlanError: all that is wrong with it: no devices, groups that don't nest, a matrix that isn't square or symmetric
        or has numbers out of range.

    >>> toy = DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1e9, memory_bandwidth=1e11)
    >>> nodes = ClusterSpec.hierarchy(toy, [Level(2, Link(0, 50e9)), Level(4, Link(1e-5, 10e9))])
    >>> nodes.link(0, 1).bandwidth, nodes.link(1, 2).bandwidth
    (50000000000.0, 10000000000.0)
    >>> nodes.transfer_seconds(1, 2, 1e9), round(nodes.all_reduce_seconds([0, 1, 2, 3], 1e9), 5)
    (0.10001, 0.15006)
    """

    devices: tuple[DeviceSpec, ...]
    links: tuple[Level, ...] | LinkMatrix
    _group_links: dict[tuple[tuple[int, ...], tuple[int, ...]], Link] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _slowness: dict[str, tuple[float, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        if not isinstance(self.links, LinkMatrix):
            object.__setattr__(self, "links", tuple(self.links))
        problems = list(_find_problems(self))
        if problems:
            raise PlanError(f"not a cluster of {len(self.devices)} devices:\n  " + "\n  ".join(problems))

    @classmethod
    def hierarchy(cls, device: DeviceSpec, levels: Sequence[Level], num_devices: int | None = None) -> ClusterSpec:
        """Equal devices in nested groups; as many as the outermost group holds unless told."""
        count = (levels[-1].size if levels else 1) if num_devices is None else num_devices
        return cls((device,) * count, tuple(levels))

    @classmethod
    def homogeneous(cls, device: DeviceSpec, n: int, link: Link) -> ClusterSpec:
        """`n` equal devices, any two joined by an equal link."""
        return cls((device,) * n, (Level(max(n, 1), link),))

    @classmethod
    def preset(cls, name: str, num_devices: int, node_size: int | None = None) -> ClusterSpec:
        """Equal devices of a well-known kind in their usual nodes; see `jaxpar.plan.devices.PRESETS`.

        Args:
          name: such as "v100", "h100" or "tpu_v5p".
          num_devices: how many.
          node_size: devices in a node, if not as usual.

        Raises:
          PlanError: no such preset, and which there are.

        >>> ClusterSpec.preset("v100", 8).link(3, 4).bandwidth
        12500000000.0
        """
        from jaxpar.plan.devices import preset_cluster

        return preset_cluster(name, num_devices, node_size)

    @classmethod
    def from_mesh(cls, mesh: Any, device: DeviceSpec | None = None) -> ClusterSpec:
        """The devices of a `jax.sharding.Mesh` in the order of `mesh.devices.flat`, nodes by their process.

        Args:
          mesh: a mesh, or anything with `devices[...]` that have `device_kind`, `platform` and `process_index`.
          device: what each device is, for kinds that have no preset.

        Raises:
          PlanError: a kind of device has no preset, and which have.
        """
        from jaxpar.plan.devices import cluster_of_mesh

        return cluster_of_mesh(mesh, device)

    @property
    def num_devices(self) -> int:
        """How many devices."""
        return len(self.devices)

    @cached_property
    def is_homogeneous(self) -> bool:
        """Whether all devices are equal; links may still differ."""
        return all(device == self.devices[0] for device in self.devices)

    def link(self, a: int, b: int) -> Link:
        """What joins two devices; free within one device."""
        if a == b:
            return Link()
        if isinstance(self.links, LinkMatrix):
            return Link(self.links.latency[a][b], self.links.bandwidth[a][b])
        return next(level.link for level in self.links if a // level.size == b // level.size)

    def transfer_seconds(self, a: int, b: int, size: float) -> float:
        """Seconds until `size` bytes of device `a` are on device `b`, the link being idle."""
        link = self.link(a, b)
        return link.latency + link.occupancy(size)

    def all_reduce_seconds(self, ids: Sequence[int], size: float) -> float:
        """Seconds in which each of the devices gets the sum of their `size` bytes, by a ring in the order of their ids.

            2 (d - 1) * (latency + size / d / bandwidth)        the largest latency and least bandwidth of the ring

        0 for one device. Of a shared link the ring uses each direction once, so it has all of its bandwidth.
        """
        ring = sorted(set(ids))
        if len(ring) < 2:
            return 0.0
        links = [self.link(a, b) for a, b in pairwise([*ring, ring[0]])]
        slowest = min(link.bandwidth for link in links)
        return 2 * (len(ring) - 1) * (max(link.latency for link in links) + size / len(ring) / slowest)

    def group_link(self, senders: Sequence[int], receivers: Sequence[int]) -> Link:
        """The link by which a value of one group of replicas, its rows split evenly, gets to another's.

        Replica i of d holds the rows from i/d to (i+1)/d, in the order given. Each receiver gets the rows that it needs
        from those that hold them; messages that leave or reach one device, or that share a link of their nodes, go one
        after the other; the slowest counts. The bandwidth is in bytes of the whole value:

            seconds = latency + bytes / bandwidth

        >>> toy = DeviceSpec("toy", {"float32": 1e12}, memory_bytes=1e9, memory_bandwidth=1e11)
        >>> cluster = ClusterSpec.homogeneous(toy, 6, Link(0, 10e9))
        >>> [cluster.group_link(a, b).bandwidth / 1e9 for a, b in [((0,), (1,)), ((0, 1), (2, 3)), ((0,), (1, 2))]]
        [10.0, 20.0, 10.0]
        """
        key = (tuple(senders), tuple(receivers))
        if key not in self._group_links:
            self._group_links[key] = _join_groups(self, *key)
        return self._group_links[key]

    def speed(self, i: int, relative_to: DeviceSpec | str = "", dtype: str | None = None) -> float:
        """How many times as fast device `i` computes: the ratio of peak operations per second.

        Args:
          i: a device.
          relative_to: a kind of device or its name; "" for the first of the cluster.
          dtype: the type of numbers; None for the fastest that each of them has.

        Raises:
          PlanError: no device is called `relative_to`, here or among the presets.
        """
        other = self.find_device(relative_to) if isinstance(relative_to, str) else relative_to
        device = self.devices[i]
        if device is other:
            return 1.0
        return device.fastest / other.fastest if dtype is None else device.peak(dtype) / other.peak(dtype)

    def slowdown(self, devices: Sequence[int], relative_to: str = "") -> float:
        """By what factor the slowest of some devices is slower than the device that times are for; see `speed`."""
        if relative_to not in self._slowness:
            other = self.find_device(relative_to)
            kinds = {device: 1 / self.speed(i, other) for i, device in enumerate(self.devices)}
            self._slowness[relative_to] = tuple(kinds[device] for device in self.devices)
        slowness = self._slowness[relative_to]
        return max(slowness[i] for i in devices)

    def find_device(self, name: str) -> DeviceSpec:
        """A kind of device by its name; "" for the first of the cluster.

        Raises:
          PlanError: no device is called so, here or among the presets.
        """
        from jaxpar.plan.devices import DEVICES

        known = {**DEVICES, **{device.name: device for device in self.devices}}
        if name and name not in known:
            raise PlanError(
                f"times are for the device {name!r}, which is neither in the cluster nor a preset; known: "
                f"{', '.join(sorted(known))}. Give the graph's device one of these names, or '' if its times are for "
                f"the cluster's first device"
            )
        return known[name] if name else self.devices[0]

    def __str__(self) -> str:
        kinds = Counter(device.name for device in self.devices)
        devices = ", ".join(f"{count} x {name}" for name, count in kinds.items())
        if isinstance(self.links, LinkMatrix):
            return f"{devices}, links by a matrix"
        levels = (
            f"{level.link.bandwidth / 1e9:.4g} GB/s {'shared ' * level.shared}among {level.size}"
            for level in self.links
        )
        return f"{devices}; {', '.join(levels)}"


def _join_groups(cluster: ClusterSpec, senders: tuple[int, ...], receivers: tuple[int, ...]) -> Link:
    """See `ClusterSpec.group_link`; `busy` is seconds per byte of the whole value at each place that messages share."""
    busy: dict[tuple[object, ...], float] = {}
    latency = 0.0
    s, r = len(senders), len(receivers)
    for i, a in enumerate(senders):
        for j in range(i * r // s, -(-(i + 1) * r // s)):  # the receivers whose rows overlap with those of sender i
            b = receivers[j]
            share = (min((i + 1) * r, (j + 1) * s) - max(i * r, j * s)) / (s * r)
            if a == b:
                continue
            link = cluster.link(a, b)
            latency = max(latency, link.latency)
            for place in _places_on_the_way(cluster, a, b):
                busy[place] = busy.get(place, 0.0) + share / link.bandwidth
    slowest = max(busy.values(), default=0.0)
    return Link(latency, 1 / slowest if slowest else math.inf)


def _places_on_the_way(cluster: ClusterSpec, a: int, b: int) -> Iterator[tuple[object, ...]]:
    """What a message keeps others from using: its devices, and the ways out of and into their groups."""
    yield ("out of device", a)
    yield ("into device", b)
    if not isinstance(cluster.links, LinkMatrix):
        inner = 1
        for level in cluster.links:
            if a // level.size == b // level.size:
                if level.shared:
                    yield ("out of group", inner, a // inner)
                    yield ("into group", inner, b // inner)
                return
            inner = level.size


def _find_problems(cluster: ClusterSpec) -> Iterator[str]:
    if not cluster.devices:
        yield "there must be at least one device"
    by_name: dict[str, DeviceSpec] = {}
    for device in cluster.devices:
        if by_name.setdefault(device.name, device) != device:
            yield f"two different kinds of device are called {device.name!r}"
    if isinstance(cluster.links, LinkMatrix):
        yield from _find_matrix_problems(cluster.links, len(cluster.devices))
        return
    sizes = [level.size for level in cluster.links]
    for inner, outer in pairwise([1, *sizes]):
        if outer < inner or outer % max(inner, 1):
            yield f"groups of {outer} devices don't consist of groups of {inner}: each size divides the next"
    if len(cluster.devices) > max(sizes, default=1):
        yield (
            f"the outermost link joins {max(sizes, default=1)} devices, so the rest has none: "
            f"give a Level of size {len(cluster.devices)} or more"
        )


_RANGE = {"latency": "finite and at least", "bandwidth": "above"}


def _find_matrix_problems(links: LinkMatrix, count: int) -> Iterator[str]:
    for what, matrix in (("latency", links.latency), ("bandwidth", links.bandwidth)):
        widths = sorted({len(row) for row in matrix})
        if len(matrix) != count or widths != [count]:
            shape = f"{len(matrix)} rows of {' or '.join(map(str, widths)) or 'no'} numbers"
            yield f"the {what} matrix has {shape}, but {count} devices need {count} rows of {count}"
            continue
        for a in range(count):
            for b in range(count):
                x = matrix[a][b]
                good = 0 <= x < math.inf if what == "latency" else x > 0
                if a != b and not good:
                    yield f"{what}[{a}][{b}] is {x:g}, but must be {_RANGE[what]} 0"
                elif a < b and x != matrix[b][a] and not math.isnan(matrix[b][a]):
                    yield f"{what}[{a}][{b}] is {x:g}, [{b}][{a}] is {matrix[b][a]:g}: links are the same both ways"
