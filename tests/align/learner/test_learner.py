"""The learner: how a batch is cut or padded changes nothing, one step is Adam's, and nothing that is not finite gets in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.data.batching import Batch, collate
from align.learner.learner import NonFiniteUpdates
from align.learner.optimizer import OptimizerConfig, lr_factor
from align.model.policy import Policy
from tests.fakes.batches import bandit_batch, poisoned, ragged_batch
from tests.fakes.learners import (
    PolicyFactory,
    adam_state,
    bandit,
    new_learner,
    reduced,
    trained_and_restored,
    update,
    weights,
)
from tests.fakes.trajectories import make_scored, make_trajectory
from tests.oracles.equality import assert_bitwise, assert_close
from tests.oracles.micro_batches import assert_cuts_are_equal

# --- knobs for memory change nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "aggregation", ["sum", "token_mean", "trajectory_mean", "trajectory_token_mean", "prompt_mean"]
)
@pytest.mark.parametrize("baseline", ["none", "batch_mean", "position_mean", "group_mean"])
def test_one_micro_batch_or_one_per_trajectory_give_one_gradient_one_step_and_the_same_metrics(
    new_policy: PolicyFactory, aggregation: str, baseline: str
) -> None:
    assert_cuts_are_equal(new_policy, ragged_batch(), 1e-2, aggregation=aggregation, baseline=baseline)


def test_the_three_aggregations_differ_by_their_denominators_alone(new_policy: PolicyFactory) -> None:
    batch = ragged_batch()
    by_name = {
        name: update(new_learner(new_policy(), aggregation=name), batch)[0]
        for name in ("sum", "token_mean", "trajectory_mean")
    }
    assert batch.num_loss_tokens == 23
    assert_close({n: 23 * g for n, g in by_name["token_mean"].items()}, by_name["sum"])
    assert_close({n: 5 * g for n, g in by_name["trajectory_mean"].items()}, by_name["sum"])


def test_a_longer_trajectory_in_the_micro_batch_pads_the_others_and_changes_nothing(new_policy: PolicyFactory) -> None:
    short = make_scored([make_trajectory([5, 6], [7, 8, 9])], [[1, -2, 3]])
    long = make_scored([make_trajectory([4] * 20, [7])], [[0]], number=1)
    alone = collate([short])
    padded = collate([short, long])
    padded.loss_mask[1] = False
    assert padded.token_ids.shape[1] == 21
    assert_close(update(new_learner(new_policy()), padded)[0], update(new_learner(new_policy()), alone)[0])


def test_extra_columns_of_padding_change_nothing_at_all(new_policy: PolicyFactory) -> None:
    batch = ragged_batch()
    wide = dataclasses.replace(
        batch,
        **{
            name: torch.nn.functional.pad(value, (0, 7), value=3 if name == "token_ids" else 0)
            for name, value in batch.tensors()
            if value.dim() == 2
        },
    )
    gradients, stats = update(new_learner(new_policy()), batch)
    wide_gradients, wide_stats = update(new_learner(new_policy()), wide)
    assert_bitwise(wide_gradients, gradients)
    assert reduced(wide_stats) == reduced(stats)


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "position_mean", "group_mean"])
def test_what_stands_outside_the_mask_changes_neither_gradient_nor_metrics(
    new_policy: PolicyFactory, baseline: str
) -> None:
    batch = ragged_batch()
    garbage = {"rewards": 1e6, "behavior_logprobs": 50.0, "ref_logprobs": -77.0, "versions": 0}
    dirty = dataclasses.replace(
        batch, **{name: getattr(batch, name).masked_fill(~batch.loss_mask, value) for name, value in garbage.items()}
    )
    settings = {"baseline": baseline, "whiten": True}
    gradients, stats = update(new_learner(new_policy(), **settings), batch)
    dirty_gradients, dirty_stats = update(new_learner(new_policy(), **settings), dirty)
    assert_bitwise(dirty_gradients, gradients)
    assert reduced(dirty_stats) == reduced(stats)


# --- one step ----------------------------------------------------------------------------------------------------


def test_the_first_step_of_adam_goes_uphill_by_the_learning_rate() -> None:
    learner = new_learner(bandit([0.5, 0.3, 0.2]), lr=0.25, eps=0.5, importance="none")
    before = learner.policy.model.table.detach().clone()
    update(learner, bandit_batch([1], [2.0]))
    uphill = 2.0 * torch.tensor([[0 - 0.5, 1 - 0.3, 0 - 0.2]])
    torch.testing.assert_close(learner.policy.model.table.detach(), before + 0.25 * uphill / (uphill.abs() + 0.5))


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    learner = new_learner(bandit([0.5, 0.3, 0.2]), lr=0.25, weight_decay=0.1, importance="none")
    before = learner.policy.model.table.detach().clone()
    update(learner, bandit_batch([1], [0.0]))
    torch.testing.assert_close(learner.policy.model.table.detach(), before * (1 - 0.25 * 0.1))


def test_weights_of_norms_do_not_decay(policy: Policy) -> None:
    learner = new_learner(policy, lr=0.25, weight_decay=0.1)
    before = weights(learner)
    batch = ragged_batch()
    update(learner, dataclasses.replace(batch, rewards=torch.zeros_like(batch.rewards)))
    for name, value in weights(learner).items():
        expected = before[name] if "norm" in name else before[name] * (1 - 0.25 * 0.1)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("reward", "direction"), [(1.0, 1), (-1.0, -1)])
def test_on_policy_a_rewarded_token_becomes_likelier_and_a_punished_one_less_likely(
    policy: Policy, reward: float, direction: int
) -> None:
    token, ids = 9, torch.tensor([[5, 6, 9]])
    learner = new_learner(policy, lr=1e-3, eps=1e-8)
    probabilities = []
    for _ in range(4):
        with torch.no_grad():
            logprob = float(policy.token_logprobs(ids).logprobs[0, 2])
        probabilities.append(math.exp(logprob))
        update(learner, collate([make_scored([make_trajectory([5, 6], [token], [logprob])], [[reward]])]))
    assert probabilities == sorted(probabilities, reverse=direction < 0)
    assert abs(probabilities[-1] - probabilities[0]) > 0.1 * probabilities[0]


def test_the_gradient_is_taken_at_the_samplers_temperature() -> None:
    learner = new_learner(bandit([0.5, 0.3, 0.2]), temperature=2.0, importance="none")
    gradients, _ = update(learner, bandit_batch([1], [1.0]))
    p = torch.tensor([[0.5, 0.3, 0.2]]).sqrt()
    p /= p.sum()
    torch.testing.assert_close(gradients["table"], -(torch.tensor([[0.0, 1.0, 0.0]]) - p) / 2)


def test_importance_weights_scale_each_token_and_are_truncated_at_the_limit() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = bandit_batch([0, 2], [3.0, 1.0], behavior=[math.log(0.4), math.log(0.01)])
    gradients, stats = update(new_learner(bandit(p.tolist()), max_importance_weight=4.0), batch)
    onehot = torch.eye(3)
    expected = -(0.5 / 0.4 * 4.0 * (onehot[0] - p) + 4.0 * 1.0 * (onehot[2] - p))
    torch.testing.assert_close(gradients["table"], expected[None])
    values = reduced(stats)
    assert values["importance/weight_mean"] == pytest.approx((0.5 / 0.4 + 4.0) / 2)
    assert values["importance/truncated_fraction"] == 0.5


def test_without_importance_weights_the_behavior_logprobs_do_not_matter_to_the_gradient() -> None:
    first, second = (
        update(new_learner(bandit([0.5, 0.3, 0.2]), importance="none"), bandit_batch([1], [1.0], [behavior]))[0]
        for behavior in (-0.1, -5.0)
    )
    assert_bitwise(first, second)


def test_clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before(new_policy: PolicyFactory) -> None:
    free, free_stats = update(new_learner(new_policy()), ragged_batch())
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in free.values()))
    clipped, stats = update(new_learner(new_policy(), max_grad_norm=0.5), ragged_batch())
    assert norm > 1
    assert reduced(free_stats)["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert reduced(stats)["optimizer/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_close(clipped, {name: g * (0.5 / norm) for name, g in free.items()})
    below, _ = update(new_learner(new_policy(), max_grad_norm=2 * norm), ragged_batch())
    assert_bitwise(below, free)


def test_every_update_counts_one_version_and_no_gradient_is_left_behind(policy: Policy) -> None:
    learner = new_learner(policy)
    for version in (1, 2, 3):
        update(learner, ragged_batch())
        assert learner.version == version
        assert all(p.grad is None for p in learner.optimizer.parameters)


def test_frozen_parameters_stay_as_they_are(policy: Policy) -> None:
    frozen = policy.model.model.layers[0]
    frozen.requires_grad_(False)
    learner = new_learner(policy)
    before = weights(learner)
    update(learner, ragged_batch())
    changed = {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in policy.model.named_parameters() if p.requires_grad}


# --- advantages and metrics --------------------------------------------------------------------------------------


def two_rows() -> Batch:
    """Rewards [1, 2] and [3] in one group, [7] in another: returns 3, 2 / 3 / 7."""
    first = make_scored([make_trajectory([0], [1, 2]), make_trajectory([0], [1])], [[1, 2], [3]])
    return collate([first, make_scored([make_trajectory([0], [2])], [[7]], number=1)])


STD = math.sqrt((2 * 0.75**2 + 1.75**2 + 3.25**2) / 3)
"""Unbiased standard deviation of the returns of `two_rows`."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0, 3, 2], [0, 3, 0], [0, 7, 0]]),
        ({"discount": 0.5}, [[0, 2, 2], [0, 3, 0], [0, 7, 0]]),
        ({"baseline": "batch_mean"}, [[0, -0.75, -1.75], [0, -0.75, 0], [0, 3.25, 0]]),
        ({"baseline": "position_mean"}, [[0, 3 - 13 / 3, 0], [0, 3 - 13 / 3, 0], [0, 7 - 13 / 3, 0]]),
        ({"baseline": "group_mean"}, [[0, 1 / 3, -2 / 3], [0, 1 / 3, 0], [0, 0, 0]]),
        ({"whiten": True}, [[0, -0.75 / STD, -1.75 / STD], [0, -0.75 / STD, 0], [0, 3.25 / STD, 0]]),
    ],
    ids=str,
)
def test_advantages_of_a_batch_computed_by_hand(settings: dict[str, Any], expected: list[list[float]]) -> None:
    advantages, _ = new_learner(bandit([0.5, 0.3, 0.2]), **settings).objective.advantages(two_rows())
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))


