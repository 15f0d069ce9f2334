"""plan: a `Program` to a `StageGraph`, with costs. Nothing about evaluating jaxprs."""

from jaxpar.plan.costs import Roofline, count_bytes, count_flops, estimate_seconds
from jaxpar.plan.flow import Flow, analyse_flow
from jaxpar.plan.homes import Homes, home_state
from jaxpar.plan.partition import partition_sequence
from jaxpar.plan.plan import Plan, StageSummary, plan_stages
from jaxpar.plan.stages import Bundle, Node, StageGraph, StageProgram, route_values

__all__ = [
    "Bundle",
    "Flow",
    "Homes",
    "Node",
    "Plan",
    "Roofline",
    "StageGraph",
    "StageProgram",
    "StageSummary",
    "analyse_flow",
    "count_bytes",
    "count_flops",
    "estimate_seconds",
    "home_state",
    "partition_sequence",
    "plan_stages",
    "route_values",
]
