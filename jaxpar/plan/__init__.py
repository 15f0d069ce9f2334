"""plan: a `Program` to a `StageGraph`, with costs. Nothing about evaluating jaxprs."""

from jaxpar.plan.cluster import ClusterSpec, DeviceSpec, Level, LinkMatrix
from jaxpar.plan.costs import Roofline, count_bytes, count_flops, estimate_seconds
from jaxpar.plan.devices import DEVICES, PRESETS
from jaxpar.plan.flow import Flow, analyse_flow
from jaxpar.plan.homes import Homes, home_state
from jaxpar.plan.op_graph import Op, OpEdge, OpGraph
from jaxpar.plan.op_names import describe_ops, find_ops, resolve_pins
from jaxpar.plan.partition import partition_sequence
from jaxpar.plan.pipeline import PipelinePlan, PlannedStage
from jaxpar.plan.plan import Plan, StageSummary, plan_stages
from jaxpar.plan.plan_check import check_request
from jaxpar.plan.plan_edit import sort_stages
from jaxpar.plan.predict import Prediction, estimate_step, predict, stage_memory, stage_seconds
from jaxpar.plan.routing import route_values
from jaxpar.plan.stages import Bundle, Node, Share, StageGraph, StageProgram
from jaxpar.plan.time_curve import TimeCurve

__all__ = [
    "DEVICES",
    "PRESETS",
    "Bundle",
    "ClusterSpec",
    "DeviceSpec",
    "Flow",
    "Homes",
    "Level",
    "LinkMatrix",
    "Node",
    "Op",
    "OpEdge",
    "OpGraph",
    "PipelinePlan",
    "Plan",
    "PlannedStage",
    "Prediction",
    "Roofline",
    "Share",
    "StageGraph",
    "StageProgram",
    "StageSummary",
    "TimeCurve",
    "analyse_flow",
    "check_request",
    "count_bytes",
    "count_flops",
    "describe_ops",
    "estimate_seconds",
    "estimate_step",
    "find_ops",
    "home_state",
    "partition_sequence",
    "plan_stages",
    "predict",
    "resolve_pins",
    "route_values",
    "sort_stages",
    "stage_memory",
    "stage_seconds",
]