def test_the_metrics_of_a_bandit_computed_by_hand() -> None:
    p = [0.5, 0.3, 0.2]
    batch = dataclasses.replace(two_rows(), ref_logprobs=torch.tensor([[9, -2, -3], [9, -1, 9], [9, math.nan, 9]]))
    batch.behavior_logprobs[0, 1] = math.log(0.25)
    for row, t in ((0, 2), (1, 1), (2, 1)):
        batch.behavior_logprobs[row, t] = math.log(p[batch.token_ids[row, t]])
    batch.versions[1, 1] = 5  # not the learner's own
    learner = new_learner(bandit(p), max_tokens=1, lr=0.01, max_importance_weight=1.1)
    values = reduced(update(learner, batch)[1])
    log, mu = math.log, [math.log(0.25), math.log(0.2), math.log(0.3), math.log(0.2)]
    expected = {
        "reward/token_mean": 13 / 4,
        "reward/trajectory_mean": (3 + 3 + 7) / 3,
        "return/mean": 15 / 4,
        "advantage/std": math.sqrt((2 * 0.75**2 + 1.75**2 + 3.25**2) / 4),
        "policy/entropy": -sum(x * log(x) for x in p),
        "importance/weight_mean": (1.1 + 1 + 1 + 1) / 4,
        "importance/truncated_fraction": 1 / 4,
        "importance/chi_square": (1.2**2 - 1) / 4,
        "importance/effective_sample_fraction": 4.2**2 / (4 * (1.2**2 + 3)),
        "kl/policy_behavior": (0.3 / 0.25 - 1 - log(0.3 / 0.25)) / 4,
        "kl/behavior_reference": ((mu[0] + 2) + (mu[1] + 3) + (mu[2] + 1)) / 3,
        "mismatch/abs_mean": log(0.3 / 0.25) / 3,
        "mismatch/abs_max": log(0.3 / 0.25),
        "optimizer/loss": -(1.1 * 3 * log(0.3) + 2 * log(0.2) + 3 * log(0.3) + 7 * log(0.2)) / 4,
        "optimizer/lr": 0.01,
        "optimizer/skipped_updates": 0,
        "throughput/padding_fraction": 0,
        "tokens/trained": 4,
    }
    del values["optimizer/grad_norm"]
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-7)


