"""Inner epochs: which rows a step has, what its ratio starts from, and that one step per batch is what it always was."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm import corrections
from align.data.batching import Batch
from align.data.sampling import PLAIN, Sampling
from align.data.token_budget import TokenBudget
from align.learner.epochs import minibatches, old_logprobs
from tests.fakes.batches import bandit_batch, group_batch, poisoned, ragged_batch
from tests.fakes.learners import adam_state, bandit, new_learner, reduced, trained_and_restored, update, weights
from tests.oracles.equality import assert_bitwise, assert_close

CLIP: dict[str, Any] = {"surrogate": "ppo_clip", "importance": "none"}
DECOUPLED: dict[str, Any] = {"surrogate": "ppo_clip", "proximal": "recomputed", "importance": "truncated"}


# --- minibatches -------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_every_pass_has_every_row_once_in_shares_that_differ_by_at_most_one(
    rows: int, num_epochs: int, num_minibatches: int, version: int
) -> None:
    if num_minibatches > rows:
        with pytest.raises(ValueError, match="one would be empty"):
            list(minibatches(rows, num_epochs, num_minibatches, version))
        return
    steps = list(minibatches(rows, num_epochs, num_minibatches, version))
    assert len(steps) == num_epochs * num_minibatches
    for epoch in range(num_epochs):
        shares = steps[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        assert sorted(row for share in shares for row in share) == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert steps == list(minibatches(rows, num_epochs, num_minibatches, version))


def test_the_order_is_another_one_in_every_pass_and_batch_and_that_of_the_batch_without_minibatches() -> None:
    orders = [list(minibatches(50, 2, 2, version)) for version in (0, 1)]
    passes = [tuple(map(tuple, order[i : i + 2])) for order in orders for i in (0, 2)]
    assert len(set(passes)) == 4
    assert list(minibatches(4, 2, 1, 7)) == [[0, 1, 2, 3]] * 2


def test_an_update_tells_its_advantages_and_what_the_policy_said_when_each_trajectory_was_first_learned_from(
    new_policy: Any,
) -> None:
    batch = ragged_batch()
    stats = {}
    for epochs, parts in ((1, 1), (2, 1), (2, 2)):
        learner = new_learner(new_policy(), num_epochs=epochs, num_minibatches=parts, **CLIP)
        before = old_logprobs(learner.policy, batch, TokenBudget(1000, packs=False), PLAIN)
        stats[epochs, parts] = learner.update(batch)
        assert torch.equal(stats[epochs, parts].advantages, learner.objective.advantages(batch)[0])
        assert torch.equal(stats[epochs, parts].policy_logprobs.isnan(), ~batch.loss_mask)
    found = {key: found.policy_logprobs[batch.loss_mask] for key, found in stats.items()}
    at_the_start = before[batch.loss_mask]
    torch.testing.assert_close(found[1, 1], at_the_start)
    torch.testing.assert_close(found[2, 1], at_the_start)
    (first, second) = list(minibatches(batch.num_trajectories, 1, 2, 0))
    mixed = stats[2, 2].policy_logprobs
    torch.testing.assert_close(mixed[first][batch.loss_mask[first]], before[first][batch.loss_mask[first]])
    moved = (mixed[second] - before[second])[batch.loss_mask[second]].abs()
    assert moved.max() > 1e-5, "the first minibatch moved the policy before the second was looked at"


# --- steps -------------------------------------------------------------------------------------------------------


def test_two_epochs_are_two_updates_of_the_same_batch(new_policy: Any) -> None:
    """On the same behaviour, with nothing that depends on the version: Adam cannot tell."""
    twice, once = new_learner(new_policy(), num_epochs=2, **CLIP), new_learner(new_policy(), **CLIP)
    update(twice, ragged_batch())
    for _ in range(2):
        update(once, ragged_batch())
    assert_bitwise(weights(twice), weights(once))
    assert_bitwise(adam_state(twice), adam_state(once))
    assert (twice.version, once.version) == (1, 2)


@pytest.mark.parametrize("aggregation", ["sum", "token_mean", "trajectory_mean", "prompt_mean"])
def test_a_minibatch_is_an_update_with_its_own_rows_and_its_own_denominators(new_policy: Any, aggregation: str) -> None:
    settings = {**CLIP, "aggregation": aggregation}
    learner, by_hand = (new_learner(new_policy(), **settings, **more) for more in ({"num_minibatches": 2}, {}))
    batch = ragged_batch()
    advantages, _ = learner.objective.advantages(batch)
    update(learner, batch)
    for rows in minibatches(5, 1, 2, version=0):
        part = batch.rows(rows)
        by_hand.objective.advantages = lambda b, a=advantages[rows]: (a[:, : b.token_ids.shape[1]], [])  # type: ignore[misc]
        update(by_hand, part)
    assert_bitwise(weights(learner), weights(by_hand))


def test_advantages_are_those_of_the_whole_batch(new_policy: Any) -> None:
    """Whitened within minibatches of one row they would not be the same."""
    settings = {**CLIP, "num_minibatches": 5, "whiten": True}
    _, stats = update(new_learner(new_policy(), **settings), ragged_batch())
    assert reduced(stats)["advantage/std"] == pytest.approx(math.sqrt(22 / 23), rel=1e-5)
    assert reduced(stats)["optimizer/inner_steps"] == 5
    assert reduced(stats)["tokens/trained"] == 23


@pytest.mark.parametrize("max_tokens", [10_000, 24, 1])
def test_micro_batches_change_nothing_with_inner_epochs(new_policy: Any, max_tokens: int) -> None:
    settings = {**DECOUPLED, "num_epochs": 2, "num_minibatches": 2}
    whole, cut = (new_learner(new_policy(), tokens, **settings) for tokens in (10_000, max_tokens))
    expected, actual = (reduced(update(learner, ragged_batch())[1]) for learner in (whole, cut))
    assert_close(weights(cut), weights(whole), rtol=1e-5)
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_step_that_is_not_finite_is_left_out_and_the_others_are_taken(new_policy: Any) -> None:
    """Row 3 is poisoned: the step that has it changes nothing, the others do, and the batch is counted once."""
    settings = {**CLIP, "num_minibatches": 5, "num_epochs": 2}
    learner, without = new_learner(new_policy(), **settings), new_learner(new_policy(), **CLIP)
    bad = poisoned(ragged_batch())
    advantages, _ = learner.objective.advantages(bad)
    _, stats = update(learner, bad)
    for rows in minibatches(5, 2, 5, version=0):
        if rows != [3]:
            part = bad.rows(rows)
            without.objective.advantages = lambda b, a=advantages[rows]: (a[:, : b.token_ids.shape[1]], [])  # type: ignore[misc]
            update(without, part)
    assert_bitwise(weights(learner), weights(without))
    values = reduced(stats)
    assert (values["optimizer/inner_steps"], values["optimizer/skipped_updates"]) == (8, 1)
    assert values["tokens/trained"] == 23 - 3
    assert (stats.skipped, learner.version, learner.skipped_in_a_row) == (True, 1, 1)


def test_mismatch_is_measured_before_the_first_step_alone() -> None:
    log = math.log
    batch = bandit_batch([1, 2], [1.0, 1.0], [log(0.3), log(0.2)])
    values = reduced(update(new_learner(bandit([0.5, 0.3, 0.2]), num_epochs=3, lr=1.0, **CLIP), batch)[1])
    assert values["mismatch/abs_max"] == pytest.approx(0, abs=1e-6)
    assert values["kl/policy_behavior"] > 1e-3  # that of all three steps


@pytest.mark.parametrize("bundle", ["ppo", "grpo"])
def test_a_restored_learner_draws_the_same_minibatches(new_policy: Any, tmp_path: Path, bundle: str) -> None:
    settings = {"name": bundle, "num_minibatches": 3, "num_epochs": 2, "kl_target": 1.0, "kl_horizon": 60, "eps": 1e-8}
    learner, restored = trained_and_restored(new_policy(), tmp_path, group_batch, **settings)
    assert restored.objective.kl_coefficient == learner.objective.kl_coefficient != learner.objective.cfg.kl_coefficient
    results = [reduced(update(each, group_batch(2))[1]) for each in (learner, restored)]
    assert results[0] == results[1]
    assert_bitwise(weights(restored) | adam_state(restored), weights(learner) | adam_state(learner))


# --- the proximal policy -----------------------------------------------------------------------------------------


def test_with_one_step_decoupled_ppo_is_reinforce_with_the_same_weights(new_policy: Any) -> None:
    """The ratio is 1, with the gradient of log pi, and nothing is clipped; the weights are pi/mu either way."""
    decoupled, stats = update(new_learner(new_policy(), **DECOUPLED), group_batch())
    plain, plain_stats = update(new_learner(new_policy()), group_batch())
    assert_close(decoupled, plain, rtol=1e-6)
    values, expected = reduced(stats), reduced(plain_stats)
    assert values["surrogate/clipped_fraction"] == 0
    for name in ("importance/weight_mean", "importance/truncated_fraction"):
        assert values[name] == expected[name] != 0


def test_old_logprobs_are_those_before_the_first_step_whatever_the_micro_batches(new_policy: Any) -> None:
    policy, batch = new_policy(), ragged_batch()
    with torch.no_grad():
        expected = policy.token_logprobs(batch.token_ids, sampling=Sampling(0.7)).logprobs
    for max_tokens in (10_000, 24, 1):
        for packs in (False, policy.trunk.packs):
            actual = old_logprobs(policy, batch, TokenBudget(max_tokens, packs), Sampling(0.7))
            torch.testing.assert_close(actual, expected.where(batch.loss_mask, 0.0))
            assert not actual.requires_grad


def two_steps(behavior: float, clip_high: float, **settings: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Two steps on one token of a bandit: the gradients [2, V], the probabilities before each [2, V], the metrics."""
    learner = new_learner(bandit([0.5, 0.3, 0.2]), num_epochs=2, lr=0.5, clip_high=clip_high, **settings)
    gradients: list[Tensor] = []
    tables: list[Tensor] = []

    def record(*_: object) -> None:
        gradients.append(learner.policy.model.table.grad[0].clone())
        tables.append(learner.policy.model.table.detach()[0].clone())

    learner.optimizer.adam.register_step_pre_hook(record)
    stats = learner.update(bandit_batch([1], [2.0], [behavior]))
    return torch.stack(gradients), torch.stack(tables).softmax(dim=-1), reduced(stats)


