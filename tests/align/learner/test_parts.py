"""Parts of the objective by way of the learner: step rewards, distillation, imitation, guards, rejection, truncated support."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch, collate
from align.data.sampling import Sampling
from align.data.types import ScoredGroup
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.policy import Policy
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig
from tests.fakes.batches import group_batch, three_rows
from tests.fakes.learners import new_learner, reduced, update
from tests.fakes.models import VOCAB_SIZE
from tests.fakes.trajectories import make_group, make_trajectory
from tests.oracles import formulas as oracle
from tests.oracles.micro_batches import assert_cuts_are_equal
from tests.oracles.tabular import TabularLM

P, REF = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
PARTS: dict[str, dict[str, Any]] = {
    "process": {"rewards": "process", "group_std": True},
    "clip_cov": {"entropy_guard": "clip_cov", "guard_fraction": 0.3, "guard_band": (-9.0, 9.0)},
    "kl_cov": {"entropy_guard": "kl_cov", "guard_fraction": 0.3},
    "reverse_kl": {"rewards": "none", "distillation": "reverse_kl", "distillation_top_k": 4},
    "jensen_shannon": {"distillation": "jensen_shannon", "distillation_top_k": 4, "distillation_mixture": 0.2},
    "supervised": {"supervised_coefficient": 0.1, "supervised_min_outcome": 0.0},
    "rejected": {"importance": "rejected", "min_importance_weight": 0.05},
    "soft_gate": {"surrogate": "soft_gate", "importance": "none"},
    "batch_std": {"name": "scalerl"},
}


def bandit(table: Tensor = P) -> Policy:
    return Policy(TabularLM(table.log()[None]), tokenizer=None)


def sampled_by(p: Tensor, rewards: tuple[Any, Any, Any], ref: Tensor = REF) -> Batch:
    """Tokens 1, 2 | 1 | 2 in two groups, on-policy under p, with the reference's whole distribution."""
    batch = three_rows(rewards)
    order = ref.argsort(descending=True).expand(*batch.token_ids.shape, 3)
    return dataclasses.replace(
        batch,
        behavior_logprobs=p.log()[batch.token_ids],
        ref_logprobs=ref.log()[batch.token_ids],
        ref_top_ids=order,
        ref_top_logprobs=ref.log()[order],
    )


