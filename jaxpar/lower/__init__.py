"""lower: a plan and a timetable to one jitted SPMD function. No policy."""

from jaxpar.lower.init import init_leaves
from jaxpar.lower.layout import Leaf, PlacedState, StateLayout, gather_leaves, make_layout, place_leaves
from jaxpar.lower.machine import Axes, Machine, build_machine
from jaxpar.lower.memory import MemoryEstimate, estimate_memory
from jaxpar.lower.step import build_step

__all__ = [
    "Axes",
    "Leaf",
    "Machine",
    "MemoryEstimate",
    "PlacedState",
    "StateLayout",
    "build_machine",
    "build_step",
    "estimate_memory",
    "gather_leaves",
    "init_leaves",
    "make_layout",
    "place_leaves",
]
