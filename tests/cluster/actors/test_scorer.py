"""The scorer actor, in this process: with a reference, without one, and with a reward that raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from align.data.types import Group, Prompt, Ticket
from align.model.folder import load_tokenizer
from align.rewards.exact_match import ExactMatchConfig
from align.rewards.kinds import RewardConfig
from align.rewards.reference import ReferenceRewardConfig
from cluster.actors.scorer import ScorerActor, ScorerConfig
from tests.fakes.trajectories import make_trajectory

TEXT = ExactMatchConfig(extract="text")


def scorer(folder: Path, reward: RewardConfig, reference: bool = True, with_ref_logprobs: bool = False) -> ScorerActor:
    return ScorerActor(folder, folder if reference else None, reward, with_ref_logprobs, ScorerConfig(), "float32")


def group(folder: Path, *completions: str, **metadata: object) -> Group:
    tokenizer = load_tokenizer(folder)
    prompt = Prompt("p7", "the ", tuple(tokenizer.encode("the ")), metadata)
    trajectories = tuple(make_trajectory(prompt.token_ids, tokenizer.encode(text)) for text in completions)
    return Group(Ticket(0, prompt, tuple(range(len(completions)))), trajectories)


def test_without_a_reference_a_scorer_reads_tokens_as_the_policy_does_and_loads_no_model(model_folder: Path) -> None:
    actor = scorer(model_folder, TEXT, reference=False)
    scores, _ = actor.score(group(model_folder, "cat", "dog", answer="cat"))
    assert [score.rewards.tolist() for score in scores] == [[0] * 6 + [1], [0] * 7]
    assert [score.ref_logprobs for score in scores] == [None, None]
    assert not hasattr(actor, "reference")


def test_a_kl_term_gets_the_references_log_probabilities_beside_the_outcome(model_folder: Path) -> None:
    cats = group(model_folder, "cat", answer="cat")
    (score,), _ = scorer(model_folder, TEXT, with_ref_logprobs=True).score(cats)
    (plain,), _ = scorer(model_folder, ReferenceRewardConfig()).score(cats)
    assert score.rewards.tolist() == [0] * 6 + [1]
    assert score.ref_logprobs is not None
    assert plain.ref_logprobs is not None
    assert np.array_equal(score.ref_logprobs, plain.ref_logprobs)
    assert (score.ref_logprobs[4:] < 0).all()


def test_an_outcome_without_a_kl_term_does_not_ask_a_reference_that_is_there(model_folder: Path) -> None:
    actor: Any = scorer(model_folder, TEXT)
    (score,), _ = actor.score(group(model_folder, "cat", answer="cat"))
    assert score.ref_logprobs is None
    assert actor.sample([group(model_folder, "cat").ticket.prompt], max_tokens=3, seed=0), "evaluations may"


def test_trajectories_whose_reward_raises_are_told_to_the_controller_with_all_that_it_takes_to_see_why(
    model_folder: Path,
) -> None:
    actor = scorer(model_folder, ExactMatchConfig(), reference=False)
    broken = group(model_folder, "cat", "dog", answer="five")
    scores, verdict = actor.score(broken)
    assert verdict.outcomes == ()
    assert [failure.completion for failure in verdict.failures] == ["cat", "dog"]
    failure = verdict.failures[0]
    assert "ValueError: 'five' is not a number" in failure.traceback
    assert failure.traceback == scores[0].failure
    assert (failure.ticket, failure.seed, failure.prompt_id, failure.prompt) == (0, 0, "p7", "the ")
    assert failure.num_tokens == broken.trajectories[0].num_completion_tokens
    assert 0 < verdict.ended_s - verdict.began_s < 60


def test_what_a_reference_says_beside_a_failure_leaves_it_a_failure(model_folder: Path) -> None:
    actor = scorer(model_folder, ExactMatchConfig(), with_ref_logprobs=True)
    (score,), _ = actor.score(group(model_folder, "5", answer="five"))
    assert score.failure is not None
    assert score.ref_logprobs is not None
