"""Rewards of whole steps: where steps end, and that nothing of a reward is lost on the way to their ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import collate
from align.data.types import Group, ScoredGroup
from align.model.policy import Policy
from align.rewards.kinds import CompositeReward
from align.rewards.overlong import OverlongConfig, OverlongReward
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig
from align.rewards.steps import paid_by_step, step_ends
from tests.fakes.models import random_qwen3
from tests.fakes.trajectories import make_group, make_trajectory

BY_STEP = ReferenceRewardConfig(alpha=0.5, clip=3.0, step_separator=".")


@pytest.mark.parametrize(
    ("pieces", "separator", "expected"),
    [
        (["a", ".", "b", "."], ".", [1, 3]),
        (["a", ".", "b"], ".", [1, 2]),
        (["a", ".", "b", ".", ""], ".", [1, 4]),
        (["a", ".", ".", "b"], ".", [1, 3]),
        ([".", "a", ".", "b"], ".", [2, 3]),
        (["a", "\n", "\n", "b", "\n\n"], "\n\n", [2, 4]),
        (["a.b", ".c"], ".", [0, 1]),
        (["a", "b"], ".", [1]),
        ([""], ".", [0]),
        ([], ".", []),
    ],
)
def test_a_step_ends_with_the_token_that_completes_its_separator(
    pieces: list[str], separator: str, expected: list[int]
) -> None:
    found = step_ends(pieces, np.ones(len(pieces), np.bool_), separator)
    assert np.flatnonzero(found).tolist() == expected


def test_tokens_that_were_not_sampled_end_no_step_and_are_no_text_of_one() -> None:
    mask = np.array([False, False, True, False, True, True])
    assert np.flatnonzero(step_ends(["p", ".", "a", ".", ".", "b"], mask, ".")).tolist() == [4, 5]


@given(st.lists(st.tuples(st.text("ab.", max_size=3), st.booleans(), st.floats(-4, 4, width=32)), min_size=1))
def test_the_reward_of_a_trajectory_stays_and_steps_are_what_splitting_the_text_gives(
    tokens: list[tuple[str, bool, float]],
) -> None:
    pieces, mask = [piece for piece, _, _ in tokens], np.array([sampled for _, sampled, _ in tokens])
    rewards = np.where(mask, np.array([reward for *_, reward in tokens], np.float32), np.float32(0))
    ends = step_ends(pieces, mask, ".")
    assert not (ends & ~mask).any() and ends.any() == mask.any()
    paid = paid_by_step(rewards, mask, ends)
    assert float(paid.sum()) == pytest.approx(float(rewards.sum()), abs=1e-4)
    assert not paid[~ends].any()
    text = "".join(piece for piece, sampled in zip(pieces, mask, strict=True) if sampled)
    if all(len(piece) <= 1 for piece in pieces):  # a longer token may hold several steps
        assert ends.sum() == max(sum(bool(step) for step in text.split(".")), int(mask.any()))


def two_sentences(tokenizer: PreTrainedTokenizerFast) -> Group:
    texts = ("ab.cd.", "a.bcd", "abcd")
    return make_group([make_trajectory(tokenizer.encode("x"), tokenizer.encode(text)) for text in texts])


def test_the_reference_pays_at_the_ends_of_steps_what_it_would_pay_by_token(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, group = Policy(random_qwen3(seed=2), tokenizer), two_sentences(tokenizer)
    by_token = ReferenceReward(policy, ReferenceRewardConfig(alpha=0.5, clip=3.0), 1000)(group)
    by_step = ReferenceReward(policy, BY_STEP, 1000)(group)
    ends = [[3, 6], [2, 5], [4]]
    for plain, stepped, places in zip(by_token, by_step, ends, strict=True):
        assert stepped.step_ends is not None and np.flatnonzero(stepped.step_ends).tolist() == places
        sums = [part.sum() for part in np.split(plain.rewards, [place + 1 for place in places])][: len(places)]
        assert stepped.rewards[places].tolist() == pytest.approx([float(s) for s in sums], abs=1e-5)
        assert np.array_equal(stepped.ref_logprobs, plain.ref_logprobs)


def test_process_rewards_of_real_steps_are_compared_within_their_group(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, group = Policy(random_qwen3(seed=2), tokenizer), two_sentences(tokenizer)
    scores = ReferenceReward(policy, BY_STEP, 1000)(group)
    batch = collate([ScoredGroup(group, scores)])
    advantages, _ = Objective(AlgorithmConfig(rewards="process", baseline="none")).advantages(batch)
    values = torch.tensor([float(r) for score in scores for r in score.rewards[score.step_ends]], dtype=torch.float64)
    first, second, *_ = (values - values.mean()).tolist()
    assert advantages[0, 1:].tolist() == pytest.approx([first + second] * 3 + [second] * 3, abs=1e-5)


def test_a_part_that_judges_the_whole_answer_is_paid_at_the_last_step(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, group = Policy(random_qwen3(seed=2), tokenizer), two_sentences(tokenizer)
    length = OverlongReward(OverlongConfig(max_tokens=4, cache_tokens=2))
    scores = CompositeReward([(1.0, ReferenceReward(policy, BY_STEP, 1000)), (0.5, length)], ["reference", "overlong"])(
        group
    )
    assert [np.flatnonzero(score.step_ends).tolist() for score in scores] == [[3, 6], [2, 5], [4]]
    ScoredGroup(group, scores)
