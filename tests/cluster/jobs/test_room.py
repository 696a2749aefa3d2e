"""Whether a run fits a cluster, by what a dashboard tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.faults import ResourceError
from tests.fakes.jobs import NODE, FakeClient, jobs_of
from tests.fakes.models import config_folder
from tests.fakes.run_files import config

FIXED = {"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": {NODE: f"node_{NODE}"}}}}}
GROWING: dict[str, Any] = {
    "of named types": {"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": {NODE: "gpu.large"}}}}},
    "of which the monitor says nothing": {"data": {"clusterStatus": None}},
}


def pages(status: Any, *resources: dict[str, float]) -> dict[str, Any]:
    names = (NODE, *"bcdefgh")
    found = [{"node_id": n, "state": "ALIVE", "resources_total": r} for n, r in zip(names, resources, strict=False)]
    found.append({"node_id": "gone", "state": "DEAD", "resources_total": {"CPU": 99.0, "GPU": 99.0}})
    return {"/api/v0/nodes?limit=10000": {"data": {"result": {"result": found}}}, "/api/cluster_status": status}


def test_a_run_that_fits_is_let_through_without_a_word() -> None:
    client = FakeClient(pages=pages(FIXED, {"CPU": 2.0}))
    assert jobs_of(client).check_room(config(), {}) == ""


def test_a_run_that_never_fits_is_refused_before_anything_is_uploaded() -> None:
    client = FakeClient(pages=pages(FIXED, {"CPU": 2.0, "memory": 1e9}, {"memory": 1e9}))
    with pytest.raises(ResourceError) as caught:
        jobs_of(client).check_room(config(rollout={"num_actors": 4}), {})
    assert caught.value.exit_code == 3
    assert "no room for 3 of rollout (1 CPUs); the only machine of the cluster at http://c:8265" in caught.value.message
    assert caught.value.advice == "would fit: --set rollout.num_actors=1, or 2 more machines with 2 CPUs, no GPUs"
    assert client.submitted == []


def test_the_driver_needs_room_too() -> None:
    jobs = jobs_of(FakeClient(pages=pages(FIXED, {"CPU": 2.0})))
    with pytest.raises(ResourceError, match="no room for 1 of rollout"):
        jobs.check_room(config(), {"CPU": 1})
    with pytest.raises(ResourceError, match="no machine of the cluster offers driver=1 to the driver"):
        jobs.check_room(config(), {"driver": 1})
    jobs_of(FakeClient(pages=pages(FIXED, {"CPU": 2.0, "driver": 1.0}))).check_room(config(), {"driver": 1})


@pytest.mark.parametrize("status", GROWING.values(), ids=GROWING)
def test_a_cluster_that_may_grow_is_not_refused_but_told_of(status: Any) -> None:
    jobs = jobs_of(FakeClient(pages=pages(status, {"CPU": 1.0})))
    assert "the cluster may grow" in jobs.check_room(config(), {})


def test_memory_that_is_short_by_the_bill_is_told_and_nothing_is_refused(tmp_path: Path) -> None:
    """Three layers of a small model take hundreds of MiB with their processes; the machine has one."""
    model = config_folder(tmp_path)
    cfg = config(policy={"model": model}, reference={"model": model})
    found = pages(FIXED, {"CPU": 2.0})
    seen = {"raylet": {"nodeId": NODE}, "mem": [2**20, 0, 0, 0], "gpus": []}
    found["/nodes?view=summary"] = {"data": {"summary": [seen]}}
    assert "memory is short: no room for 1 of" in jobs_of(FakeClient(pages=found)).check_room(cfg, {})
    seen["mem"] = [2**40, 0, 0, 0]
    assert jobs_of(FakeClient(pages=found)).check_room(cfg, {}) == ""
