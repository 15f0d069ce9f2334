"""Why a plan was chosen, in sentences."""

from jaxpar.plan.planners.judge import Judge
from jaxpar.plan.predict import predict


def explain_choice(judge: Judge, num_devices: int) -> tuple[str, ...]:
    """What the best plan was compared with; whether to pipeline at all, and why not; how many devices are left over."""
    best = judge.best
    assert best is not None
    others = sorted((seconds, kind) for kind, (seconds, _) in judge.by_kind.items() if kind != judge.kind)
    compared = ", ".join(f"{kind} {seconds:.4g} s ({seconds / judge.seconds:.2f}x)" for seconds, kind in others)
    notes = [
        f"chosen: {judge.kind}, {judge.seconds:.4g} s a step ({judge.mode} simulation); "
        + (f"beside it: {compared}" if compared else "nothing else fits into memory")
    ]
    if len(best.stages) == 1:
        notes.append(_explain_no_pipeline(judge))
    used = len({device for stage in best.stages for device in stage.devices})
    if used < num_devices:
        notes.append(f"uses {used} of {num_devices} devices: no plan with more was faster")
    return tuple(notes)


def _explain_no_pipeline(judge: Judge) -> str:
    pipelines = [entry for entry in judge.by_kind.values() if len(entry[1].stages) > 1]
    if not pipelines:
        return "don't pipeline: no plan of several stages was found to be worth a simulation"
    seconds, plan = min(pipelines, key=lambda entry: entry[0])
    assert judge.best is not None
    bubbles = predict(plan, judge.mode).bubble_fraction
    reduction = predict(judge.best, judge.mode).reduce_seconds
    return (
        f"don't pipeline: the fastest pipeline found, {len(plan.stages)} stages, takes {seconds / judge.seconds:.2f} "
        f"times as long, {bubbles:.0%} of it in bubbles; one stage has none, and its replicas reduce their gradients "
        f"in {reduction:.3g} s"
    )
