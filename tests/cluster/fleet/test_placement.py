"""What actors are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.fleet import placement
from cluster.fleet.placement import max_groups_per_actor
from cluster.spec.config import RunConfig
from tests.fakes.run_files import config


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
