"""The plan, and what it says that stages cost."""

from __future__ import annotations

import jax

import jaxpar
from tests.equality.grid import small_case


def test_costs_have_the_bytes_of_residuals_and_of_each_edge():
    case = small_case("towers")
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4])
    plan = jaxpar.parallelize(case.step, mesh=mesh, num_microbatches=4).plan(case.state, case.batch, *case.extra)
    costs, dag = plan.costs, plan.graph.dag(4)
    costs.check_for(dag)
    assert costs.residual_bytes == tuple(summary.residual_bytes for summary in plan.summaries)
    assert all(costs.sent_bytes[edge] > 0 for edge in dag.forward + dag.backward)
    for stage, summary in enumerate(plan.summaries):
        assert sum(size for (src, _), size in costs.sent_bytes.items() if src == stage) == summary.sent_bytes
