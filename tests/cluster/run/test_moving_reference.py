"""The moving reference: when it moves, what a checkpoint holds of it, and how scorers take it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cluster.fleet.handle
from align.algorithm.config import AlgorithmConfig
from align.data.sampling import PLAIN
from align.data.types import FinishReason, Group, Prompt, Ticket, Trajectory, VersionSpan
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.metrics import Metric
from align.model.policy import Policy
from align.rewards.reference import ReferenceRewardConfig
from cluster.actors.learner import LearnerActor
from cluster.actors.scorer import ScorerActor, ScorerConfig, Verdict
from cluster.faults import RestartBudgetSpent, WrongWeights
from cluster.loop.loop import run_loop
from cluster.loop.saved_reference import SavedReference
from cluster.run.moving_reference import MovingReference
from tests.fakes.loop import World, complete, make_run, trained
from tests.fakes.models import random_qwen3
from tests.fakes.ray_actors import DEAD, FakeActor, failed_task, fails, gives
from tests.fakes.ray_actors import complete as complete_handles
from tests.fakes.scorers import ROLLOUT, Scorers, pool


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed; Ray is not running."""
    actors: list[Any] = []
    monkeypatch.setattr(cluster.fleet.handle.ray, "kill", lambda actor, no_restart: actors.append(actor))
    return actors


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_on_policy_every_group_is_scored_by_the_reference_of_the_last_refresh(seed: int, every: int) -> None:
    world = World(dice=random.Random(seed))
    complete(run_loop(make_run(world, steps=7, groups_per_step=3, num_actors=2, refresh_every=every)))
    scored_by = {number: version for _, number, version in world.events("score")}
    for step, tickets in enumerate(trained(world), start=1):
        assert {scored_by[number] for number in tickets} == {(step - 1) // every * every}


def test_the_reference_moves_after_the_weights_are_published_and_before_slots_are_free() -> None:
    world = World(dice=random.Random(1))
    complete(run_loop(make_run(world, steps=2, max_staleness=1, refresh_every=2)))
    kinds = [(kind, *rest[:1]) for kind, *rest in world.events("published", "refreshed", "release", "after_step")]
    assert kinds == [
        *[("published", 1), ("release",), ("after_step", 1)],
        *[("published", 2), ("refreshed", 2), ("release",), ("after_step", 2)],
    ]


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_off_policy_no_group_is_scored_by_a_reference_older_than_staleness_allows(max_staleness: int) -> None:
    world = World(dice=random.Random(2))
    complete(run_loop(make_run(world, steps=12, max_staleness=max_staleness, num_actors=2, refresh_every=1)))
    scored_by = {number: version for _, number, version in world.events("score")}
    for step, tickets in enumerate(trained(world), start=1):
        assert all(step - 1 - max_staleness <= scored_by[number] <= step - 1 for number in tickets)


# --- folders -----------------------------------------------------------------------------------------------------


class Workers:
    """A learner that writes its step into the folder, and scorers that remember what they were given."""

    def __init__(self) -> None:
        self.loaded: list[SavedReference] = []

    async def export(self, folder: Path) -> str:
        (folder / "config.json").write_text(folder.name)
        return f"fingerprint of {folder.name}"

    async def load(self, saved: SavedReference) -> None:
        assert (saved.folder / "config.json").read_text() == saved.folder.name
        self.loaded.append(saved)


def moving(folder: Path, every: int) -> tuple[MovingReference, Workers]:
    workers = Workers()
    return MovingReference(folder, every, workers.export, workers.load), workers


def test_a_reference_is_saved_loaded_and_the_one_before_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        reference, workers = moving(tmp_path / "reference", every=2)
        metrics = [await reference.refresh(step) for step in range(1, 6)]
        assert [one.value for (one,) in metrics] == [0, 2, 2, 4, 4]
        assert [saved.version for saved in workers.loaded] == [2, 4]
        assert [path.name for path in (tmp_path / "reference").iterdir()] == ["step_00004"]
        assert reference.saved == SavedReference(tmp_path / "reference/step_00004", 4, "fingerprint of step_00004")

    asyncio.run(scenario())


def test_a_reference_that_stays_writes_nothing(tmp_path: Path) -> None:
    async def scenario() -> list[Metric]:
        reference, workers = moving(tmp_path / "reference", every=0)
        await reference.copy_into(tmp_path)
        metrics = await reference.refresh(2)
        assert (workers.loaded, list(tmp_path.iterdir())) == ([], [])
        return metrics

    assert asyncio.run(scenario()) == []


def test_a_checkpoint_brings_its_reference_back_though_it_is_removed_itself_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        first, _ = moving(tmp_path / "reference", every=2)
        await first.refresh(2)
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        await first.copy_into(checkpoint)
        await first.refresh(4)  # after the checkpoint; the run that resumes knows nothing of it
        resumed, workers = moving(tmp_path / "reference", every=2)
        assert first.saved
        await resumed.restore(checkpoint, 2, "fingerprint of step_00002")
        (checkpoint / "reference" / "config.json").unlink()
        assert workers.loaded == [SavedReference(tmp_path / "reference" / "step_00002", 2, "fingerprint of step_00002")]
        assert (tmp_path / "reference" / "step_00002" / "config.json").read_text() == "step_00002"
        assert [path.name for path in (tmp_path / "reference").iterdir()] == ["step_00002"]
        assert [one.value for one in await resumed.refresh(3)] == [2]

    asyncio.run(scenario())


# --- scorers -----------------------------------------------------------------------------------------------------

SAVED = SavedReference(Path("reference/step_00002"), 2, "abc")


def test_every_scorer_takes_the_reference_and_a_wrong_fingerprint_ends_the_run() -> None:
    async def scenario() -> None:
        scorers = pool([FakeActor(load_reference=gives("abc")), FakeActor(load_reference=gives("abc"))], Scorers())
        await scorers.load_reference(SAVED)
        scorers = pool([FakeActor(load_reference=gives("abc")), FakeActor(load_reference=gives("xyz"))], Scorers())
        with pytest.raises(WrongWeights, match="scorer 1 read a reference with fingerprint xyz"):
            await scorers.load_reference(SAVED)

    complete_handles(scenario())


@pytest.mark.parametrize("lost_at", ["load", "score"])
def test_a_replacement_has_the_newest_reference_before_it_serves(lost_at: str, killed: list[Any]) -> None:
    events: list[Any] = []

    async def load(folder: Path) -> str:
        events.append(folder)
        return "abc"

    async def score(payload: Any) -> tuple[str, Verdict]:
        events.append("score")
        return "scores", Verdict((1.0,))

    class Replacements(Scorers):
        def create(self, rank: int) -> FakeActor:
            return FakeActor(ready=gives(None), score=score, load_reference=load)

    async def scenario() -> None:
        dies_at = {"load": fails(DEAD)} if lost_at == "load" else {}
        lost = FakeActor(load_reference=dies_at.get("load", gives("abc")), score=fails(DEAD))
        scorers = pool([lost], Replacements())
        await scorers.load_reference(SAVED)
        scored = await scorers.score(ROLLOUT)
        assert (await scored.scores, scored.outcomes) == ("scores", (1.0,))
        assert events == [SAVED.folder, "score"]
        assert killed == [lost]

    complete_handles(scenario())


def test_scorers_that_are_lost_at_every_load_end_the_run(killed: list[Any]) -> None:
    class Replacements(Scorers):
        def create(self, rank: int) -> FakeActor:
            return FakeActor(ready=gives(None), load_reference=fails(DEAD))

    async def scenario() -> None:
        scorers = pool([FakeActor(load_reference=fails(DEAD))], Replacements(), max_restarts=2)
        with pytest.raises(RestartBudgetSpent):
            await scorers.load_reference(SAVED)

    complete_handles(scenario())


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def learner(model_folder: Path, tmp_path: Path) -> LearnerActor:
    return LearnerActor(
        model_folder,
        AlgorithmConfig(),
        OptimizerConfig(),
        LearnerConfig(),
        compute_dtype="float32",
        wire_dtype="bfloat16",
        num_steps=3,
        sampling=PLAIN,
        reward=ReferenceRewardConfig(),
        judge=None,
        trajectories=tmp_path,
        seed=0,
    )


def scorer_of(folder: Path, compute_dtype: str) -> ScorerActor:
    """A scorer whose reward is the log-probability under the reference in this folder."""
    return ScorerActor(folder, folder, ReferenceRewardConfig(), False, ScorerConfig(), compute_dtype)


def group() -> Group:
    completions = ([5, 6, 7, 0], [9, 0])
    trajectories = tuple(
        Trajectory.from_completion(
            (3, 4), ids, [-1.0] * len(ids), (VersionSpan(0, 0, len(ids)),), FinishReason.STOP, seed
        )
        for seed, ids in enumerate(completions)
    )
    return Group(Ticket(0, Prompt("p", "", (3, 4)), (0, 1)), trajectories)


@torch.no_grad()
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_scorer_that_took_the_policy_scores_as_one_that_was_built_from_it(
    compute_dtype: str, learner: LearnerActor, tmp_path: Path
) -> None:
    learner.policy.model.load_state_dict(random_qwen3(seed=5).state_dict())
    folder = tmp_path / "saved"
    learner.export_policy(folder)
    fingerprint = learner.fingerprint()
    random_qwen3(seed=1).save_pretrained(tmp_path / "first")
    learner.policy.tokenizer.save_pretrained(tmp_path / "first")
    scorer = scorer_of(tmp_path / "first", compute_dtype)
    untouched = scorer_of(tmp_path / "first", compute_dtype)
    before, _ = scorer.score(group())
    assert scorer.load_reference(folder) == fingerprint
    built = scorer_of(folder, compute_dtype)
    (after, verdict), (expected, expected_verdict) = scorer.score(group()), built.score(group())
    for one, other, old in zip(after, expected, before, strict=True):
        assert np.array_equal(one.rewards, other.rewards)
        assert not np.allclose(one.rewards, old.rewards, atol=1e-3)
    sums = tuple(pytest.approx(float(one.rewards.sum()), rel=1e-6) for one in after)
    assert verdict.outcomes == expected_verdict.outcomes == sums
    assert scorer.load_reference(folder) == fingerprint, "and once more"
    own, first = scorer.log_distributions(group())[0], untouched.log_distributions(group())[0]
    assert all(np.array_equal(a, b) for a, b in zip(own, first, strict=True)), "evaluations stay with the first one"


@torch.no_grad()
def test_a_reference_of_other_weights_has_another_fingerprint(learner: LearnerActor, tmp_path: Path) -> None:
    learner.export_policy(tmp_path / "saved")
    fingerprint = learner.fingerprint()
    torn = Policy.load(tmp_path / "saved")
    next(torn.model.parameters()).view(-1)[0] += 1e-3
    torn.save(tmp_path / "torn")
    scorer = scorer_of(tmp_path / "saved", "float32")
    assert scorer.load_reference(tmp_path / "torn") != fingerprint


def test_a_scorer_that_cannot_read_the_folder_ends_the_run() -> None:
    async def scenario() -> None:
        error = failed_task(ValueError("model folder does not exist"))
        scorers = pool([FakeActor(load_reference=fails(error))], Scorers())
        with pytest.raises(Exception, match="scorer 0 failed during load"):
            await scorers.load_reference(SAVED)

    complete_handles(scenario())
