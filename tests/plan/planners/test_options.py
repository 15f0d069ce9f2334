"""The options of all planners: what is tried if nothing is said, and what can't be."""

import pytest

from jaxpar.errors import PlanError
from jaxpar.plan.cluster import ClusterSpec
from jaxpar.plan.planners.options import count_devices, list_microbatches, list_replicas


def test_what_is_tried_by_default():
    assert list_microbatches(48) == (1, 2, 4, 8, 16)
    assert list_microbatches(7) == (1,)
    assert list_replicas(5) == (1, 2, 4)
    assert list_replicas(5, "any") == (1, 2, 3, 4, 5)
    assert count_devices(ClusterSpec.preset("v100", 8)) == 8


def test_what_cant_be_tried():
    with pytest.raises(PlanError, match="of 5, 0 examples don't divide the batch of 12"):
        list_microbatches(12, [4, 5, 0])
    with pytest.raises(PlanError, match="microbatches is empty"):
        list_microbatches(12, [])
    with pytest.raises(PlanError, match="at least one example, got batch_size=0"):
        list_microbatches(0)
    with pytest.raises(PlanError, match="replicas='some'; known: 'powers_of_two', 'any'"):
        list_replicas(4, "some")
    with pytest.raises(PlanError, match="num_devices=9, but the cluster has 8"):
        count_devices(ClusterSpec.preset("v100", 8), 9)
    with pytest.raises(PlanError, match="num_devices=0"):
        count_devices(ClusterSpec.preset("v100", 8), 0)
