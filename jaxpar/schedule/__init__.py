"""Timetables: which rank does what in which tick. Pure Python and NumPy, no JAX."""

from jaxpar.schedule.action import Action as Action
from jaxpar.schedule.costs import Link as Link
from jaxpar.schedule.costs import StageCosts as StageCosts
from jaxpar.schedule.dag import StageDag as StageDag
from jaxpar.schedule.forward_only import forward_only as forward_only
from jaxpar.schedule.gpipe import gpipe as gpipe
from jaxpar.schedule.greedy import fill_greedily as fill_greedily
from jaxpar.schedule.one_f_one_b import one_f_one_b as one_f_one_b
from jaxpar.schedule.registry import SCHEDULES as SCHEDULES
from jaxpar.schedule.registry import make_timetable as make_timetable
from jaxpar.schedule.simulate import compare_lockstep as compare_lockstep
from jaxpar.schedule.simulate import simulate as simulate
from jaxpar.schedule.simulation import Lockstep as Lockstep
from jaxpar.schedule.simulation import Simulation as Simulation
from jaxpar.schedule.timetable import Timetable as Timetable
from jaxpar.schedule.validate import validate_timetable as validate_timetable
