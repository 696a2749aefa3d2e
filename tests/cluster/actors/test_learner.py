"""The learner actor, in this process: what it gives to the canary, and what ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from align.algorithm.config import AlgorithmConfig
from align.data.sampling import PLAIN
from align.data.types import Group, Prompt, Ticket
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.rewards.exact_match import ExactMatchConfig
from align.rewards.kinds import RewardConfig
from align.rewards.reference import ReferenceRewardConfig
from cluster.actors.learner import LearnerActor
from cluster.actors.scorer import ScorerActor, ScorerConfig
from cluster.faults import TrainingDiverged
from tests.fakes.trajectories import make_scored, make_trajectory


def learner_actor(model_folder: Path, tmp_path: Path, reward: RewardConfig, **learner: Any) -> LearnerActor:
    return LearnerActor(
        model_folder,
        AlgorithmConfig(),
        OptimizerConfig(),
        LearnerConfig(**learner),
        compute_dtype="float32",
        wire_dtype="float32",
        num_steps=3,
        sampling=PLAIN,
        judge=None,
        reward=reward,
        trajectories=tmp_path,
        seed=0,
    )


@pytest.fixture
def actor(model_folder: Path, tmp_path: Path) -> LearnerActor:
    return learner_actor(model_folder, tmp_path, ReferenceRewardConfig())


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


def test_the_batch_of_an_update_that_was_not_finite_is_written_beside_the_trajectories(
    actor: LearnerActor, tmp_path: Path
) -> None:
    good, bad = (
        make_scored([make_trajectory([5, 6], [7, 8])], [[value, value]]) for value in (2.0, 3e38)
    )  # the sum overflows
    actor.update(0, good.group, good.scores)
    actor.update(1, bad.group, bad.scores)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["step_00001_not_finite.safetensors"]
    kept = load_file(tmp_path / "step_00001_not_finite.safetensors")
    assert kept["token_ids"].tolist() == [[5, 6, 7, 8]]
    assert kept["rewards"].tolist() == [[0, 0, *[pytest.approx(3e38)] * 2]]
    actor.update(2, bad.group, bad.scores)
    with pytest.raises(TrainingDiverged) as caught:
        actor.update(3, bad.group, bad.scores)
    recorded = [pyarrow.parquet.read_table(tmp_path / f"step_0000{step}.parquet").to_pylist()[0] for step in (0, 3)]
    assert len(recorded[0]["advantages"]) == len(recorded[0]["policy_logprobs"]) == 2
    assert recorded[1]["advantages"] is None and len(recorded[1]["rewards"]) == 2, "the update that ended the run"
    path = tmp_path / "step_00003_not_finite.safetensors"
    assert path.is_file()
    assert str(path) in caught.value.advice


def test_the_deterministic_mode_refuses_operations_that_vary(model_folder: Path, tmp_path: Path) -> None:
    scored = make_scored([make_trajectory([5, 6], [7, 8]), make_trajectory([5, 6], [9])], [[1.0, -2.0], [3.0]])
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        actor = learner_actor(model_folder, tmp_path, ReferenceRewardConfig(), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        actor.update(0, scored.group, scored.scores)
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_weights_that_are_not_finite_are_not_exported(actor: LearnerActor) -> None:
    actor.export()
    name, weight = next(iter(actor.policy.named_weights()))
    weight.view(-1)[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="finite") as caught:
        actor.export()
    assert name in caught.value.message
    assert "lower optimizer.lr" in caught.value.advice


# --- evaluations --------------------------------------------------------------------------------------------------


def answered(actor: LearnerActor, text: str, answer: str) -> Group:
    """One prompt, whose one completion reads `text`."""
    prompt = Prompt("p", "the sum is ", tuple(actor.policy.tokenizer.encode("the sum is ")), {"answer": answer})
    completion = actor.policy.tokenizer.encode(text)
    return Group(Ticket(0, prompt, (0,)), (make_trajectory(prompt.token_ids, completion),))


def test_without_a_reference_an_answer_has_no_kl_and_the_verifier_of_the_reward_judges_it(
    model_folder: Path, tmp_path: Path
) -> None:
    actor = learner_actor(model_folder, tmp_path, ExactMatchConfig(extract="text"))
    groups = [answered(actor, text, "a cat") for text in ("a cat", "a dog")]
    right, wrong = actor.evaluate(None, *groups)
    assert (right.completion, right.kl, right.accuracy) == ("a cat", None, 1.0)
    assert (wrong.completion, wrong.kl, wrong.accuracy) == ("a dog", None, 0.0)


def test_the_kl_of_a_policy_to_itself_is_zero_and_a_reference_reward_verifies_nothing(
    actor: LearnerActor, model_folder: Path
) -> None:
    scorer = ScorerActor(model_folder, model_folder, ReferenceRewardConfig(), False, ScorerConfig(), "float32")
    group = answered(actor, "a cat", "a cat")
    (answer,) = actor.evaluate(scorer.log_distributions(group)[0], group)
    assert answer.kl == pytest.approx(0, abs=1e-6)
    assert answer.accuracy is None
