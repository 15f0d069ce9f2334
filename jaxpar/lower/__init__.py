"""lower: a plan and a timetable to one jitted SPMD function. No policy."""

from jaxpar.lower.axes import Axes
from jaxpar.lower.evaluate import keep_axes
from jaxpar.lower.init import init_leaves
from jaxpar.lower.layout import Leaf, PlacedState, StateLayout, gather_leaves, make_layout, place_leaves
from jaxpar.lower.lint import find_permutes_in_branches
from jaxpar.lower.machine import Machine, build_machine
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
    "find_permutes_in_branches",
    "gather_leaves",
    "init_leaves",
    "keep_axes",
    "make_layout",
    "place_leaves",
]
