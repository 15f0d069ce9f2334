"""A step and its arguments' shapes as a program, and what is known of its outputs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from jaxpar.arguments import Arguments, NewState, OutputTree, match_state_outputs
from jaxpar.trace import Program, make_program, trace_size


@dataclass(frozen=True, eq=False)
class TracedStep:
    """A step as a program, and where its new state is among its outputs."""

    arguments: Arguments
    program: Program
    outputs: OutputTree

    @cached_property
    def updated(self) -> Mapping[int, int]:
        """Index of the output that is the new value of a state input, by the input's index."""
        state = self.arguments.leaves_of("state")
        return {state[leaf]: out for out, leaf in self.outputs.state_outputs.items()}


def trace_step(arguments: Arguments, new_state: NewState = "auto", microbatch: int = 2) -> TracedStep:
    """Trace a step at two sizes.

    Args:
        arguments: shapes and roles of the flat arguments.
        new_state: see `parallelize`.
        microbatch: examples in a micro-batch, where that is known.

    Raises: TraceError where it isn't a step that a pipeline can run.
    """
    sizes = (arguments.num_examples, trace_size(arguments.num_examples, microbatch))
    with collector_paused():
        (whole, shapes), (small, _) = map(arguments.trace, sizes)
        program = make_program(whole, small, sizes, arguments.names, arguments.roles)
        outputs = match_state_outputs(arguments, shapes, program.carries_over, new_state)
    return TracedStep(arguments, program, outputs)


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside: tracing makes hundreds of thousands of objects, all of which live, and looking
    through them again and again takes a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
