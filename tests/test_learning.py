"""The learner actor, in this process: what it gives to the canary, and what ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.algorithms import AlgorithmConfig
from align.learner import LearnerConfig
from align.optimizer import OptimizerConfig
from cluster.faults import TrainingDiverged
from cluster.learning import LearnerActor


@pytest.fixture
def actor(model_folder: Path, tmp_path: Path) -> LearnerActor:
    return LearnerActor(
        model_folder,
        AlgorithmConfig(),
        OptimizerConfig(),
        LearnerConfig(),
        compute_dtype="float32",
        wire_dtype="float32",
        num_steps=3,
        temperature=1.0,
        judge=None,
        trajectories=tmp_path,
        seed=0,
    )


PROMPTS = [[5], [6, 7, 8, 9], list(range(3, 23))]


@pytest.mark.parametrize("max_tokens", [2, 4, 19, 20, 21, 30])
def test_a_canary_sequence_is_never_longer_than_an_engine_takes(max_tokens: int, actor: LearnerActor) -> None:
    whole = actor.canary_sequences(PROMPTS, max_tokens=1000, seed=1)
    cut = actor.canary_sequences(PROMPTS, max_tokens, seed=1)
    assert cut == [sequence[:max_tokens] for sequence in whole]
    assert max(map(len, cut)) == max_tokens


def test_a_canary_sequence_is_a_prompt_that_the_policy_went_on_with(actor: LearnerActor) -> None:
    for prompt, sequence in zip(PROMPTS, actor.canary_sequences(PROMPTS, max_tokens=1000, seed=1), strict=True):
        assert sequence[: len(prompt)] == prompt
        assert 1 <= len(sequence) - len(prompt) <= 16
    assert len({tuple(actor.canary_sequences(PROMPTS, 1000, seed)[2]) for seed in range(3)}) > 1


@torch.no_grad()
def test_weights_that_are_not_finite_are_not_exported(actor: LearnerActor) -> None:
    actor.export()
    name, weight = next(iter(actor.policy.named_weights()))
    weight.view(-1)[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="finite") as caught:
        actor.export()
    assert name in caught.value.message
    assert "lower optimizer.lr" in caught.value.advice
