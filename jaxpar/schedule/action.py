"""One cell of a timetable: a kind of work, a stage, a micro-batch."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from jaxpar.errors import ScheduleError

Kind = Literal["F", "B", "I", "W", "U"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TEXT = re.compile(rf"(\d+)([{''.join(KINDS)}])(\d+)")


@dataclass(frozen=True)
class Action:
    """What a rank does in one tick, written `2F0`: stage 2, kind F, micro-batch 0.

    | kind | what it does |
    |---|---|
    | F | the stage's forward |
    | B | its whole backward |
    | I | the part of the backward that leads to an outgoing cotangent |
    | W | the rest of the backward, which leads only to gradients |
    | U | the stage's update; it belongs to no micro-batch and is written with 0 |

    >>> Action("F", stage=2, microbatch=0)
    2F0
    >>> Action.from_text("10B31") == Action("B", 10, 31)
    True
    """

    kind: Kind
    stage: int
    microbatch: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ScheduleError(f"an action has one of the kinds {', '.join(KINDS)}, got {self.kind!r}")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    __repr__ = __str__

    @classmethod
    def from_text(cls, text: str) -> "Action":
        """Read `2F0`; the inverse of `str`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action: write stage, kind ({', '.join(KINDS)}), micro-batch: 2F0")
        stage, kind, microbatch = match.groups()
        return cls(kind, int(stage), int(microbatch))  # type: ignore[arg-type]  # the pattern admits only kinds
