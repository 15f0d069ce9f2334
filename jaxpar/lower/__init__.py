"""lower: a plan and a timetable to one jitted SPMD function. No policy."""

from jaxpar.lower.axes import Axes
from jaxpar.lower.evaluate import keep_axes
from jaxpar.lower.init import init_leaves
from jaxpar.lower.layout import Leaf, PlacedState, StateLayout, gather_leaves, make_layout, place_leaves
from jaxpar.lower.lint import find_permutes_in_branches
from jaxpar.lower.machine import Machine, build_machine
from jaxpar.lower.memory import MemoryEstimate, estimate_memory
from jaxpar.lower.record import Recorder, make_recorder
from jaxpar.lower.step import jit_step

__all__ = [
    "Axes",
    "Leaf",
    "Machine",
    "MemoryEstimate",
    "PlacedState",
    "Recorder",
    "StateLayout",
    "build_machine",
    "estimate_memory",
    "find_permutes_in_branches",
    "gather_leaves",
    "init_leaves",
    "jit_step",
    "keep_axes",
    "make_layout",
    "make_recorder",
    "place_leaves",
]
