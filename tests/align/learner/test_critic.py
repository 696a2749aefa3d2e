"""The critic: what it sees, what it learns, and that a run with one resumes bit for bit and keeps out what is not finite."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.data.batching import Batch
from align.learner.critic import Critic, CriticConfig
from align.learner.learner import Learner
from align.model.policy import Policy
from align.model.value import ValueModel
from tests.fakes.batches import bandit_batch, poisoned, ragged_batch
from tests.fakes.critics import new_critic
from tests.fakes.learners import adam_state, bandit, new_learner, reduced, trained_and_restored, update, weights
from tests.oracles.equality import assert_bitwise, assert_close

PPO: dict[str, Any] = {"name": "ppo", "kl": "none", "kl_coefficient": 0.0}
WHOLE_RETURN: dict[str, Any] = {"baseline": "critic", "gae_lambda": 1.0}


def critic_of(learner: Learner) -> Critic:
    assert learner.critic is not None
    return learner.critic


def critic_state(critic: Critic) -> dict[str, Tensor]:
    """Weights and Adam's moments."""
    named = list(critic.model.named_parameters())
    moments = {f"{n}.{k}": v.clone() for n, p in named for k, v in critic.optimizer.adam.state.get(p, {}).items()}
    return {n: p.detach().clone() for n, p in named} | moments


def awake(critic: Critic) -> Critic:
    """With a head that says something."""
    with torch.no_grad():
        critic.model.head.weight.copy_(torch.linspace(-1, 1, critic.model.head.in_features))
    return critic


def to_learn(seed: int = 0) -> Batch:
    """A batch with old values and targets."""
    batch = ragged_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    old, targets = (torch.randn(batch.rewards.shape, generator=generator) for _ in range(2))
    return dataclasses.replace(batch, old_values=old, value_targets=targets)


# --- values ------------------------------------------------------------------------------------------------------


def test_a_new_critic_expects_nothing() -> None:
    assert not new_critic().values(ragged_batch()).any()


def test_the_value_at_a_token_is_that_of_the_state_before_it(model_folder: Path) -> None:
    critic = awake(Critic(ValueModel.load(model_folder), CriticConfig(), 3, value_clip=None, max_tokens=10_000))
    batch = ragged_batch()
    before = critic.values(batch)
    batch.token_ids[4, 6] += 1
    after = critic.values(batch)
    assert torch.equal(after[4, :7], before[4, :7])
    assert not torch.isclose(after[4, 7:], before[4, 7:]).any()
    assert torch.equal(after[:4], before[:4])
    assert not before[:, 0].any()
    assert not before[0, 7:].any()  # padding


def test_micro_batches_change_neither_the_values_nor_what_the_critic_learns() -> None:
    results = []
    for max_tokens in (10_000, 24, 1):
        critic = awake(new_critic(max_tokens=max_tokens))
        values = critic.values(ragged_batch())
        _, norm = critic.accumulate(to_learn())
        gradients = {n: p.grad.clone() for n, p in critic.model.named_parameters() if p.grad is not None}
        results.append(({"values": values, **gradients}, norm))
    (first, norm), *others = results
    assert norm > 0.1
    for other, other_norm in others:
        assert_close(other, first)
        assert other_norm == pytest.approx(norm, rel=1e-4)


def test_the_gradient_of_a_new_critics_head_by_hand() -> None:
    """V = 0 and old = 0: the bias has the gradient `mean(V - R)`, over the loss tokens of the minibatch."""
    batch = to_learn()
    batch = dataclasses.replace(batch, old_values=torch.zeros_like(batch.rewards))
    critic = new_critic()
    metrics, _ = critic.accumulate(batch)
    assert batch.value_targets is not None
    targets = batch.value_targets[batch.loss_mask]
    torch.testing.assert_close(critic.model.head.bias.grad, -targets.mean()[None])
    loss = sum(m.value * m.weight for m in metrics if m.name == "critic/loss") / len(targets)
    assert loss == pytest.approx(0.5 * float(targets.square().mean()), rel=1e-5)


def test_a_critic_without_targets_is_told_so() -> None:
    with pytest.raises(ValueError, match="put them into the batch first"):
        new_critic().accumulate(ragged_batch())


# --- the learner -------------------------------------------------------------------------------------------------


def test_a_critic_that_knows_nothing_gives_reward_to_go_with_lambda_1(new_policy: Any) -> None:
    with_critic, stats = update(new_learner(new_policy(), **WHOLE_RETURN), ragged_batch())
    without, plain_stats = update(new_learner(new_policy()), ragged_batch())
    assert_bitwise(with_critic, without)
    values = reduced(stats)
    assert {k: v for k, v in values.items() if not k.startswith("critic/")} == reduced(plain_stats)
    assert (values["critic/explained_variance"], values["critic/value_mean"]) == (0, 0)