# --- not finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_an_update_that_is_not_finite_leaves_weights_and_adam_bitwise_and_counts(
    policy: Policy, value: float, max_tokens: int
) -> None:
    learner = new_learner(policy, max_tokens, weight_decay=0.1)
    update(learner, ragged_batch())
    before, state = weights(learner), adam_state(learner)
    gradients, stats = update(learner, poisoned(ragged_batch(1), value))
    assert gradients == {}
    assert stats.skipped
    assert_bitwise(weights(learner), before)
    assert_bitwise(adam_state(learner), state)
    assert len(state) > 10
    assert learner.version == 2
    values = reduced(stats)
    assert (values["tokens/trained"], values["optimizer/skipped_updates"]) == (0, 1)
    assert all(math.isfinite(v) for v in values.values())


def test_a_good_update_after_a_bad_one_goes_on_as_if_the_bad_one_had_not_been(new_policy: PolicyFactory) -> None:
    with_bad, without = new_learner(new_policy()), new_learner(new_policy())
    for learner in (with_bad, without):
        update(learner, ragged_batch())
    update(with_bad, poisoned(ragged_batch(1)))
    for learner in (with_bad, without):
        assert not update(learner, ragged_batch(2))[1].skipped
    assert_bitwise(weights(with_bad), weights(without))
    assert (with_bad.version, without.version) == (3, 2)


