"""trace: the user's function to a `Program`. Knows jaxprs and batch types; nothing about devices."""

from jaxpar.trace.ir import Atom, Body, Eqn, Literal, Size, Var
from jaxpar.trace.program import Program, abstract_args, make_program, trace_size
from jaxpar.trace.rules import register_batch_rule
from jaxpar.trace.types import INVARIANT, Batched, BatchType, Coupling, Incomplete, Invariant, Partial

__all__ = [
    "INVARIANT",
    "Atom",
    "BatchType",
    "Batched",
    "Body",
    "Coupling",
    "Eqn",
    "Incomplete",
    "Invariant",
    "Literal",
    "Partial",
    "Program",
    "Size",
    "Var",
    "abstract_args",
    "make_program",
    "register_batch_rule",
    "trace_size",
]
