"""The reference model's log-probability as a reward, with the worked example of DESIGN.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from align.data.batching import micro_batches
from align.data.types import Group, TokenRewards
from align.model.policy import Policy
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig, token_reward
from tests.fakes.models import random_qwen3
from tests.fakes.trajectories import make_group, make_trajectory
from tests.oracles import formulas as oracle
from tests.oracles.tabular import TabularLM

PLAIN = ReferenceRewardConfig()
STATE = "我今天去了公园"
NEXT = {"玩": 0.6, "吃": 0.3, "睡": 0.1}


def reference_that_goes_to_the_park(tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A real Qwen3 whose head is turned so that the state's last hidden vector gives the probabilities `NEXT`."""
    model = random_qwen3(seed=3, tied=False)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([tokenizer.encode(STATE)])).last_hidden_state[0, -1]
        logits = torch.full((model.config.vocab_size,), -1e4)
        for character, probability in NEXT.items():
            logits[tokenizer.encode(character)[0]] = math.log(probability)
        model.lm_head.weight.copy_(logits[:, None] * hidden / hidden.square().sum())
    return Policy(model, tokenizer)


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_the_worked_example_of_the_design(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    state = tokenizer.encode(STATE)
    assert tokenizer.decode(state) == STATE
    assert len(state) == 7
    group = make_group([make_trajectory(state, tokenizer.encode(character)) for character in NEXT])
    reward = ReferenceReward(reference_that_goes_to_the_park(tokenizer), PLAIN, max_tokens)
    scores = reward(group)
    assert [score.rewards[:7].tolist() for score in scores] == [[0] * 7] * 3
    assert [round(float(score.rewards[7]), 2) for score in scores] == [-0.51, -1.20, -2.30]
    for score, probability in zip(scores, NEXT.values(), strict=True):
        assert float(score.rewards[7]) == pytest.approx(math.log(probability), abs=1e-4)
        assert np.array_equal(score.ref_logprobs, score.rewards)


def ragged_group() -> Group:
    """Trajectories of different lengths, the longest neither first nor last."""
    generator = torch.Generator().manual_seed(0)
    lengths = ((3, 2), (1, 6), (5, 5), (2, 1))
    trajectories = []
    for prompt, completion in lengths:
        ids = torch.randint(3, 60, (prompt + completion,), generator=generator).tolist()
        logprobs = (-3 * torch.rand(completion, generator=generator)).tolist()
        trajectories.append(make_trajectory(ids[:prompt], ids[prompt:], logprobs))
    return make_group(trajectories)


def naive_logprobs(policy: Policy, token_ids: list[int], first: int) -> list[float]:
    """Log-probability of each token from `first` on, by one unpadded forward pass per token; 0 before."""
    result = [0.0] * first
    for t in range(first, len(token_ids)):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([token_ids[:t]])).logits[0, -1]
        result.append(math.log(oracle.softmax(logits.tolist())[token_ids[t]]))
    return result


@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_every_sampled_token_gets_its_own_naive_logprob_however_the_group_is_cut(
    policy: Policy, max_tokens: int
) -> None:
    group = ragged_group()
    scores = ReferenceReward(policy, PLAIN, max_tokens)(group)
    for trajectory, score in zip(group.trajectories, scores, strict=True):
        first = int(trajectory.loss_mask.argmax())
        expected = naive_logprobs(policy, trajectory.token_ids.tolist(), first)
        np.testing.assert_allclose(score.rewards, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(score.ref_logprobs, score.rewards)


def test_a_pass_holds_as_many_real_tokens_as_fit_and_gives_what_padded_passes_give(policy: Policy) -> None:
    """Of 5, 7, 10 and 3 tokens: 10 and 5 share a pass of 15, 7 and 3 another; padded, no two would fit with the 10."""
    group, passes = ragged_group(), []
    assert policy.trunk.packs
    hook = policy.model.model.register_forward_pre_hook(
        lambda *call: passes.append(call[2]["input_ids"].numel()), with_kwargs=True
    )
    packed = ReferenceReward(policy, PLAIN, 15)(group)
    assert passes == [15, 10]
    policy.trunk.packs = False
    padded = ReferenceReward(policy, PLAIN, 15)(group)
    hook.remove()
    assert len(passes) - 2 == len(micro_batches([5, 7, 10, 3], 15)) == 3
    for one, other in zip(packed, padded, strict=True):
        np.testing.assert_allclose(one.ref_logprobs, other.ref_logprobs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(one.rewards, other.rewards, rtol=1e-6, atol=1e-6)


def test_alpha_takes_away_the_behavior_logprob_and_clip_cuts_what_is_left(policy: Policy) -> None:
    group = ragged_group()
    plain = ReferenceReward(policy, PLAIN, 1000)(group)
    bent = ReferenceReward(policy, ReferenceRewardConfig(alpha=0.5, clip=2.0), 1000)(group)
    cut = 0
    for trajectory, before, after in zip(group.trajectories, plain, bent, strict=True):
        for t, sampled in enumerate(trajectory.loss_mask):
            unclipped = before.rewards[t] - 0.5 * trajectory.behavior_logprobs[t] if sampled else 0.0
            cut += abs(unclipped) > 2
            assert float(after.rewards[t]) == pytest.approx(max(-2.0, min(2.0, unclipped)), abs=1e-6)
        np.testing.assert_array_equal(after.ref_logprobs, before.ref_logprobs)
    assert cut > 0


def test_scoring_leaves_no_gradient_and_gives_float32(policy: Policy) -> None:
    scores: tuple[TokenRewards, ...] = ReferenceReward(policy, ReferenceRewardConfig(alpha=0.3, clip=5.0), 1000)(
        ragged_group()
    )
    assert all(p.grad is None for p in policy.model.parameters())
    assert {s.rewards.dtype for s in scores} == {np.dtype(np.float32)}


def test_token_reward_computed_by_hand() -> None:
    ref = np.array([-0.5, -1.0, -8.0], np.float32)
    behavior = np.array([-0.25, -3.0, -0.5], np.float32)
    for alpha, clip, expected in (
        (0.0, None, [-0.5, -1.0, -8.0]),
        (1.0, None, [-0.25, 2.0, -7.5]),
        (0.5, None, [-0.375, 0.5, -7.75]),
        (1.0, 1.5, [-0.25, 1.5, -1.5]),
    ):
        assert token_reward(ref, behavior, ReferenceRewardConfig(alpha=alpha, clip=clip)).tolist() == expected


def test_with_alpha_1_a_policy_that_is_the_reference_gets_exactly_0() -> None:
    logprobs = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert token_reward(logprobs, logprobs, ReferenceRewardConfig(alpha=1.0)).tolist() == [0, 0, 0]


def test_with_alpha_1_the_expected_reward_is_minus_the_kl_divergence() -> None:
    reference = Policy(TabularLM(torch.tensor([[0.6, 0.3, 0.1]]).log()), tokenizer=None)
    behavior = [0.2, 0.3, 0.5]
    group = make_group([make_trajectory([0], [a], [math.log(p)]) for a, p in enumerate(behavior)])
    scores = ReferenceReward(reference, ReferenceRewardConfig(alpha=1.0), 1000)(group)
    expected_reward = sum(p * float(score.rewards[1]) for p, score in zip(behavior, scores, strict=True))
    assert expected_reward == pytest.approx(-oracle.kl(behavior, [0.6, 0.3, 0.1]), abs=1e-6)
