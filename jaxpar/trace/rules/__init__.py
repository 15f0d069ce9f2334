"""Batch-type rules, one per primitive, and the registry that finds them."""

from jaxpar.trace.rules import contraction, elementwise, indexing, linalg, random, reduction, refused, shape
from jaxpar.trace.rules.registry import find_rule, is_builtin, keeps_positions, register_batch_rule
from jaxpar.trace.rules.sizes import check_outputs, check_params

__all__ = [
    "check_outputs",
    "check_params",
    "contraction",
    "elementwise",
    "find_rule",
    "indexing",
    "is_builtin",
    "keeps_positions",
    "linalg",
    "random",
    "reduction",
    "refused",
    "register_batch_rule",
    "shape",
]
