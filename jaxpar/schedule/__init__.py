"""Timetables: which rank does what in which tick. Pure Python and NumPy, no JAX."""

from jaxpar.schedule.action import Action as Action
from jaxpar.schedule.costs import StageCosts as StageCosts
from jaxpar.schedule.dag import StageDag as StageDag
from jaxpar.schedule.dag import place_stages as place_stages
from jaxpar.schedule.dualpipe_v import dualpipe_v as dualpipe_v
from jaxpar.schedule.eager_1f1b import eager_1f1b as eager_1f1b
from jaxpar.schedule.forward_only import forward_only as forward_only
from jaxpar.schedule.gpipe import gpipe as gpipe
from jaxpar.schedule.greedy import fill_greedily as fill_greedily
from jaxpar.schedule.interleaved_1f1b import interleaved_1f1b as interleaved_1f1b
from jaxpar.schedule.kfkb import kfkb as kfkb
from jaxpar.schedule.looped_bfs import looped_bfs as looped_bfs
from jaxpar.schedule.one_f_one_b import one_f_one_b as one_f_one_b
from jaxpar.schedule.registry import SCHEDULES as SCHEDULES
from jaxpar.schedule.registry import make_timetable as make_timetable
from jaxpar.schedule.simulate import Lockstep as Lockstep
from jaxpar.schedule.simulate import Simulation as Simulation
from jaxpar.schedule.simulate import compare_lockstep as compare_lockstep
from jaxpar.schedule.simulate import simulate as simulate
from jaxpar.schedule.timetable import Timetable as Timetable
from jaxpar.schedule.v_half import v_half as v_half
from jaxpar.schedule.v_min import v_min as v_min
from jaxpar.schedule.validate import validate_timetable as validate_timetable
from jaxpar.schedule.zb_h1 import zb_h1 as zb_h1
from jaxpar.schedule.zb_h2 import zb_h2 as zb_h2
from jaxpar.schedule.zb_v import zb_v as zb_v
