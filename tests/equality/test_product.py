"""The full product of models, meshes, micro-batches and schedules: hours, not minutes."""

from __future__ import annotations

import itertools

import pytest

from tests.equality.grid import Setting, check
from tests.zoo import CASES

pytestmark = pytest.mark.slow

_SETTINGS = [
    Setting(*values) for values in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 3, 4, 8, 16), ("gpipe", "1f1b"))
]
_VARIANTS = [
    Setting(*values)
    for values in itertools.product(
        (2, 4, 8), (1,), (1, 4, 16), ("1f1b extra=0", "1f1b exchange=1", "gpipe exchange=1")
    )
]


@pytest.mark.parametrize("setting", [*_SETTINGS, *_VARIANTS], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name, setting):
    check(name, setting)
