"""Critic, inner epochs and 8-bit moments on several ranks: the steps of one rank, also where one rank's share is not finite."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align import metrics
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.learner.shares import passes
from align.model.policy import Policy
from align.model.ranks import Ranks
from tests.fakes.batches import batch_of
from tests.fakes.critics import new_critic
from tests.fakes.models import WIDTH, character_tokenizer, random_qwen3
from tests.fakes.rank_learners import Arrays, Result, shards, step, weights
from tests.harness.rank_processes import on_ranks
from tests.oracles.equality import assert_near

pytestmark = pytest.mark.integration

TOLERANCE = 1e-5
"""What the order of float32 sums may change in twenty optimizer steps, relative to the largest entry of a tensor."""
STEPS = 5
POISONED = 5
"""The trajectory whose reward is not a number."""
PPO: dict[str, Any] = {"name": "ppo", "value_clip": 0.01, "num_epochs": 2, "num_minibatches": 2}
DECOUPLED: dict[str, Any] = {
    "surrogate": "ppo_clip",
    "proximal": "recomputed",
    "importance": "truncated",
    "num_epochs": 2,
    "num_minibatches": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "small_minibatches": {**PPO, "num_epochs": 1, "num_minibatches": 5},  # of two or three trajectories
    "decoupled_padded": {**DECOUPLED, "packing": False},
}


def batch(number: int) -> Batch:
    """Ragged trajectories, with a reference whose log-probabilities differ from the behavior's."""
    found = batch_of(number)
    generator = torch.Generator().manual_seed(100 + number)
    noise = 0.3 * torch.randn(found.behavior_logprobs.shape, generator=generator)
    return dataclasses.replace(found, ref_logprobs=found.behavior_logprobs + noise)


def new_learner(
    ranks: Ranks,
    *,
    packing: bool = True,
    policy: Policy | None = None,
    moments: Any = "float32",
    **settings: Any,
) -> Learner:
    """Small passes, so that every rank has several and not all have the same number; a critic where one is asked for."""
    policy = policy or Policy(random_qwen3(seed=0), character_tokenizer())
    policy.shard(ranks)
    algorithm, max_tokens = AlgorithmConfig(**settings), 45
    has_critic = algorithm.baseline == "critic"
    critic = new_critic(value_clip=algorithm.value_clip, max_tokens=max_tokens) if has_critic else None
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.01, moments=moments)
    cfg = LearnerConfig(max_tokens_per_micro_batch=max_tokens, packing=packing)
    return Learner(policy, algorithm, optimizer, cfg, num_steps=10, critic=critic)


def of_critic(learner: Learner) -> Arrays:
    """Weights and Adam's state of the critic."""
    if learner.critic is None:
        return {}
    found = {}
    for name, parameter in learner.critic.model.named_parameters():
        state = learner.critic.optimizer.adam.state[parameter]
        for key, value in {"weight": parameter.detach(), **state}.items():
            found[f"{name} {key}"] = value.numpy().copy()
    return found


def train(ranks: Ranks, case: str) -> Result:
    learner = new_learner(ranks, **CASES[case])
    logged = [step(learner, batch(number)) for number in range(STEPS)]
    return {"logged": logged, "critic": of_critic(learner), "weights": weights(learner)}


def skip(ranks: Ranks, settings: dict[str, Any]) -> Result:
    """A good update, and one with a trajectory whose loss is not finite: its optimizer steps are left out, the others taken."""
    learner = new_learner(ranks, **settings)
    learner.update(batch(0))
    before = shards(learner), of_critic(learner)
    bad = batch(1)
    bad.rewards[POISONED] = math.nan
    stats = learner.update(bad)
    values = metrics.reduce(stats.metrics)
    return {
        "skipped": stats.skipped,
        "taken": values["optimizer/inner_steps"],
        "before": before,
        "after": (shards(learner), of_critic(learner)),
        "weights": weights(learner),
    }


SKIPS: dict[str, dict[str, Any]] = {
    "all": {**PPO, "whiten": True},  # one advantage that is not finite leaves none
    "some": {**DECOUPLED, "num_epochs": 1, "num_minibatches": 3, "baseline": "critic", "gae_lambda": 0.9},
}


def eight_bits(ranks: Ranks, folder: Path) -> Result:
    """Updates with 8-bit moments, and their checkpoint."""
    policy = Policy(random_qwen3(seed=0, width=WIDTH), character_tokenizer())
    learner = new_learner(ranks, policy=policy, moments="8bit", baseline="batch_mean")
    logged = [step(learner, batch(number)) for number in range(STEPS)]
    learner.policy.save(folder / "policy")
    learner.save_optimizer(folder / "optimizer.safetensors")
    return {"logged": logged, "weights": weights(learner)}


def eight_bits_again(ranks: Ranks, folder: Path, copy: Path) -> Result:
    """That checkpoint taken up and written again, and the next update."""
    policy = Policy.load(folder / "policy")
    learner = new_learner(ranks, policy=policy, moments="8bit", baseline="batch_mean")
    learner.load_optimizer(folder / "optimizer.safetensors", version=STEPS)
    learner.save_optimizer(copy)
    return step(learner, batch(STEPS))