def with_likeliest(batch: Batch, num_top: int) -> Batch:
    """The batch with likeliest tokens of a made-up reference."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(*batch.token_ids.shape, VOCAB_SIZE, generator=generator)
    top = logits.log_softmax(-1).topk(num_top, dim=-1)
    return dataclasses.replace(batch, ref_top_ids=top.indices, ref_top_logprobs=top.values)


# --- micro-batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_how_a_batch_is_cut_changes_neither_gradient_nor_metrics(new_policy: Any, part: str) -> None:
    batch = group_batch()
    batch = dataclasses.replace(batch, step_ends=batch.loss_mask & (torch.arange(batch.loss_mask.shape[1]) % 2 == 0))
    assert_cuts_are_equal(new_policy, with_likeliest(batch, 4), 1e-4, **PARTS[part])


@pytest.mark.parametrize("part", PARTS)
def test_the_part_changes_the_gradient(new_policy: Any, part: str) -> None:
    batch = with_likeliest(group_batch(), 4)
    with_part, _ = update(new_learner(new_policy(), **PARTS[part]), batch)
    without, _ = update(new_learner(new_policy()), batch)
    assert any(not torch.allclose(with_part[name], without[name], rtol=1e-3) for name in without)


# --- rewards -----------------------------------------------------------------------------------------------------


def test_process_rewards_are_compared_within_the_group_and_added_up_from_the_token_on() -> None:
    """Steps of 1, 2 and 7 in the first group have mean 10 / 3; the second group's only step has none to be compared with."""
    batch = three_rows(([1, 2], [7], [5]))
    advantages, _ = Objective(AlgorithmConfig(rewards="process")).advantages(batch)
    mean = 10 / 3
    expected = torch.tensor([[0, 3 - 2 * mean, 2 - mean], [0, 7 - mean, 0], [0, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    last = dataclasses.replace(
        batch, step_ends=torch.tensor([[False, False, True], [False, True, False], [False, True, False]])
    )
    last.rewards[0, 1] = 0.0
    advantages, _ = Objective(AlgorithmConfig(rewards="process")).advantages(last)
    torch.testing.assert_close(advantages, torch.tensor([[0, -2.5, -2.5], [0, 2.5, 0], [0, 0, 0]]))


def test_without_rewards_the_advantage_is_what_the_kl_charges_for_the_token_alone() -> None:
    batch = sampled_by(P, ([100, 200], [300], [400]))
    advantages, _ = Objective(AlgorithmConfig(name="on_policy_distillation")).advantages(batch)
    expected = (REF / P).log()[batch.token_ids].masked_fill(~batch.loss_mask, 0.0)
    torch.testing.assert_close(advantages, expected)


def test_the_sampled_distillation_has_the_gradient_of_the_kl_on_average() -> None:
    """Each action as often as its probability says: minus the mean of `A grad log pi` is `p_v (log p_v / q_v - KL)`."""
    rows = [make_trajectory([0], [a], [float(P[a].log())]) for a in (0,) * 5 + (1,) * 3 + (2,) * 2]
    reward = ReferenceReward(bandit(REF), ReferenceRewardConfig(), 1000)
    group = make_group(rows)
    gradients, _ = update(
        new_learner(bandit(), name="on_policy_distillation"), collate([ScoredGroup(group, reward(group))])
    )
    away = (P / REF).log()
    torch.testing.assert_close(gradients["table"][0], P * (away - (P * away).sum()))


@pytest.mark.parametrize(
    "parts", [{"name": "on_policy_distillation"}, {"rewards": "none", "distillation": "reverse_kl"}]
)
def test_distillation_turns_the_policy_into_the_reference(parts: dict[str, Any]) -> None:
    """A bandit is in one state, whichever token it is at: a trajectory of 64 tokens is 64 of one."""
    learner = new_learner(
        bandit(), lr=0.1, eps=1e-8, num_steps=100, importance="truncated", aggregation="token_mean", **parts
    )
    generator = torch.Generator().manual_seed(0)
    before = oracle.kl(P.tolist(), REF.tolist())
    reward = ReferenceReward(bandit(REF), ReferenceRewardConfig(), 1000, num_top=0)
    for _ in range(100):
        p = learner.policy.model.table.detach()[0].softmax(-1)
        actions = torch.multinomial(p, 64, replacement=True, generator=generator)
        group = make_group([make_trajectory([0], actions.tolist(), p[actions].log().tolist())])
        learner.update(collate([ScoredGroup(group, reward(group))]))
    after = learner.policy.model.table.detach()[0].softmax(-1)
    assert oracle.kl(after.tolist(), REF.tolist()) < 0.02 * before


# --- distillation ------------------------------------------------------------------------------------------------


def test_the_whole_reverse_kl_reaches_the_learner_by_hand() -> None:
    batch = sampled_by(P, ([1, 2], [7], [5]))
    parts = {
        "rewards": "none",
        "distillation": "reverse_kl",
        "distillation_coefficient": 0.5,
        "aggregation": "token_mean",
    }
    gradients, stats = update(new_learner(bandit(), **parts), batch)
    away = (P / REF).log()
    torch.testing.assert_close(gradients["table"][0], 0.5 * P * (away - (P * away).sum()))
    values = reduced(stats)
    assert values["distillation/divergence"] == pytest.approx(oracle.kl(P.tolist(), REF.tolist()), rel=1e-5)
    assert values["distillation/rest_fraction"] == pytest.approx(0, abs=1e-6)


def test_the_probability_beyond_the_likeliest_tokens_is_counted() -> None:
    batch = sampled_by(P, ([1, 2], [7], [5]))
    cut = dataclasses.replace(
        batch, ref_top_ids=batch.ref_top_ids[..., :1], ref_top_logprobs=batch.ref_top_logprobs[..., :1]
    )
    parts = {"distillation": "reverse_kl", "distillation_top_k": 1}
    values = reduced(update(new_learner(bandit(), **parts), cut)[1])
    assert values["distillation/rest_fraction"] == pytest.approx(0.5)
    expected = oracle.kl([0.2, 0.8], [0.5, 0.5])
    assert values["distillation/divergence"] == pytest.approx(expected, rel=1e-5)


def test_a_distillation_without_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="'reverse_kl' needs the reference's likeliest tokens"):
        new_learner(bandit(), distillation="reverse_kl").update(three_rows(([1, 2], [7], [5])))


def test_likeliest_tokens_that_the_policy_does_not_have_are_refused() -> None:
    batch = sampled_by(P, ([1, 2], [7], [5]))
    batch.ref_top_ids[0, 0, 0] = 3
    batch.ref_top_ids[0, 1, 0] = 3
    with pytest.raises(ValueError, match="token 3 was asked for, but the vocabulary has 3 tokens"):
        new_learner(bandit(), distillation="reverse_kl").update(batch)


@pytest.mark.parametrize("num_top", [0, 5])
def test_the_reference_gives_its_likeliest_tokens_for_every_sampled_one(policy: Policy, num_top: int) -> None:
    group = make_group([make_trajectory([5, 6, 7], [8, 9], [-1, -1]), make_trajectory([5], [40], [-1])])
    scores = ReferenceReward(policy, ReferenceRewardConfig(), 1000, num_top)(group)
    for trajectory, score in zip(group.trajectories, scores, strict=True):
        sampled = np.flatnonzero(trajectory.loss_mask)
        assert score.ref_top.token_ids.shape == (len(sampled), num_top or VOCAB_SIZE)
        for t, ids, logprobs in zip(sampled, score.ref_top.token_ids, score.ref_top.logprobs, strict=True):
            with torch.no_grad():
                logits = policy.model(input_ids=torch.from_numpy(trajectory.token_ids[:t])[None]).logits[0, -1]
            p = np.array(oracle.softmax(logits.tolist()))
            np.testing.assert_allclose(np.exp(logprobs), p[ids], rtol=1e-3)
            np.testing.assert_allclose(np.sort(p)[::-1][: len(ids)], p[ids], rtol=1e-4)


def test_nobody_pays_for_likeliest_tokens_that_were_not_asked_for(policy: Policy) -> None:
    group = make_group([make_trajectory([5], [40], [-1])])
    assert ReferenceReward(policy, ReferenceRewardConfig(), 1000)(group)[0].ref_top is None
    assert AlgorithmConfig().num_top is None
    assert AlgorithmConfig(distillation="reverse_kl").num_top == 0
    assert AlgorithmConfig(distillation="forward_kl", distillation_top_k=8).num_top == 8


# --- imitation ---------------------------------------------------------------------------------------------------


def test_trajectories_that_earned_enough_are_imitated_by_hand() -> None:
    """Outcomes 3, 7 and 5 with a least one of 5: tokens 1 of the second row and 2 of the third."""
    parts = {"supervised_coefficient": 0.1, "supervised_min_outcome": 5.0, "aggregation": "token_mean"}
    batch = sampled_by(P, ([1, 2], [7], [5]))
    with_part, stats = update(new_learner(bandit(), **parts), batch)
    without, _ = update(new_learner(bandit(), aggregation="token_mean"), batch)
    expected = -0.1 / 4 * (torch.eye(3)[1] + torch.eye(3)[2] - 2 * P)
    torch.testing.assert_close(with_part["table"][0] - without["table"][0], expected)
    assert reduced(stats)["supervised/token_fraction"] == 0.5


# --- guards ------------------------------------------------------------------------------------------------------


def test_clip_cov_takes_the_gradient_of_its_tokens_and_kl_cov_charges_their_divergence() -> None:
    """Off-policy by a ratio r = 2 at the guarded token 0; the slope of `r - 1 - log r` by the log-probability is r - 1."""
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = three_rows(([0, 0], [0], [0]))
    batch.token_ids[1, 1] = 0
    batch.rewards[1, 1] = 4.0
    batch.behavior_logprobs[:, 1:] = p.log()[batch.token_ids[:, 1:]]
    batch.behavior_logprobs[1, 1] = math.log(0.25)
    parts = {"surrogate": "importance_weighted", "importance": "none"}
    plain, _ = update(new_learner(bandit(p), **parts), batch)
    score = torch.eye(3)[0] - p
    torch.testing.assert_close(plain["table"][0], -2 * 4 * score)
    guard = {"guard_fraction": 0.25, **parts}
    clipped, stats = update(new_learner(bandit(p), entropy_guard="clip_cov", guard_band=(-9.0, 9.0), **guard), batch)
    assert not clipped["table"].any()
    charged, _ = update(new_learner(bandit(p), entropy_guard="kl_cov", guard_coefficient=3.0, **guard), batch)
    torch.testing.assert_close(charged["table"][0], (3.0 * (2 - 1) - 2 * 4) * score)
    values = reduced(stats)
    assert values["guard/token_fraction"] == 0.25
    logprobs, advantages = batch.behavior_logprobs[batch.loss_mask], torch.tensor([0.0, 0.0, 4.0, 0.0])
    covariance = torch.cov(torch.stack([logprobs, advantages]), correction=0)[0, 1]
    assert values["guard/covariance"] == pytest.approx(float(covariance), rel=1e-5)


# --- rejection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["reinforce", "importance_weighted", "soft_gate"])
def test_what_is_out_of_the_band_is_dropped_counted_and_the_rest_is_not_weighted(surrogate: str) -> None:
    batch = sampled_by(P, ([1, 0], [1], [1]))
    batch.behavior_logprobs[0, 1] -= math.log(3)
    band = {"min_importance_weight": 0.5, "max_importance_weight": 2.0}
    gradients, stats = update(new_learner(bandit(), surrogate=surrogate, importance="rejected", **band), batch)
    assert reduced(stats)["importance/truncated_fraction"] == 0.25
    expected = -((torch.eye(3)[1] - P) + (torch.eye(3)[2] - P))
    torch.testing.assert_close(gradients["table"][0], expected)


# --- truncated support -------------------------------------------------------------------------------------------


def truncated_learner(top_k: int, top_p: float, **parts: Any) -> Learner:
    optimizer = OptimizerConfig(max_grad_norm=math.inf)
    return Learner(bandit(), AlgorithmConfig(**parts), optimizer, LearnerConfig(), 1, Sampling(1.0, top_k, top_p))


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.7)])
def test_the_learner_has_the_samplers_distribution_and_its_gradient(top_k: int, top_p: float) -> None:
    """Both keep 0.5 and 0.3: log-probabilities of 5/8 and 3/8, mismatch 0, no gradient for the token that cannot be sampled."""
    behavior = torch.tensor([5 / 8, 3 / 8]).log()
    rows = [make_trajectory([0], [a], [float(behavior[a])]) for a in (0, 1)]
    batch = three_rows(([0, 0], [0], [0])).rows([1, 2])
    batch = dataclasses.replace(
        batch,
        token_ids=torch.tensor([list(row.token_ids) for row in rows]),
        behavior_logprobs=torch.tensor([list(row.behavior_logprobs) for row in rows]),
    )
    batch.rewards[0, 1] = 1.0
    gradients, stats = update(truncated_learner(top_k, top_p), batch)
    torch.testing.assert_close(gradients["table"][0], -torch.tensor([1 - 5 / 8, -3 / 8, 0.0]))
    values = reduced(stats)
    assert values["mismatch/abs_max"] < 1e-6
    assert values["support/outside_fraction"] == 0
    assert values["policy/entropy"] == pytest.approx(oracle.entropy([5 / 8, 3 / 8]), rel=1e-5)


def test_the_entropy_bonus_is_that_of_the_truncated_distribution_and_has_its_gradient() -> None:
    """`dH/dlogit_v = -p_v (log p_v + H)` over the tokens that are kept, 0 for the others."""
    learner = truncated_learner(2, 1.0, entropy_coefficient=0.2, aggregation="token_mean")
    batch = three_rows(([0, 0], [0], [0]))
    batch.token_ids[:, 1:] = torch.tensor([[0, 1], [0, 0], [1, 0]])
    gradients, _ = update(learner, batch)
    p = torch.tensor([5 / 8, 3 / 8])
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(gradients["table"][0, :2], 0.2 * p * (p.log() + entropy))
    assert gradients["table"][0, 2] == 0


def test_a_sampled_token_outside_the_learners_support_is_kept_and_counted() -> None:
    batch = sampled_by(P, ([1, 1], [1], [1]))
    gradients, stats = update(truncated_learner(2, 1.0), batch)
    assert reduced(stats)["support/outside_fraction"] == 0.5
    assert all(g.isfinite().all() for g in gradients.values())
    assert "support/outside_fraction" not in reduced(update(new_learner(bandit()), batch)[1])
