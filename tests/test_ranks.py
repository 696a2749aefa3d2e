"""The learner on several ranks: the step of one rank, whatever its share, and the same tensors on the way out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align import metrics
from align.algorithms import AlgorithmConfig
from align.batching import Batch, collate
from align.learner import Learner, LearnerConfig
from align.optimizer import OptimizerConfig
from align.policy import Policy
from align.ranks import Ranks
from tests.conftest import VOCAB_SIZE, character_tokenizer, random_qwen3
from tests.rank_processes import on_ranks
from tests.trajectories import make_scored, make_trajectory

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]
TOLERANCE = 2e-5
"""What the order of float32 sums may change in five steps, relative to the largest entry of a tensor."""
STEPS = 5


def batch_of(step: int, num_groups: int = 4) -> Batch:
    """Groups of three ragged trajectories, 3 to 40 tokens; the behavior log-probs are of no policy in particular."""
    generator = torch.Generator().manual_seed(step)
    scored = []
    for number in range(num_groups):
        trajectories, rewards = [], []
        for _ in range(3):
            length = min(int(torch.empty(()).log_normal_(2.3, 0.8, generator=generator)) + 1, 35)
            ids = torch.randint(3, VOCAB_SIZE, (2 + number + length,), generator=generator).tolist()
            logprobs = (-4 * torch.rand(length, generator=generator)).tolist()
            trajectories.append(make_trajectory(ids[:-length], ids[-length:], logprobs, version=step))
            rewards.append(torch.randn(length, generator=generator).tolist())
        scored.append(make_scored(trajectories, rewards, number))
    return collate(scored)


def new_learner(ranks: Ranks, tied: bool, model: Path | None = None, **settings: Any) -> Learner:
    """A learner whose passes are small, so that every rank has several and not all have the same number."""
    policy = Policy.load(model) if model else Policy(random_qwen3(seed=0, tied=tied), character_tokenizer())
    policy.shard(ranks)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.01)
    cfg = LearnerConfig(max_tokens_per_micro_batch=45)
    return Learner(policy, AlgorithmConfig(**settings), optimizer, cfg, num_steps=10)


def weights(learner: Learner) -> Arrays:
    """The whole policy, by its own publication; empty on all ranks but the first."""
    ranks = learner.policy.ranks
    if not ranks.first:
        learner.policy.follow()
        return {}
    found = {name: weight.numpy().copy() for name, weight in learner.policy.named_weights()}
    ranks.release()
    return found


def step(learner: Learner, batch: Batch) -> dict[str, float]:
    """The reduced metrics of one update, less the one that is a time."""
    values = metrics.reduce(learner.update(batch).metrics)
    del values["throughput/trained_tokens_per_s"]
    return values


def train(ranks: Ranks, tied: bool, settings: dict[str, Any]) -> Result:
    learner = new_learner(ranks, tied, **settings)
    logged = [step(learner, batch_of(number)) for number in range(STEPS)]
    return {"logged": logged, "weights": weights(learner)}


def assert_close(actual: Arrays, expected: Arrays, rtol: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_allclose(
            value, expected[name], rtol=0, atol=rtol * np.abs(expected[name]).max(), err_msg=name
        )


def assert_bitwise(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert np.array_equal(value, expected[name], equal_nan=True), name


# --- one step -----------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "plain": {"aggregation": "sum", "importance": "none", "baseline": "none"},
    "whole batch": {"aggregation": "token_mean", "baseline": "batch_mean", "whiten": True, "entropy_coefficient": 0.01},
}


@pytest.mark.parametrize("settings", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_and_four_ranks_log_and_learn_what_one_does(tied: bool, settings: dict[str, Any]) -> None:
    alone = train(Ranks(), tied, settings)
    before = weights(new_learner(Ranks(), tied))
    moved = max(np.abs(after - before[name]).max() for name, after in alone["weights"].items())
    assert moved > 3e-3, "the weights have to move for equality to say something"
    for num_ranks in (2, 4):
        results = on_ranks(num_ranks, train, tied, settings)
        worst = max(
            float(np.abs(v - alone["weights"][n]).max() / np.abs(alone["weights"][n]).max())
            for n, v in results[0]["weights"].items()
        )
        print(num_ranks, "worst", worst)
        assert_close(results[0]["weights"], alone["weights"])
        for result in results:
            for ours, theirs in zip(result["logged"], alone["logged"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
