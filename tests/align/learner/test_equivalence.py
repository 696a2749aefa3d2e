"""Configs that must be equal give one curve over five steps of the real learner; every bundle is covered, new ones too.

The policy is a table over the process of `enumeration.py`. Each run samples from its own current policy with the same random
numbers, so that two runs stay equal only as long as their steps are. A curve is the loss, gradient norm and mean reward of each
step, and the weights at the end. Adam forgets the scale of a gradient (its epsilon is scaled along); the gradient norm does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithm import returns
from align.algorithm.bundles import BUNDLES
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch, collate
from align.data.types import ScoredGroup, TokenRewards
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.policy import Policy
from tests.fakes.learners import EXTRA
from tests.fakes.trajectories import make_group, make_trajectory
from tests.oracles.enumeration import COMPLETIONS, Process, logprobs_of, table
from tests.oracles.tabular import TabularLM

STEPS, GROUPS, GROUP_SIZE = 5, 3, 4
EPSILON = 1e-3
"""Of Adam: large, or it would make a step of full size out of the rounding of a gradient that is 0."""
CASE, BEHAVIOR = Process.new(), table(0) + table(2, 0.5)

WITHOUT_CRITIC = sorted(name for name, parts in BUNDLES.items() if parts.get("baseline") != "critic")
"""A critic learns between the steps, so its bundle is compared in `test_critic.py`."""


@dataclass(frozen=True)
class Curve:
    """What five steps did; [STEPS] each, and the table [states, V] at the end."""

    loss: Tensor
    grad_norm: Tensor
    reward: Tensor
    table: Tensor


def sample(behavior: Tensor, step: int) -> Batch:
    """Groups of completions drawn by these logits, with rewards and reference of the process."""
    logprobs, reference = logprobs_of(behavior), logprobs_of(CASE.reference)
    generator = torch.Generator().manual_seed(step)
    drawn = torch.multinomial(logprobs.sum(dim=1).exp(), GROUPS * GROUP_SIZE, replacement=True, generator=generator)
    scored = []
    for number, rows in enumerate(drawn.reshape(GROUPS, GROUP_SIZE).tolist()):
        trajectories, scores = [], []
        for row in rows:
            length = len(COMPLETIONS[row])
            trajectories.append(make_trajectory([0], COMPLETIONS[row], logprobs[row, :length].tolist(), step))
            rewards, ref = (
                torch.cat([torch.zeros(1), values[row, :length].float()]).numpy()
                for values in (CASE.token_rewards, reference)
            )
            scores.append(TokenRewards(rewards, ref))
        scored.append(ScoredGroup(make_group(trajectories, number), tuple(scores)))
    return collate(scored)


def run(
    cfg: AlgorithmConfig,
    *,
    off_policy: bool = False,
    change: Any = lambda batch: batch,
    max_tokens: int = 10_000,
    scale: float = 1.0,
) -> Curve:
    """Five updates of a fresh learner, whose gradient has this scale; `change` may alter what it is given."""
    policy = Policy(TabularLM(table(0).float()), tokenizer=None)
    optimizer = OptimizerConfig(lr=0.05, eps=EPSILON * scale, max_grad_norm=math.inf)
    learner = Learner(policy, cfg, optimizer, LearnerConfig(max_tokens_per_micro_batch=max_tokens), STEPS)
    rows = []
    for step in range(STEPS):
        behavior = BEHAVIOR if off_policy else policy.model.table.detach().double()
        stats = learner.update(change(sample(behavior, step)))
        found: dict[str, list[tuple[float, float]]] = {}
        for metric in stats.metrics:
            found.setdefault(metric.name, []).append((metric.value, metric.weight))
        names = ("optimizer/loss", "optimizer/grad_norm", "reward/trajectory_mean")
        rows.append([sum(v * w for v, w in found[n]) / sum(w for _, w in found[n]) for n in names])
    loss, grad_norm, reward = torch.tensor(rows, dtype=torch.float64).T
    return Curve(loss, grad_norm, reward, policy.model.table.detach())


def assert_equal(left: Curve, right: Curve, scale: float = 1.0, *, loss: bool = True, reward: bool = True) -> None:
    """The left gradient is `scale` times the right one at every step."""
    torch.testing.assert_close(left.grad_norm, scale * right.grad_norm, rtol=1e-4, atol=1e-6)
    if reward:
        torch.testing.assert_close(left.reward, right.reward, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.table, right.table, rtol=1e-3, atol=1e-4)
    if loss:
        torch.testing.assert_close(left.loss, right.loss, rtol=1e-4, atol=1e-6)
    assert float(right.grad_norm.min()) > 1e-3, "there was no gradient, the test shows nothing"


def algorithm(name: str = "reinforce", **parts: Any) -> AlgorithmConfig:
    return AlgorithmConfig(name=name, **({"importance": "none"} | parts))


# --- by hand -----------------------------------------------------------------------------------------------------


def leave_one_out_by_hand(batch: Batch) -> Batch:
    """Rewards that are the advantages of RLOO already."""
    outcome = batch.rewards.masked_fill(~batch.loss_mask, 0.0).sum(dim=1)
    advantages = outcome.clone()
    for row, group in enumerate(batch.group_index.tolist()):
        others = [r for r, g in enumerate(batch.group_index.tolist()) if g == group and r != row]
        advantages[row] -= outcome[others].mean()
    return replace(batch, rewards=returns.on_last_action(advantages, batch.loss_mask))


def test_rloo_is_leave_one_out_by_hand() -> None:
    right = run(algorithm(aggregation="trajectory_mean"), change=leave_one_out_by_hand)
    assert_equal(run(algorithm("rloo", kl="none", kl_coefficient=0.0)), right, reward=False)


# --- pairs -------------------------------------------------------------------------------------------------------

OUTCOME = {"rewards": "outcome", "aggregation": "trajectory_mean"}
GROUP_MEAN = OUTCOME | {"baseline": "group_outcome_mean"}
RLOO = OUTCOME | {"baseline": "leave_one_out"}
PLAIN_GRPO = {"name": "grpo", "group_std": False, "kl": "none", "kl_coefficient": 0.0, "aggregation": "trajectory_mean"}
TOKEN_WEIGHTS = {"importance": "truncated", "max_importance_weight": math.inf}
FREE = {"clip_low": 1.0, "clip_high": math.inf}
KL = {"kl": "loss", "kl_coefficient": 0.2}
N = 1 - 1 / GROUP_SIZE

# left, right, scale of the gradient, off-policy, whether the loss is equal too
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], float, bool, bool]] = {
    "GRPO without std is RLOO less 1/G": (PLAIN_GRPO, RLOO, N, False, False),
    "with std it does not matter whether the row is in its mean": (
        GROUP_MEAN | {"group_std": True},
        RLOO | {"group_std": True},
        N,
        False,
        False,
    ),
    "Dr. GRPO is the sum over a constant": (
        {"name": "dr_grpo", "loss_length": 7},
        {"name": "dr_grpo", "aggregation": "sum", "loss_length": 0},
        1 / (7 * GROUPS * GROUP_SIZE),
        False,
        True,
    ),
    "whitening forgets the batch mean": ({"whiten": True, "baseline": "batch_mean"}, {"whiten": True}, 1, False, True),
    "PPO without clips is the weighted surrogate": (
        {"surrogate": "ppo_clip", **FREE},
        {"surrogate": "importance_weighted"},
        1,
        True,
        True,
    ),
    "CISPO without bounds is weighted REINFORCE": ({"surrogate": "cispo", **FREE}, TOKEN_WEIGHTS, 1, True, True),
    "the weighted surrogate has the gradient of weighted REINFORCE": (
        {"surrogate": "importance_weighted"},
        TOKEN_WEIGHTS,
        1,
        True,
        False,
    ),
    "weights held at 1 are no weights": (
        {"importance": "truncated", "min_importance_weight": 1.0, "max_importance_weight": 1.0},
        {},
        1,
        True,
        True,
    ),
    "k3 with k2's gradient is k2": (KL | {"kl_estimator": "k3_grad_k2"}, KL | {"kl_estimator": "k2"}, 1, False, False),
    "on-policy the weighted surrogate is REINFORCE": ({"surrogate": "importance_weighted"}, {}, 1, False, False),
    "on-policy PPO is REINFORCE": ({"surrogate": "ppo_clip"}, {}, 1, False, False),
    "on-policy CISPO is REINFORCE": ({"surrogate": "cispo"}, {}, 1, False, True),
    "on-policy GSPO is REINFORCE by the mean over tokens": (
        {"surrogate": "gspo"} | GROUP_MEAN | {"aggregation": "trajectory_token_mean"},
        GROUP_MEAN | {"aggregation": "trajectory_token_mean"},
        1,
        False,
        False,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_configs_that_must_be_equal_give_one_curve(name: str) -> None:
    left, right, scale, off_policy, loss = PAIRS[name]
    found = run(algorithm(**left), off_policy=off_policy, scale=scale)
    assert_equal(found, run(algorithm(**right), off_policy=off_policy), scale, loss=loss)


@pytest.mark.parametrize("parts", [{"surrogate": "ppo_clip"}, {"surrogate": "cispo"}, TOKEN_WEIGHTS], ids=str)
def test_off_policy_the_same_configs_differ_from_reinforce(parts: dict[str, Any]) -> None:
    left, right = run(algorithm(**parts), off_policy=True), run(algorithm(), off_policy=True)
    assert float((left.grad_norm / right.grad_norm - 1).abs().max()) > 0.02


# --- every bundle ------------------------------------------------------------------------------------------------


def bundle(name: str) -> AlgorithmConfig:
    return AlgorithmConfig(name=name, **EXTRA.get(name, {}))


COMPARING = [name for name in WITHOUT_CRITIC if bundle(name).baseline in ("group_outcome_mean", "leave_one_out")]
"""Bundles whose baseline compares whole trajectories."""


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_micro_batches_give_the_curve_of_the_whole_batch(name: str) -> None:
    assert_equal(run(bundle(name), max_tokens=5), run(bundle(name)))


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_the_order_of_the_trajectories_does_not_matter(name: str) -> None:
    order = torch.randperm(GROUPS * GROUP_SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    assert_equal(run(bundle(name), change=lambda batch: batch.rows(order)), run(bundle(name)))


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_on_policy_a_bundle_has_the_gradient_of_its_advantages_by_reinforce(name: str) -> None:
    """Ratios are 1 and no bound is hit, so that only advantages, aggregation and KL are left."""
    cfg = bundle(name)
    plain = cfg.model_copy(update={"surrogate": "reinforce", "importance": "none", "dual_clip": None})
    assert_equal(run(cfg), run(plain), loss=False)


@pytest.mark.parametrize("name", COMPARING)
def test_adding_a_constant_to_all_outcomes_changes_nothing_where_a_baseline_takes_it_away(name: str) -> None:
    cfg = bundle(name)

    def shifted(batch: Batch) -> Batch:
        last = returns.on_last_action(torch.full((batch.num_trajectories,), 3.0), batch.loss_mask)
        return replace(batch, rewards=batch.rewards + last)

    assert_equal(run(cfg, change=shifted), run(cfg), reward=False)
