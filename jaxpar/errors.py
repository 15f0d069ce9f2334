"""The one family of errors that jaxpar raises on purpose.

Each message says what could not be done and to what, shows the numbers that disagree, and gives a way out. All are
`ValueError` too, so that code which knows nothing of jaxpar can catch them.
"""


class JaxparError(ValueError):
    """Base of every error that jaxpar raises on purpose.

    >>> issubclass(ScheduleError, JaxparError) and issubclass(JaxparError, ValueError)
    True
    """


class TraceError(JaxparError):
    """The user's step can't be traced into a `Program`."""


class PlanError(JaxparError):
    """A `Program` can't be cut into stages for this cluster."""


class ScheduleError(JaxparError):
    """A stage graph, a timetable, or an option of a schedule is not valid."""


class LowerError(JaxparError):
    """A timetable can't be lowered to one program on this mesh."""