HAS_8_BITS = importlib.util.find_spec("bitsandbytes") is not None
NEEDS_8_BITS = pytest.mark.skipif(not HAS_8_BITS, reason="the extra optim8bit is not installed")


def all_of(ranks: Ranks, folder: Path) -> Result:
    """All that the tests ask of several ranks, in one start of processes."""
    found: Result = {case: train(ranks, case) for case in CASES}
    found |= {f"skip {name}": skip(ranks, settings) for name, settings in SKIPS.items()}
    if HAS_8_BITS:
        own = folder / f"of_{ranks.num_ranks}"
        found["8 bits"] = eight_bits(ranks, own)
        found["8 bits again"] = eight_bits_again(ranks, folder / "of_1", own / "again.safetensors")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(folder: Path) -> Result:
    """What one rank finds, in this process."""
    return all_of(Ranks(), folder)


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, one: Result, folder: Path) -> list[Result]:
    """What two ranks found, and four."""
    return on_ranks(request.param, all_of, folder)


# --- critic and inner epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_log_and_learn_what_one_does(several: list[Result], one: Result, case: str) -> None:
    assert_near(several[0][case]["weights"], one[case]["weights"], TOLERANCE)
    for result in several:
        assert_near(result[case]["critic"], one[case]["critic"], TOLERANCE)
        for ours, theirs in zip(result[case]["logged"], one[case]["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_the_cases_reach_what_they_are_for(one: Result) -> None:
    """Ratios are clipped, values too, several steps are taken of a batch, weights and critic move."""
    before = weights(new_learner(Ranks(), **CASES["ppo"]))
    for case, settings in CASES.items():
        last, found = one[case]["logged"][-1], one[case]
        steps = settings.get("num_epochs", 1) * settings["num_minibatches"]
        assert last["optimizer/inner_steps"] == steps
        assert last["surrogate/clipped_fraction"] > 0.005, case
        assert min(np.abs(after - before[name]).max() for name, after in found["weights"].items()) > 3e-3
        if found["critic"]:
            assert last["critic/clipped_fraction"] > 0.005, case
            assert np.abs(found["critic"]["head.weight weight"]).max() > 3e-3


def test_packing_is_on_and_off_and_no_minibatch_of_a_rank_is_as_long_as_another() -> None:
    packed, padded = (new_learner(Ranks(), **CASES[case]) for case in ("ppo", "decoupled_padded"))
    assert packed.budget.packs
    assert not padded.budget.packs
    lengths = batch(0).lengths.tolist()
    cuts = [list(passes(Ranks(rank, 4), lengths[:3], packed.budget.cut)) for rank in range(4)]
    assert any(not one.counts for of_rank in cuts for one in of_rank), "three trajectories on four ranks"


@pytest.mark.parametrize(("name", "taken"), [("all", 0), ("some", 2)])
def test_optimizer_steps_that_are_not_finite_on_one_rank_are_left_out_on_all(
    several: list[Result], one: Result, name: str, taken: int
) -> None:
    expected = one[f"skip {name}"]
    assert expected["taken"] == taken
    for result in several:
        found = result[f"skip {name}"]
        assert found["skipped"]
        assert found["taken"] == taken
        for before, after in zip(found["before"], found["after"], strict=True):
            same = [np.array_equal(value, after[key]) for key, value in before.items()]
            assert same and all(same) if not taken else not any(same)
        assert_near(found["after"][1], expected["after"][1], TOLERANCE)
    assert_near(several[0][f"skip {name}"]["weights"], expected["weights"], TOLERANCE)


# --- 8-bit moments -------------------------------------------------------------------------------------------------


@NEEDS_8_BITS
def test_8_bit_moments_of_several_ranks_are_those_of_one(several: list[Result], one: Result) -> None:
    """But for a moment here and there that rounding carries to the next of the 256 values."""
    there, expected = several[0]["8 bits"]["weights"], one["8 bits"]["weights"]
    gaps = np.concatenate([np.abs(value - expected[name]).ravel() for name, value in there.items()])
    assert (gaps > 2e-6).mean() < 2e-3
    assert gaps.max() < STEPS * 1e-3 * 0.1, "a tenth of the way that Adam can go"
    for ours, theirs in zip(several[0]["8 bits"]["logged"], one["8 bits"]["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@NEEDS_8_BITS
def test_8_bit_moments_are_taken_up_and_written_again_bit_for_bit_by_any_number_of_ranks(
    several: list[Result], one: Result, folder: Path
) -> None:
    saved = (folder / "of_1" / "optimizer.safetensors").read_bytes()
    assert (folder / "of_1" / "again.safetensors").read_bytes() == saved
    assert (folder / f"of_{len(several)}" / "again.safetensors").read_bytes() == saved
    for result in several:
        assert result["8 bits again"] == pytest.approx(one["8 bits again"], rel=1e-5, abs=1e-6)
