"""How a run takes its places on a cluster, and what it says while others hold them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.faults import ResourceError
from cluster.fleet import reservation
from cluster.fleet.reservation import Reservation, told
from tests.fakes.run_files import config


class FakeGroup:
    """A placement group that is given after some waits."""

    def __init__(self, waits: int, clock: list[float]) -> None:
        self.waits, self.clock = waits, clock

    def wait(self, seconds: int) -> bool:
        assert isinstance(seconds, int) and seconds > 0, "Ray cuts fractions off"
        self.waits -= 1
        if self.waits >= 0:
            self.clock[0] += seconds
        return self.waits < 0


class FakeRay:
    """As much of Ray as a reservation asks, on a cluster of two CPUs that somebody holds."""

    def __init__(self, waits: int, state: str = "NO_RESOURCES") -> None:
        self.clock = [100.0]
        self.asked: list[tuple[list[dict[str, float]], str]] = []
        self.util, self.waits, self.scheduling = self, waits, state

    def placement_group(self, bundles: list[dict[str, float]], strategy: str) -> FakeGroup:
        self.asked.append((bundles, strategy))
        return FakeGroup(self.waits, self.clock)

    def placement_group_table(self, group: FakeGroup) -> dict[str, Any]:
        return {"stats": {"scheduling_state": self.scheduling}}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 0.5, "memory": 1e9}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, "memory": 2e9}

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(waits: int, state: str = "NO_RESOURCES") -> FakeRay:
        fake = FakeRay(waits, state)
        monkeypatch.setattr(reservation, "ray", fake)
        monkeypatch.setattr(reservation.time, "monotonic", lambda: fake.clock[0])
        monkeypatch.setattr(reservation, "_holders", lambda: "held by first (1.5 CPUs)")
        return fake

    return start


def take(deadline_s: float = 3600, grows: bool = False, **sections: Any) -> tuple[list[str], list[str]]:
    """What was said and warned of until the places were taken."""
    said: list[str] = []
    warned: list[str] = []
    asyncio.run(Reservation(config(**sections), grows).taken(deadline_s, said.append, warned.append))
    return said, warned


def test_all_processes_are_asked_for_at_once_and_close_together(cluster: Any) -> None:
    ray = cluster(0)
    said, warned = take(rollout={"num_actors": 2, "num_gpus": 1}, learner={"num_ranks": 2, "num_cpus": 3})
    assert ray.asked == [([{"CPU": 3}, {"CPU": 3}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}], "PACK")]
    assert (said, warned) == ([], []), "there was room"


def test_every_process_has_its_own_place_and_one_that_asks_for_nothing_any(cluster: Any) -> None:
    cluster(0)
    places = Reservation(config(rollout={"num_actors": 2}, learner={"num_ranks": 2}), grows=False)
    asked = [("learner", 0), ("learner", 1), ("rollout", 0), ("rollout", 1)]
    assert [places.strategy(*process).placement_group_bundle_index for process in asked] == [0, 1, 2, 3]
    assert places.strategy("scorer", 0) == "DEFAULT"


def test_learner_and_engine_that_share_a_gpu_have_one_place(cluster: Any) -> None:
    ray = cluster(0)
    gpus = {"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}
    places = Reservation(config(**gpus, weights={"transport": "ipc"}), grows=False)
    assert ray.asked == [([{"CPU": 2, "GPU": 0.5}], "PACK")]
    assert [places.strategy(role, 0).placement_group_bundle_index for role in ("learner", "rollout")] == [0, 0]


def test_a_run_that_asks_for_nothing_reserves_nothing(cluster: Any) -> None:
    ray = cluster(0)
    assert take(learner={"num_cpus": 0}, rollout={"num_cpus": 0}) == ([], [])
    assert ray.asked == []


def test_a_busy_cluster_is_named_at_once_and_then_every_thirty_seconds(cluster: Any) -> None:
    cluster(70)
    said, warned = take(deadline_s=300)
    assert warned == ["the cluster is busy: the run starts once others give it room, or a machine joins"]
    assert said == [
        f"waiting      {waited} s of 300 s for 1 x learner (1 CPUs), 1 x rollout (1 CPUs); "
        "free: 0.5 of 2 CPUs on 1 machine(s); held by first (1.5 CPUs)"
        for waited in (1, 31, 61)
    ]


def test_a_wait_has_an_end(cluster: Any) -> None:
    cluster(1000)
    with pytest.raises(ResourceError, match=r"the cluster was busy for 45 s: no room for .*held by first") as caught:
        take(deadline_s=45)
    assert caught.value.exit_code == 3
    assert "raise deadlines.room_s" in caught.value.advice


def test_what_no_machine_can_take_ends_the_wait_at_once_unless_the_cluster_grows(cluster: Any) -> None:
    ray = cluster(1000, "INFEASIBLE")
    with pytest.raises(ResourceError, match=r"no machine of the cluster has room for one of 1 x learner \(1 CPUs\)"):
        take()
    assert ray.clock == [101.0]
    cluster(5, "INFEASIBLE")
    said, _ = take(grows=True)
    assert len(said) == 1


def test_a_ray_that_does_not_tell_who_holds_the_room_does_not_end_the_wait(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> str:
        raise OSError("no dashboard")

    cluster(3)
    monkeypatch.setattr(reservation, "_holders", away)
    said, _ = take()
    assert said[0].endswith("who holds the rest is not known (OSError)")


def test_holders_are_summed_by_job_and_named_as_they_were_submitted() -> None:
    held = [("01", {"CPU": 1.0, "memory": 3.0}), ("02", {"GPU": 0.5}), ("01", {"CPU": 0.5}), ("03", {"driver": 1.0})]
    assert told(held, {"01": "demo-1"}) == "held by demo-1 (1.5 CPUs), Ray job 02 (0.5 GPUs)"
    assert told([], {}) == "held by no actor; tasks may hold it"