CHOSEN = torch.tensor([0.0, 1.0, 0.0])


def test_the_second_steps_gradient_has_the_ratio_to_the_old_policy_and_the_first_ones_correction() -> None:
    """A token of probability 0.3 that the behaviour drew with 0.2: the correction is 1.5 in both steps."""
    gradients, p, values = two_steps(math.log(0.2), 5.0, **DECOUPLED)
    torch.testing.assert_close(gradients[0], -1.5 * 2.0 * (CHOSEN - p[0]))
    ratio = p[1][1] / p[0][1]
    assert ratio > 1.1
    torch.testing.assert_close(gradients[1], -1.5 * ratio * 2.0 * (CHOSEN - p[1]))
    assert values["surrogate/clipped_fraction"] == 0
    assert values["importance/weight_mean"] == pytest.approx(1.5)


def test_the_clip_is_around_the_old_policy_where_it_is_decoupled_and_around_the_behaviour_where_not() -> None:
    """Ratios 1 and above 1.1 to the old policy; 1.5 and more to the behaviour: a clip of 1.1 cuts one step, or both."""
    gradients, _, values = two_steps(math.log(0.2), 0.1, **DECOUPLED)
    assert gradients[0].any()
    assert not gradients[1].any()
    assert values["surrogate/clipped_fraction"] == 0.5
    coupled, _, values = two_steps(math.log(0.2), 0.1, **CLIP)
    assert not coupled.any()
    assert values["surrogate/clipped_fraction"] == 1


