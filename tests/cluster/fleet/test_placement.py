"""The resource arithmetic, where Ray is started, and what actors are made with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.faults import ResourceError
from cluster.fleet import placement, reservation
from cluster.fleet.placement import (
    Demand,
    check_memory,
    max_groups_per_actor,
    num_local_cpus,
    ray_session,
    within_reach,
)
from cluster.spec.config import RunConfig
from tests.fakes.run_files import config


@pytest.mark.parametrize(
    ("sections", "num_cpus", "num_gpus"),
    [
        ({}, 2, 0),
        ({"rollout": {"num_actors": 3}, "scorer": {"num_actors": 2}}, 4, 0),
        ({"rollout": {"num_actors": 2, "num_gpus": 4}, "learner": {"num_gpus": 1}}, 3, 9),
        ({"rollout": {"num_gpus": 1}, "learner": {"num_gpus": 1}, "scorer": {"num_gpus": 0.5, "num_actors": 2}}, 2, 3),
        ({"learner": {"num_ranks": 2, "num_gpus": 1, "num_cpus": 3}, "rollout": {"num_gpus": 1}}, 7, 3),
        ({"rollout": {"num_cpus": 0.5, "num_actors": 4}, "scorer": {"num_cpus": 1}, "learner": {"num_cpus": 2}}, 5, 0),
    ],
)
def test_a_run_asks_for_the_sum_over_its_roles(sections: dict[str, Any], num_cpus: float, num_gpus: float) -> None:
    demand = Demand.of(config(**sections))
    assert (demand.num_cpus, demand.num_gpus) == (num_cpus, num_gpus)


def test_learner_and_engine_that_share_a_gpu_fit_one_gpu_with_a_scorer() -> None:
    shared = {"weights": {"transport": "ipc"}, "learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}
    demand = Demand.of(config(**shared, scorer={"num_gpus": 0.5}))
    assert 0.5 < demand.num_gpus <= 1


def test_the_demand_of_a_run_of_one_actor_fits_two_cores() -> None:
    Demand.of(config()).check(num_cpus=2, num_gpus=0, where="this machine")


@pytest.mark.parametrize(
    ("there", "missing"),
    [((3, 8), "the run needs 4 CPUs, this machine has 3"), ((4, 7), "the run needs 8 GPUs, this machine has 7")],
)
def test_what_can_never_fit_is_refused_with_what_is_missing(there: tuple[int, int], missing: str) -> None:
    demand = Demand(num_cpus=4, num_gpus=8)
    demand.check(4, 8, "this machine")
    with pytest.raises(ResourceError, match=missing) as caught:
        demand.check(*there, "this machine")
    assert caught.value.exit_code == 3
    assert "lower rollout.num_actors" in caught.value.advice


def test_a_cluster_that_grows_by_itself_is_counted_as_large_as_it_may_become() -> None:
    assert within_reach({"CPU": 4, "GPU": 1}, {}) == (4, 1)
    assert within_reach({"CPU": 4}, {"CPU": 2, "GPU": 8}) == (4, 8)


@pytest.mark.parametrize(
    ("prompts_per_step", "max_staleness", "num_actors", "expected"),
    [(64, 0, 1, 64), (64, 1, 1, 128), (64, 3, 4, 64), (10, 0, 3, 4), (2, 0, 8, 1)],
)
def test_actors_share_all_slots(prompts_per_step: int, max_staleness: int, num_actors: int, expected: int) -> None:
    run = {"prompts_per_step": prompts_per_step, "max_staleness": max_staleness}
    groups = max_groups_per_actor(config(run=run, rollout={"num_actors": num_actors}))
    assert groups == expected
    slots = (max_staleness + 1) * prompts_per_step
    assert slots <= groups * num_actors < slots + num_actors, "all slots can be used, and none by one actor alone"


# --- memory -------------------------------------------------------------------------------------------------------

GIB = 1 << 30
MEMORY = [
    ({}, 4 + 1 + 1),  # weights, gradients and two moments; the engine's weights; the reference
    ({"rollout": {"num_actors": 3, "kv_cache_bytes": 2 * GIB}}, 4 + 3 * (1 + 2) + 1),
    ({"scorer": {"num_actors": 2}}, 4 + 1 + 2),
    ({"reference": {"refresh_every": 5}}, 4 + 1 + 2),
    ({"reference": None, "reward": {"kind": "exact_match"}, "scorer": {"num_actors": 2}}, 4 + 1),
    ({"learner": {"num_ranks": 2}}, 4 + 1 + 1),  # shards of the same
    ({"learner": {"num_ranks": 6}, "run": {"prompts_per_step": 6}}, 6 + 1 + 1),  # each loads the whole at first
    ({"learner": {"num_gpus": 1}}, 1 + 1),
    ({"rollout": {"num_gpus": 1, "kv_cache_bytes": 2 * GIB}}, 4 + 1),
    ({"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}, "scorer": {"num_gpus": 1}}, 0),
]


@pytest.mark.parametrize(("sections", "num_models"), MEMORY)
def test_what_lies_in_host_memory_is_counted_in_models(sections: dict[str, Any], num_models: int) -> None:
    cfg = config(**sections)
    check_memory(cfg, weights_bytes=GIB, memory_bytes=num_models * GIB)
    if num_models:
        with pytest.raises(
            ResourceError, match=rf"needs at least {num_models}\.0 GiB of memory, this machine has"
        ) as caught:
            check_memory(cfg, weights_bytes=GIB, memory_bytes=num_models * GIB - 1)
        assert caught.value.exit_code == 3
        assert f"a machine with {num_models} GiB" in caught.value.advice


def test_where_memory_is_short_a_setting_is_named_that_fits() -> None:
    cfg = config(rollout={"num_actors": 3, "kv_cache_bytes": GIB})
    with pytest.raises(ResourceError) as caught:
        check_memory(cfg, weights_bytes=GIB, memory_bytes=9 * GIB)
    assert caught.value.advice == "would fit: --set rollout.num_actors=2, or a machine with 11 GiB"
    check_memory(config(rollout={"num_actors": 2, "kv_cache_bytes": GIB}), GIB, 9 * GIB)


# --- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float] | None], Any]:
    """A cluster of two machines with two CPUs each, a third that has left, and what an autoscaler may make of it."""

    def join(most: dict[str, float] | None) -> Any:
        def node(cpus: float, alive: bool = True) -> dict[str, Any]:
            return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9}}

        state = SimpleNamespace(state=SimpleNamespace(get_max_resources_from_cluster_config=lambda: most))
        fake = SimpleNamespace(
            nodes=lambda: [node(2), node(2), node(8, alive=False), {"Alive": True, "Resources": {"memory": 1e9}}],
            cluster_resources=lambda: {"CPU": 4.0},
            _private=SimpleNamespace(state=state),
        )
        monkeypatch.setattr(placement, "ray", fake)
        monkeypatch.setattr(reservation, "ray", fake)
        monkeypatch.setattr(placement, "_init", lambda what, **options: "joined")
        return lambda cfg: placement._join(cfg, "10.0.0.7:6379")

    return join


def test_a_run_joins_a_cluster_that_it_fits(joined: Any) -> None:
    assert joined(None)(config(rollout={"num_actors": 3})) == "joined"


def test_a_run_that_fits_no_machine_of_the_cluster_is_refused_though_the_sum_would_do(joined: Any) -> None:
    with pytest.raises(
        ResourceError, match=r"no room for 1 of rollout \(3 CPUs\); the largest of the 2 machines"
    ) as caught:
        joined(None)(config(rollout={"num_cpus": 3}))
    assert "--set learner.num_cpus=0.5 --set rollout.num_cpus=0.5" in caught.value.advice


def test_a_cluster_that_grows_is_refused_only_beyond_what_it_may_grow_to(joined: Any) -> None:
    assert joined({"CPU": 64})(config(rollout={"num_actors": 60})) == "joined"
    with pytest.raises(ResourceError, match=r"the run needs 66 CPUs, the cluster at .* has 64"):
        joined({"CPU": 64})(config(rollout={"num_actors": 65}))


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.7:6379", "could not join the cluster at 10.0.0.7:6379: "), ("", "could not start Ray on this machine: ")],
)
def test_a_ray_that_cannot_be_reached_or_started_is_one_named_error(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("nobody answers")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(placement.ray, "init", init)
    with pytest.raises(ResourceError, match=expected + "nobody answers"), ray_session(config(), weights_bytes=1):
        pytest.fail("there is no session")


def test_only_the_cpus_that_this_process_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_local_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_local_cpus() == len(allowed)


# --- what actors are made with --------------------------------------------------------------------------------------


@dataclass
class FakeActorClass:
    """In place of `ray.remote(kind)`: making an actor gives its kind, options and arguments."""

    kind: type
    given: dict[str, Any] | None = None

    def options(self, **given: Any) -> FakeActorClass:
        return FakeActorClass(self.kind, given)

    def remote(self, *arguments: Any, **settings: Any) -> tuple[type, dict[str, Any], tuple[Any, ...]]:
        return self.kind, self.given or {}, arguments


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, int], tuple[dict[str, Any], dict[str, Any]]]:
    """Options and engine settings of the rollout actor of a rank."""
    monkeypatch.setattr(placement.ray, "remote", FakeActorClass)

    def make(cfg: RunConfig, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        kind, options, (own_rank, settings, sampling) = placement._create_rollout(cfg, rank, "DEFAULT")
        assert (kind, own_rank, sampling) == (placement.RolloutActor, rank, cfg.sampling)
        return options, settings

    return make


def test_an_engine_starts_from_the_initial_policy_whatever_the_run_stands_at(make_engine: Any, tmp_path: Path) -> None:
    """A replacement, or a resumed run, gets published weights before it serves; a checkpoint may be gone by then."""
    cfg = config(policy={"model": tmp_path / "policy"}, run={"dir": tmp_path / "run"})
    _, settings = make_engine(cfg, 0)
    assert settings["model"] == tmp_path / "policy"


def test_a_learner_starts_from_the_checkpoint(make_engine: Any, tmp_path: Path) -> None:
    cfg = config(policy={"model": tmp_path / "policy"})
    _, _, (model, *_) = placement._create_learner(cfg, tmp_path, tmp_path / "step_00002" / "policy", "DEFAULT")
    assert model == tmp_path / "step_00002" / "policy"


class FakeReservation:
    """Gives every process a place that says whose it is."""

    def strategy(self, role: str, rank: int) -> str:
        return f"{role} {rank}"


def test_the_ranks_of_a_learner_have_a_place_each_and_know_their_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Kept(FakeActorClass):
        def options(self, **given: Any) -> Kept:
            return Kept(self.kind, given)

        def remote(self, *arguments: Any, **settings: Any) -> Any:
            return (self.given or {})["scheduling_strategy"], settings["place"]

    monkeypatch.setattr(placement.ray, "remote", Kept)
    cfg = config(
        run={"prompts_per_step": 3},
        learner={"num_ranks": 3, "num_cpus": 2},
        deadlines={"update_s": 40, "save_s": 30, "start_s": 20},
        rollout={"load_deadline_s": 5},
    )
    made: Any = placement._create_learners(cfg, tmp_path, tmp_path, FakeReservation())  # type: ignore[arg-type]
    assert [strategy for strategy, _ in made] == ["learner 0", "learner 1", "learner 2"]
    assert [place.rank for _, place in made] == [0, 1, 2]
    assert {place.timeout_s for _, place in made} == {50}, "30 s for a save and four calls of an engine"


def test_a_learner_of_one_rank_meets_nobody(make_engine: Any, tmp_path: Path) -> None:
    made: Any = placement._create_learners(config(), tmp_path, tmp_path, FakeReservation())  # type: ignore[arg-type]
    ((_, options, _),) = made
    assert options["scheduling_strategy"] == "learner 0"


def test_every_engine_has_a_seed_of_its_own(make_engine: Any) -> None:
    """Engines of one seed would sample the same."""
    seeds = [make_engine(config(run={"seed": 40}, rollout={"num_actors": 3}), rank)[1]["seed"] for rank in range(3)]
    assert seeds == [40, 41, 42]


def test_an_actor_takes_the_groups_of_training_and_of_an_evaluation_and_a_load_at_once(make_engine: Any) -> None:
    cfg = config(run={"prompts_per_step": 600, "max_staleness": 1})
    options, _ = make_engine(cfg, 0)
    assert options["max_concurrency"] > 2 * max_groups_per_actor(cfg) == 2 * 1200


def test_ctrl_c_while_ray_starts_takes_effect_once_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def init(**_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # the signal's handler has run by now
        done.append("started")
        return SimpleNamespace(address_info={})

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(placement.ray, "init", init)
    monkeypatch.setattr(placement.ray, "shutdown", lambda: done.append("ended"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ray_session(config(), weights_bytes=0):
        done.append("used")
    assert done == ["started", "ended"]
    assert signal.getsignal(signal.SIGINT) is handler