def test_only_bad_updates_in_a_row_stop_the_run() -> None:
    learner = new_learner(bandit([0.5, 0.3, 0.2]), max_skipped_updates=2)
    good, bad = bandit_batch([1], [1.0]), bandit_batch([1], [1.0])
    bad.rewards[0, 1] = math.nan
    for batch in (bad, good, bad, good, bad):
        learner.update(batch)
    before = weights(learner)
    with pytest.raises(NonFiniteUpdates, match=r"2 updates in a row were not finite .* lower optimizer\.lr"):
        learner.update(bad)
    assert_bitwise(weights(learner), before)
    assert (learner.version, learner.skipped_updates) == (6, 4)


# --- schedule and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, *(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5))]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule_to_the_last_step(
    schedule: Any, expected: list[float]
) -> None:
    cfg = OptimizerConfig(warmup_steps=2, schedule=schedule, min_lr_ratio=0.2)
    assert [lr_factor(step, 7, cfg) for step in range(1, 8)] == pytest.approx(expected)
    assert lr_factor(100, 7, cfg) == pytest.approx(expected[-1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_has_the_peak_learning_rate_even_if_it_is_the_only_one(schedule: Any) -> None:
    assert [lr_factor(1, n, OptimizerConfig(schedule=schedule)) for n in (1, 5)] == [1, 1]


def test_the_learner_steps_with_the_scheduled_rate_and_reports_it() -> None:
    learner = new_learner(bandit([0.5, 0.3, 0.2]), num_steps=3, lr=0.3, schedule="linear", warmup_steps=1)
    rates = [reduced(learner.update(bandit_batch([1], [1.0])))["optimizer/lr"] for _ in range(3)]
    assert rates == pytest.approx([0.15, 0.3, 0.0])
    before = weights(learner)
    learner.update(bandit_batch([1], [1.0]))  # a step after the last: the rate is 0
    assert_bitwise(weights(learner), before)


def test_a_restored_learner_goes_on_bit_for_bit(new_policy: PolicyFactory, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.01, "eps": 1e-8}
    learner, restored = trained_and_restored(new_policy(), tmp_path, **settings)
    stats, restored_stats = (update(each, ragged_batch(2))[1] for each in (learner, restored))
    assert_bitwise(weights(restored), weights(learner))
    assert_bitwise(adam_state(restored), adam_state(learner))
    assert restored.version == learner.version == 3
    assert reduced(restored_stats) == reduced(stats)

    forgetful = new_learner(Policy.load(tmp_path / "policy"), **settings)
    update(forgetful, ragged_batch(2))
    assert any(not torch.equal(value, weights(learner)[name]) for name, value in weights(forgetful).items())


def test_an_optimizer_that_never_stepped_is_restored_as_one_that_never_stepped(
    new_policy: PolicyFactory, tmp_path: Path
) -> None:
    learner = new_learner(new_policy())
    learner.save_optimizer(tmp_path / "optimizer.safetensors")
    restored = new_learner(new_policy())
    restored.load_optimizer(tmp_path / "optimizer.safetensors", version=0)
    for each in (learner, restored):
        update(each, ragged_batch())
    assert_bitwise(weights(restored), weights(learner))


def test_the_state_of_another_models_optimizer_is_refused(policy: Policy, tmp_path: Path) -> None:
    other = new_learner(bandit([0.5, 0.3, 0.2]))
    other.update(bandit_batch([1], [1.0]))
    other.save_optimizer(tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors holds state of .*table"):
        new_learner(policy).load_optimizer(tmp_path / "optimizer.safetensors", version=1)