def test_the_correction_is_bounded_and_every_bound_that_is_hit_is_counted() -> None:
    gradients, p, values = two_steps(math.log(0.001), 5.0, **DECOUPLED, max_importance_weight=4.0)
    torch.testing.assert_close(gradients[0], -4.0 * 2.0 * (CHOSEN - p[0]))
    assert values["importance/truncated_fraction"] == 1


def test_interpolated_logprobs_of_staleness_0_1_and_3_by_hand() -> None:
    policy, behavior = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True), torch.tensor([[-3.0, -3.0, -3.0]])
    result = corrections.interpolated_logprobs(policy, behavior, torch.tensor([[0, 1, 3]]))
    torch.testing.assert_close(result, torch.tensor([[-3.0, -2.0, -1.5]]))
    assert not result.requires_grad


def test_an_interpolated_ratio_is_the_root_of_pi_over_mu_and_the_correction_the_rest() -> None:
    """A token two versions late: the ratio is (pi/mu)^(1/3), the correction (pi/mu)^(2/3)."""
    learner = new_learner(
        bandit([0.5, 0.3, 0.2]), **{**DECOUPLED, "proximal": "interpolated"}, clip_high=5.0, max_importance_weight=5.0
    )
    learner.version = 2
    batch = bandit_batch([1], [2.0], [math.log(0.1)])
    gradients, stats = update(learner, batch)
    p = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(gradients["table"][0], -(3 ** (2 / 3)) * 3 ** (1 / 3) * 2.0 * (CHOSEN - p))
    assert reduced(stats)["importance/weight_mean"] == pytest.approx(3 ** (2 / 3), rel=1e-5)


