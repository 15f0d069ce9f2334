"""Every case of the zoo: three pipelined steps give the undecorated step's numbers.

A set that covers each number of stages, replicas and micro-batches with each schedule, and each case on several meshes.
The full product is in `test_product.py`.
"""

from __future__ import annotations

import itertools

import pytest

from tests.equality.grid import LARGE, SCHEDULES, Setting, check
from tests.zoo import CASES

STAGES, REPLICAS, MICROBATCHES = (1, 2, 4, 8), (1, 2), (1, 2, 3, 4, 8, 16)

_OF_LARGE = {
    "gpt": [
        Setting(4, 2, 8, "1f1b"),
        Setting(8, 1, 16, "1f1b"),
        Setting(2, 2, 2, "gpipe"),
        Setting(4, 1, 3, "1f1b extra=0"),
        Setting(1, 1, 1, "1f1b"),
    ],
    "gpt_remat": [Setting(4, 2, 4, "1f1b"), Setting(2, 1, 16, "gpipe"), Setting(8, 1, 8, "1f1b exchange=1")],
    "gpt_no_dropout": [Setting(2, 2, 16, "1f1b exchange=1"), Setting(8, 1, 4, "gpipe exchange=1")],
    "towers": [Setting(4, 2, 16, "1f1b"), Setting(8, 1, 8, "gpipe"), Setting(2, 1, 2, "1f1b extra=0")],
    "mmt": [Setting(8, 1, 8, "1f1b"), Setting(4, 2, 4, "gpipe")],
    "unet": [Setting(4, 2, 2, "1f1b"), Setting(8, 1, 16, "1f1b extra=0"), Setting(2, 1, 4, "gpipe")],
    "resnet": [Setting(4, 2, 16, "1f1b exchange=1"), Setting(8, 1, 4, "1f1b"), Setting(1, 2, 2, "gpipe")],
}

# For the models that compile fast; each of them gets three of these, and the first model all.
_OF_SMALL = [
    Setting(4, 2, 4, "1f1b"),
    Setting(8, 1, 16, "1f1b extra=0"),
    Setting(2, 1, 3, "gpipe"),
    Setting(4, 2, 16, "1f1b extra=0"),
    Setting(2, 2, 8, "1f1b exchange=1"),
    Setting(8, 1, 2, "1f1b"),
    Setting(1, 2, 4, "1f1b"),
    Setting(2, 2, 1, "gpipe exchange=1"),
    Setting(4, 1, 8, "1f1b extra=0"),
    Setting(1, 1, 16, "gpipe"),
    Setting(4, 2, 2, "gpipe"),
    Setting(8, 1, 3, "gpipe"),
]
_SMALL_NAMES = [name for name in CASES if name not in LARGE]


def _checks():
    for name, settings in _OF_LARGE.items():
        yield from ((name, setting) for setting in settings)
    for i, name in enumerate(_SMALL_NAMES):
        chosen = _OF_SMALL if i == 0 else [_OF_SMALL[(i + 4 * k) % len(_OF_SMALL)] for k in range(3)]
        yield from ((name, setting) for setting in chosen)


@pytest.mark.parametrize(("name", "setting"), _checks(), ids=str)
def test_same_numbers(name, setting):
    check(name, setting)


def test_covers_everything():
    """Nothing falls out of this set when it is changed."""
    checks = list(_checks())
    settings = [setting for _, setting in checks]
    assert {s.stages for s in settings} == set(STAGES)
    assert {s.microbatches for s in settings} == set(MICROBATCHES)
    for schedule, stages in itertools.product(("1f1b", "gpipe"), STAGES):
        assert any(s.stages == stages and s.schedule.startswith(schedule) for s in settings), (schedule, stages)
    for schedule, replicas in itertools.product(SCHEDULES, REPLICAS):
        assert any(s.replicas == replicas and s.schedule == schedule for s in settings), (schedule, replicas)
    for name in CASES:
        meshes = {(s.stages, s.replicas) for other, s in checks if other == name}
        assert len(meshes) >= 2, name
        assert max(stages for stages, _ in meshes) >= 4, name
