"""jaxpar: pipeline parallelism that JAX users simply switch on."""

from jaxpar.api import parallelize
from jaxpar.errors import JaxparError, LowerError, PlanError, ScheduleError, TraceError
from jaxpar.lower import PlacedState
from jaxpar.step import Compiled, Lowered, PendingState, PipelinedStep
from jaxpar.trace import register_batch_rule

__all__ = [
    "Compiled",
    "JaxparError",
    "LowerError",
    "Lowered",
    "PendingState",
    "PipelinedStep",
    "PlacedState",
    "PlanError",
    "ScheduleError",
    "TraceError",
    "parallelize",
    "register_batch_rule",
]