def test_a_fresh_token_has_no_interpolated_correction(new_policy: Any) -> None:
    """Staleness 0: proximal is the behaviour, as in PPO without decoupling."""
    settings = {**DECOUPLED, "proximal": "interpolated", "num_epochs": 2}
    interpolated, ppo = new_learner(new_policy(), **settings), new_learner(new_policy(), num_epochs=2, **CLIP)
    values = reduced(update(interpolated, group_batch())[1])
    update(ppo, group_batch())
    assert values["importance/weight_mean"] == 1
    assert_bitwise(weights(interpolated), weights(ppo))


# --- adaptive KL -------------------------------------------------------------------------------------------------


def with_kl(kl: float) -> Batch:
    """A trajectory of two tokens whose KL is `kl`."""
    batch = bandit_batch([1, 2], [0.0, 0.0])
    ref = batch.behavior_logprobs - torch.tensor([[0.0, kl / 2, kl / 2]])
    return dataclasses.replace(batch, ref_logprobs=ref)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_kl_coefficient_moves_towards_the_target_after_each_batch(where: str) -> None:
    kl = {"kl": where, "kl_estimator": "k3", "kl_coefficient": 0.5, "kl_target": 2.0, "kl_horizon": 10}
    learner = new_learner(bandit([0.5, 0.3, 0.2]), **kl)
    first = reduced(learner.update(with_kl(2.2)))
    assert first["kl/coefficient"] == 0.5
    assert first["kl/trajectory_behavior_reference"] == pytest.approx(2.2)
    second = reduced(learner.update(with_kl(0.0)))
    assert second["kl/coefficient"] == pytest.approx(0.5 * (1 + 0.1 / 10))
    assert learner.objective.kl_coefficient == pytest.approx(0.5 * (1 + 0.1 / 10) * (1 - 0.2 / 10))


def test_the_coefficient_that_is_charged_is_the_adapted_one() -> None:
    kl = {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": 0.5, "kl_target": 2.0, "kl_horizon": 1}
    learner = new_learner(bandit([0.5, 0.3, 0.2]), **kl)
    assert reduced(learner.update(with_kl(4.0)))["return/mean"] == pytest.approx(-0.5 * (4.0 + 2.0) / 2)
    assert reduced(learner.update(with_kl(4.0)))["return/mean"] == pytest.approx(-0.6 * (4.0 + 2.0) / 2)


def test_a_skipped_batch_leaves_the_coefficient() -> None:
    kl = {"kl": "reward", "kl_coefficient": 0.5, "kl_target": 2.0, "kl_horizon": 10}
    learner = new_learner(bandit([0.5, 0.3, 0.2]), **kl)
    batch = with_kl(4.0)
    batch.rewards[0, 1] = math.nan
    assert learner.update(batch).skipped
    assert learner.objective.kl_coefficient == 0.5
