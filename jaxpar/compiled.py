"""A step that is lowered or compiled ahead of time, in the manner of `jax.stages`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxpar.passes import Built


@dataclass(frozen=True, eq=False)
class Lowered:
    """A step lowered for its mesh, in the manner of `jax.stages.Lowered`."""

    step: Any  # the PipelinedStep that it is of
    built: Built = field(repr=False)
    lowered: Any = field(repr=False)

    @property
    def num_programs(self) -> int:
        """Distinct programs of stages' actions: equal stages share theirs."""
        return self.built.machine.num_stage_programs

    def as_text(self) -> str:
        return self.lowered.as_text()

    def compile(self) -> Compiled:
        """Compile; later calls of the step with such arguments use the same program."""
        return Compiled(self.step, self.built, self.step._compile(self.built, self.lowered))


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled step, in the manner of `jax.stages.Compiled`: call it like the step."""

    step: Any  # the PipelinedStep that it is of
    built: Built = field(repr=False)
    compiled: Any = field(repr=False)

    def __call__(self, *args: Any) -> Any:
        return self.step._finish(self.built, *self.compiled(*self.step._placed_arguments(self.built, args)))

    def as_text(self) -> str:
        return self.compiled.as_text()

    def memory_analysis(self) -> Any:
        return self.compiled.memory_analysis()

    def cost_analysis(self) -> Any:
        return self.compiled.cost_analysis()
