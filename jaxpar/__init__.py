"""jaxpar: pipeline parallelism that JAX users simply switch on."""

from jaxpar.api import parallelize
from jaxpar.compiled import Compiled, Lowered
from jaxpar.errors import JaxparError, LowerError, PlanError, ScheduleError, TraceError
from jaxpar.lower import PlacedState
from jaxpar.plan import ClusterSpec, OpGraph, PipelinePlan
from jaxpar.planning import graph_step, plan_step
from jaxpar.step import PendingState, PipelinedStep
from jaxpar.trace import register_batch_rule

__all__ = [
    "ClusterSpec",
    "Compiled",
    "JaxparError",
    "LowerError",
    "Lowered",
    "OpGraph",
    "PendingState",
    "PipelinePlan",
    "PipelinedStep",
    "PlacedState",
    "PlanError",
    "ScheduleError",
    "TraceError",
    "graph_step",
    "parallelize",
    "plan_step",
    "register_batch_rule",
]