def test_a_critic_learns_what_states_are_worth_and_the_advantages_shrink() -> None:
    """Reward 1 for token 1 and 5 for token 2 after it: two states with values that a linear head can say."""
    learner = new_learner(bandit([0.4, 0.3, 0.3]), lr=1e-9, **WHOLE_RETURN)
    batch = bandit_batch([1, 2, 1, 2], [1.0, 5.0, 1.0, 5.0])
    first = reduced(learner.update(batch))
    for _ in range(250):
        last = reduced(learner.update(batch))
    assert first["critic/explained_variance"] == 0
    assert last["critic/explained_variance"] > 0.95
    assert last["critic/loss"] < 0.05 * first["critic/loss"]
    assert last["critic/value_mean"] == pytest.approx(first["return/mean"], rel=0.1)


def test_a_warming_up_critic_learns_alone(new_policy: Any) -> None:
    learner = new_learner(new_policy(), critic_warmup_steps=2, **WHOLE_RETURN)
    before = weights(learner)
    for step in (1, 2):
        state = critic_state(critic_of(learner))
        gradients, stats = update(learner, ragged_batch(step))
        assert gradients == {}
        assert_bitwise(weights(learner), before)
        assert not torch.equal(critic_state(critic_of(learner))["head.bias"], state["head.bias"])
        assert (learner.version, reduced(stats)["optimizer/lr"], stats.skipped) == (step, 0, False)
    gradients, stats = update(learner, ragged_batch())
    assert gradients
    assert reduced(stats)["optimizer/lr"] == 1e-2


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_changes_neither_policy_nor_critic(new_policy: Any, value: float) -> None:
    learner = new_learner(new_policy(), **PPO)
    update(learner, ragged_batch())
    before = weights(learner) | adam_state(learner) | critic_state(critic_of(learner))
    gradients, stats = update(learner, poisoned(ragged_batch(1), value))
    assert gradients == {}
    assert stats.skipped
    assert_bitwise(weights(learner) | adam_state(learner) | critic_state(critic_of(learner)), before)
    assert all(p.grad is None for p in critic_of(learner).optimizer.parameters)


def test_a_critic_that_overflows_stops_the_policys_step_too(new_policy: Any) -> None:
    learner = new_learner(new_policy(), **WHOLE_RETURN)
    update(learner, ragged_batch())
    with torch.no_grad():
        critic_of(learner).model.head.bias.fill_(1e30)  # finite values, whose squared error is not
    before = weights(learner) | critic_state(critic_of(learner))
    _, stats = update(learner, ragged_batch(1))
    assert stats.skipped
    assert_bitwise(weights(learner) | critic_state(critic_of(learner)), before)


def test_a_critic_is_there_exactly_if_the_algorithm_reads_it(policy: Policy) -> None:
    plain = new_learner(policy)
    rest = (plain.optimizer.cfg, plain.cfg, 10, plain.sampling)
    with pytest.raises(ValueError, match="'critic' needs a critic"):
        Learner(policy, new_learner(policy, **WHOLE_RETURN).objective.cfg, *rest)
    with pytest.raises(ValueError, match="'none' reads no critic"):
        Learner(policy, plain.objective.cfg, *rest, new_critic())


# --- state -------------------------------------------------------------------------------------------------------


def test_a_restored_learner_with_a_critic_goes_on_bit_for_bit(new_policy: Any, tmp_path: Path) -> None:
    settings = {**PPO, "num_epochs": 2, "num_minibatches": 2, "eps": 1e-8, "schedule": "linear"}
    learner, restored = trained_and_restored(new_policy(), tmp_path, **settings)
    stats = update(learner, ragged_batch(2))[1]
    assert reduced(update(restored, ragged_batch(2))[1]) == reduced(stats)
    assert_bitwise(weights(restored) | adam_state(restored), weights(learner) | adam_state(learner))
    assert_bitwise(critic_state(critic_of(restored)), critic_state(critic_of(learner)))


def test_a_checkpoint_without_a_critic_or_with_another_one_is_refused(new_policy: Any, tmp_path: Path) -> None:
    new_learner(new_policy()).save_optimizer(tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match="holds no critic"):
        new_learner(new_policy(), **WHOLE_RETURN).load_optimizer(tmp_path / "optimizer.safetensors", 1)
    new_critic(vocab_size=5).save(tmp_path)
    with pytest.raises(ValueError, match=r"not of this run's \[critic\] model"):
        new_critic(vocab_size=64).load(tmp_path)
