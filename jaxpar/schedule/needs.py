"""What an action waits for: the one place that says so."""

from collections.abc import Container, Iterator

from jaxpar.schedule.action import Action
from jaxpar.schedule.dag import StageDag


def find_needs(dag: StageDag, action: Action, known: Container[Action]) -> Iterator[Action]:
    """The actions of `known` whose values F, B, I or W of one micro-batch uses.

        F(s, m)    F(p, m)                               forward edges (p, s)
        B(s, m)    F(s, m), and B(p, m) or I(p, m)       backward edges (p, s); I likewise
        W(s, m)    I(s, m)

    `known` decides whether a source's backward is whole or split. A `U` waits for all other actions of its stage, which
    is left to those who know them.

    >>> dag = StageDag.chain(2)
    >>> list(find_needs(dag, Action("I", 0, 3), {Action("F", 0, 3), Action("B", 1, 3), Action("W", 1, 3)}))
    [0F3, 1B3]
    """
    stage, m = action.stage, action.microbatch
    needs: list[Action] = []
    if action.kind == "F":
        needs = [Action("F", p, m) for p in dag.forward_sources[stage]]
    elif action.kind in "BI":
        sources = [Action(kind, p, m) for p in dag.backward_sources[stage] for kind in ("B", "I")]
        needs = [Action("F", stage, m), *sources]
    elif action.kind == "W":
        needs = [Action("I", stage, m)]
    return (need for need in needs if need in known)
