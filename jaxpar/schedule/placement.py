"""The schedules that are not for every stage graph say here which they are for.

They are defined for a chain with several stages on each rank. They also serve each graph whose stages are numbered
along the pipeline, since its stages wait for no more than a chain's would; the published figures are the chain's.
"""

from jaxpar.errors import ScheduleError
from jaxpar.schedule.dag import Placement, StageDag, place_stages


def require_rounds(dag: StageDag, schedule: str) -> None:
    """Raise `ScheduleError` unless stage s is on rank `s % R`, equally many on each, and edges follow the numbers."""
    full = dag.num_stages % dag.num_ranks == 0
    _require(dag, schedule, "round_robin", full, "as many stages on each rank, stage s on rank s % R")


def require_v(dag: StageDag, schedule: str) -> None:
    """Raise `ScheduleError` unless two stages are on each rank, laid out in a V, and edges follow the numbers."""
    full = dag.num_stages == 2 * dag.num_ranks
    _require(dag, schedule, "v", full, "two stages on each rank, down the ranks 0 ... R-1 and up again R-1 ... 0")


def _require(dag: StageDag, schedule: str, placement: Placement, full: bool, needed: str) -> None:
    if not full or dag.rank_of != place_stages(dag.num_stages, dag.num_ranks, placement):
        stages = 2 * dag.num_ranks if placement == "v" else -(-dag.num_stages // dag.num_ranks) * dag.num_ranks
        raise ScheduleError(
            f"schedule {schedule!r} needs {needed}: for {dag.num_ranks} ranks "
            f"StageDag.chain({stages}, num_ranks={dag.num_ranks}, placement={placement!r}) is one; "
            f"got {dag.num_stages} stages on ranks {' '.join(map(str, dag.rank_of))}"
        )
    wrong = [f"forward {edge}" for edge in dag.forward if edge[0] > edge[1]]
    wrong += [f"backward {edge}" for edge in dag.backward if edge[0] < edge[1]]
    if wrong:
        raise ScheduleError(
            f"schedule {schedule!r} needs stages numbered along the pipeline, so that each forward edge goes to a "
            f"higher stage and each backward edge to a lower one; got {', '.join(wrong)}"
        )
