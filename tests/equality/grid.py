"""The cases of the zoo at their smallest, the meshes, and the schedules that the equality tests run over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import pytest

from tests.oracle import check_case
from tests.zoo import CASES, Case

_GPT = {"num_layers": 2, "dim": 16, "heads": 2, "vocab": 32, "length": 8}
_SMALL: dict[str, dict[str, int]] = {
    "gpt": _GPT,
    "gpt_remat": _GPT,
    "gpt_no_dropout": _GPT,
    "towers": {"num_layers": 1},
    "mmt": {"num_layers": 1},
}

# Compiled in seconds, not in fractions of a second.
LARGE = ("gpt", "gpt_remat", "gpt_no_dropout", "towers", "mmt", "unet", "resnet")

SCHEDULES: dict[str, tuple[str, dict[str, int]]] = {
    "gpipe": ("gpipe", {}),
    "1f1b": ("1f1b", {}),
    "1f1b extra=0": ("1f1b", {"extra": 0}),
    "1f1b exchange=1": ("1f1b", {"exchange": 1}),
    "gpipe exchange=1": ("gpipe", {"exchange": 1}),
}


class Setting(NamedTuple):
    """What one check runs on."""

    stages: int
    replicas: int
    microbatches: int
    schedule: str

    def __str__(self) -> str:
        return f"{self.stages}x{self.replicas} M={self.microbatches} {self.schedule}"

    @property
    def mesh_shape(self) -> dict[str, int]:
        """A mesh without a `data` axis where there is one replica."""
        return {"stage": self.stages} | ({"data": self.replicas} if self.replicas > 1 else {})


def small_case(name: str, **parameters: Any) -> Case:
    """A case of the zoo at its smallest."""
    return CASES[name](**_SMALL.get(name, {}) | parameters)


def check(name: str, setting: Setting, **parameters: Any) -> Any:
    """`check_case` in a setting, with a batch that splits evenly: 32 examples, 24 for a multiple of 3."""
    if setting.stages * setting.replicas > len(jax.devices()):
        pytest.skip(f"{setting.stages} x {setting.replicas} devices are needed, there are {len(jax.devices())}")
    schedule, options = SCHEDULES[setting.schedule]
    batch_size = parameters.pop("batch_size", 24 if setting.microbatches % 3 == 0 else 32)
    case = small_case(name, batch_size=batch_size, **parameters)
    return check_case(case, setting.mesh_shape, setting.microbatches, schedule, schedule_options=options)
