"""The mesh axes that the machine handles itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axes:
    """Names and sizes of the mesh axes that the machine handles. `data` is None for a mesh without replicas."""

    stage: str
    num_ranks: int
    data: str | None
    replicas: int

    @property
    def manual(self) -> frozenset[str]:
        return frozenset({self.stage} | ({self.data} if self.data else set()))
