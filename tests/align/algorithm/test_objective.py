"""Bundles and their parts: what they resolve to, what they do to a batch, and that micro-batches change nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from align.algorithm.bundles import BUNDLES
from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch, collate
from align.model.policy import Policy
from tests.fakes.batches import group_batch, three_rows
from tests.fakes.learners import EXTRA, new_learner, reduced, update
from tests.fakes.trajectories import make_scored, make_trajectory
from tests.oracles.equality import assert_bitwise
from tests.oracles.micro_batches import assert_cuts_are_equal
from tests.oracles.tabular import TabularLM

NAMES = sorted(BUNDLES)


def algorithm(name: str, **parts: Any) -> AlgorithmConfig:
    return AlgorithmConfig(name=name, **EXTRA.get(name, {}), **parts)


# --- bundles -----------------------------------------------------------------------------------------------------


def test_the_default_bundle_is_the_plain_policy_gradient() -> None:
    cfg = AlgorithmConfig()
    assert cfg == AlgorithmConfig(name="reinforce")
    parts = (cfg.rewards, cfg.baseline, cfg.surrogate, cfg.aggregation, cfg.kl, cfg.importance, cfg.discount)
    assert parts == ("token", "none", "reinforce", "sum", "none", "truncated", 1)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "reinforce++",
            {"rewards": "token", "whiten": True, "surrogate": "ppo_clip", "kl": "reward", "kl_estimator": "k1"},
        ),
        ("rloo", {"rewards": "outcome", "baseline": "leave_one_out", "aggregation": "trajectory_mean", "kl": "reward"}),
        ("grpo", {"group_std": True, "clip_high": 0.2, "aggregation": "trajectory_token_mean", "kl_coefficient": 0.04}),
        ("dr_grpo", {"group_std": False, "aggregation": "constant_length", "kl": "none"}),
        (
            "dapo",
            {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean", "mask_overlong": True, "kl": "none"},
        ),
        ("gspo", {"surrogate": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "trajectory_token_mean"}),
        ("cispo", {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"}),
        ("ppo", {"baseline": "critic", "gae_lambda": 0.95, "value_clip": 0.2, "num_epochs": 4, "proximal": "behavior"}),
        ("scalerl", {"batch_std": True, "group_std": False, "clip_high": 4.0, "aggregation": "prompt_mean"}),
        ("on_policy_distillation", {"rewards": "none", "discount": 0.0, "kl": "reward", "kl_coefficient": 1.0}),
    ],
)
def test_a_bundle_resolves_to_its_parts_and_a_part_that_is_set_wins(name: str, parts: dict[str, Any]) -> None:
    cfg = algorithm(name)
    assert {key: getattr(cfg, key) for key in parts} == parts
    assert algorithm(name, clip_low=0.125).clip_low == 0.125
    assert algorithm(name, max_advantage=3.0) == cfg.model_copy(update={"max_advantage": 3.0})
    again = AlgorithmConfig.model_validate(cfg.model_dump())
    assert again == cfg


def test_every_bundle_has_a_name_that_a_run_file_may_give_and_every_name_a_bundle() -> None:
    names = AlgorithmConfig.model_json_schema()["properties"]["name"]["enum"]
    assert sorted(names) == NAMES
    assert len({algorithm(name).model_dump_json(exclude={"name"}) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"baseline": "leave_one_out"}, "compares whole trajectories: it needs rewards = 'outcome' and discount = 1"),
        ({"name": "rloo", "discount": 0.9}, "compares whole trajectories"),
        ({"group_std": True}, "group_std = true needs baseline"),
        ({"group_std_epsilon": 1e-4}, "group_std_epsilon is read by nothing"),
        ({"reward_range": (1.0, 1.0)}, r"reward_range = \[1\.0, 1\.0\] is empty"),
        ({"surrogate": "ppo_clip"}, "importance must be 'none', or it would count twice"),
        ({"name": "gspo", "importance": "masked"}, "it would count twice"),
        ({"name": "cispo", "dual_clip": 3.0}, "dual_clip is read by surrogate = 'ppo_clip' alone"),
        ({"name": "dr_grpo"}, "'constant_length' needs loss_length, e.g. the value of sampling.max_tokens"),
        ({"loss_length": 5}, "loss_length is read by aggregation = 'constant_length' alone"),
        ({"kl_coefficient": 0.1}, "kl_coefficient is read by nothing: kl is 'none'"),
        ({"name": "grpo", "kl_coefficient": 0.0}, "kl = 'loss' needs a kl_coefficient above 0"),
        ({"name": "grpo", "kl_estimator": "k1"}, "'k1' in the loss has an expected gradient of 0"),
        ({"name": "rloo", "kl_estimator": "k3_grad_k2"}, "a reward has none; choose k3"),
        ({"name": "ppg"}, "Input should be 'reinforce'"),
        ({"name": "ppo", "importance": "masked"}, "it would count twice"),
        ({"baseline": "critic"}, "baseline = 'critic' needs gae_lambda"),
        (
            {"name": "ppo", "baseline": "none"},
            "gae_lambda is read by baseline = 'critic' alone",
        ),
        ({"value_clip": 0.2}, "value_clip is read by baseline = 'critic' alone"),
        ({"proximal": "recomputed"}, "surrogate = 'reinforce' has none"),
        ({"name": "gspo", "proximal": "recomputed", "importance": "truncated"}, "one ratio per sequence"),
        ({"num_epochs": 2, "importance": "none"}, "leaves the sampler's policy behind after the first optimizer step"),
        ({"num_minibatches": 2, "importance": "none"}, "leaves the sampler's policy behind"),
        ({"kl_target": 6.0}, "kl_target is read by nothing: kl is 'none'"),
        ({"kl_horizon": 100}, "kl_horizon is read by nothing: there is no kl_target"),
        ({"rewards": "none"}, "'none' leaves nothing to learn from"),
        ({"name": "on_policy_distillation", "reward_range": (0.0, 1.0)}, "reward_range is read by nothing"),
        ({"rewards": "process", "baseline": "batch_mean"}, "baseline must be 'none'"),
        ({"rewards": "process", "kl": "reward", "kl_coefficient": 0.1}, "would compare the KL of steps"),
        ({"name": "grpo", "batch_std": True}, "would scale advantages twice"),
        ({"batch_std": True, "whiten": True}, "would scale advantages twice"),
        ({"gate_positive": 2.0}, "read by surrogate = 'soft_gate' alone"),
        ({"guard_fraction": 0.1}, "read by nothing: entropy_guard is 'none'"),
        ({"entropy_guard": "clip_cov", "guard_band": (2.0, 1.0)}, r"guard_band = \[2\.0, 1\.0\] is empty"),
        ({"distillation_top_k": 8}, "read by nothing: distillation is 'none'"),
        ({"supervised_coefficient": 0.1}, "need each other"),
        ({"supervised_min_outcome": 1.0}, "need each other"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_with_the_reason(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlgorithmConfig(**parts)


def test_what_contradicts_is_told_before_what_is_read_by_nothing() -> None:
    parts = {"baseline": "leave_one_out", "guard_band": (2.0, 1.0), "supervised_coefficient": 0.1, "kl": "loss"}
    with pytest.raises(ValidationError) as caught:
        AlgorithmConfig(**parts, kl_estimator="k1", group_std_epsilon=0.1, dual_clip=2.0)
    (error,) = caught.value.errors()
    assert str(error["ctx"]["error"]) == (
        "baseline = 'leave_one_out' compares whole trajectories: it needs rewards = 'outcome' and discount = 1; "
        "guard_band = [2.0, 1.0] is empty; "
        "supervised_coefficient and supervised_min_outcome need each other; "
        "kl = 'loss' needs a kl_coefficient above 0; "
        "kl_estimator = 'k1' in the loss has an expected gradient of 0; choose k2, k3 or k3_grad_k2; "
        "group_std_epsilon is read by nothing: group_std is false; "
        "guard_fraction, guard_band and guard_coefficient are read by nothing: entropy_guard is 'none'; "
        "dual_clip is read by surrogate = 'ppo_clip' alone"
    )


# --- micro-batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [{}, {"entropy_coefficient": 0.1}, {"max_advantage": 0.5}], ids=str)
def test_how_a_batch_is_cut_changes_neither_gradient_nor_metrics_of_any_bundle(
    new_policy: Any, name: str, more: dict[str, Any]
) -> None:
    assert_cuts_are_equal(new_policy, group_batch(), 1e-4, name=name, **EXTRA.get(name, {}), **more)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_the_mask_changes_nothing_in_any_bundle(new_policy: Any, name: str) -> None:
    batch = group_batch()
    garbage = {"rewards": 1e6, "behavior_logprobs": 50.0, "ref_logprobs": math.nan, "versions": 0}
    dirty = dataclasses.replace(
        batch, **{key: getattr(batch, key).masked_fill(~batch.loss_mask, value) for key, value in garbage.items()}
    )
    settings = {"name": name, "entropy_coefficient": 0.1, "max_grad_norm": math.inf, **EXTRA.get(name, {})}
    gradients, stats = update(new_learner(new_policy(), **settings), batch)
    dirty_gradients, dirty_stats = update(new_learner(new_policy(), **settings), dirty)
    assert_bitwise(dirty_gradients, gradients)
    assert reduced(dirty_stats) == reduced(stats)


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"reinforce", "reinforce++", "rloo", "ppo", "on_policy_distillation"})
)
def test_a_batch_of_constant_groups_has_advantages_of_exactly_0(name: str) -> None:
    batch = group_batch()
    last = batch.loss_mask & (batch.loss_mask.cumsum(1) == batch.loss_mask.sum(1, keepdim=True))
    constant = torch.tensor([0.9, 0.1])[batch.group_index][:, None]
    batch = dataclasses.replace(batch, rewards=torch.where(last, constant, torch.zeros_like(constant)))
    advantages, _ = Objective(algorithm(name)).advantages(batch)
    assert torch.equal(advantages, torch.zeros_like(advantages))


# --- advantages by hand ------------------------------------------------------------------------------------------


OUTCOME = {"rewards": "outcome"}
HALF = 1 / math.sqrt(2)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (OUTCOME, [[0, 3, 3], [0, 7, 0], [0, 5, 0]]),
        ({**OUTCOME, "discount": 0.5}, [[0, 1.5, 3], [0, 7, 0], [0, 5, 0]]),
        ({**OUTCOME, "baseline": "group_outcome_mean"}, [[0, -2, -2], [0, 2, 0], [0, 0, 0]]),
        ({**OUTCOME, "baseline": "leave_one_out"}, [[0, -4, -4], [0, 4, 0], [0, 0, 0]]),
        ({"name": "dapo"}, [[0, -HALF, -HALF], [0, HALF, 0], [0, 0, 0]]),
        ({"name": "dapo", "max_advantage": 0.5}, [[0, -0.5, -0.5], [0, 0.5, 0], [0, 0, 0]]),
        ({**OUTCOME, "reward_range": (4.0, 6.0)}, [[0, 4, 4], [0, 6, 0], [0, 5, 0]]),
        ({"reward_range": (1.5, 6.0)}, [[0, 3.5, 2], [0, 6, 0], [0, 5, 0]]),
    ],
    ids=str,
)
def test_advantages_of_outcomes_3_7_and_5_by_hand(parts: dict[str, Any], expected: list[list[float]]) -> None:
    advantages, _ = Objective(AlgorithmConfig(**parts)).advantages(three_rows(([1, 2], [7], [5])))
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("parts", "name", "expected"),
    [
        ({**OUTCOME, "reward_range": (4.0, 6.0)}, "reward/clipped_fraction", 2 / 3),
        ({"reward_range": (1.5, 6.0)}, "reward/clipped_fraction", 2 / 4),
        ({"name": "dapo", "max_advantage": 0.5}, "advantage/clipped_fraction", 3 / 4),
        ({"max_advantage": 5.0}, "advantage/clipped_fraction", 1 / 4),
    ],
    ids=str,
)
def test_every_reward_and_advantage_that_is_cut_is_counted(parts: dict[str, Any], name: str, expected: float) -> None:
    _, metrics = Objective(AlgorithmConfig(**parts)).advantages(three_rows(([1, 2], [7], [5])))
    assert {m.name: m.value for m in metrics}[name] == pytest.approx(expected)


# --- KL, entropy, overlong ---------------------------------------------------------------------------------------


def with_reference(batch: Batch, behavior: list[list[float]], ref: list[list[float]]) -> Batch:
    return dataclasses.replace(
        batch, behavior_logprobs=torch.tensor(behavior), ref_logprobs=torch.tensor(ref, dtype=torch.float32)
    )


def test_kl_in_the_reward_is_taken_from_every_token_or_from_the_outcome() -> None:
    nan = math.nan
    batch = with_reference(
        three_rows(([1, 2], [7], [5])),
        [[0, -1, -2], [0, -1, 0], [0, -3, 0]],
        [[nan, -3, -2.5], [nan, -1, nan], [nan, -1, nan]],
    )
    kl = {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": 0.1}
    by_token, _ = Objective(AlgorithmConfig(**kl)).advantages(batch)
    torch.testing.assert_close(by_token, torch.tensor([[0, 2.75, 1.95], [0, 7, 0], [0, 5.2, 0]]))
    by_outcome, _ = Objective(AlgorithmConfig(**kl, **OUTCOME)).advantages(batch)
    torch.testing.assert_close(by_outcome, torch.tensor([[0, 2.75, 2.75], [0, 7, 0], [0, 5.2, 0]]))


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_kl_without_a_reference_is_refused(kl: str) -> None:
    cfg = {"kl": kl, "kl_estimator": "k2", "kl_coefficient": 0.1}
    learner = new_learner(Policy(TabularLM(torch.zeros(1, 3)), tokenizer=None), **cfg)
    with pytest.raises(ValueError, match=f"algorithm.kl = '{kl}' needs the reference's log-probabilities"):
        learner.update(three_rows(([1, 2], [7], [5])))


def bandit_gradient(
    parts: dict[str, Any], ref: list[float], rewards: tuple[Any, Any, Any]
) -> tuple[Tensor, dict[str, float]]:
    """Gradient and metrics of the logits of a bandit with p = (1/2, 3/10, 1/5) and a batch that it sampled itself."""
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = three_rows(rewards)
    behavior = p.log()[batch.token_ids]
    batch = dataclasses.replace(
        batch, behavior_logprobs=behavior, ref_logprobs=torch.tensor(ref).log()[batch.token_ids]
    )
    learner = new_learner(Policy(TabularLM(p.log()[None]), tokenizer=None), **parts)
    gradients, stats = update(learner, batch)
    return gradients["table"][0], reduced(stats)


@pytest.mark.parametrize(("estimator", "slope"), [("k2", lambda d: d), ("k3", lambda d: 1 - math.exp(-d))])
def test_kl_in_the_loss_adds_its_own_gradient_by_hand(estimator: str, slope: Any) -> None:
    p, ref = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    parts = {"aggregation": "token_mean", "kl": "loss", "kl_estimator": estimator, "kl_coefficient": 0.25}
    gradient, values = bandit_gradient(parts, ref, ([0, 0], [0], [0]))
    expected = torch.zeros(3)
    estimates = []
    for token in (1, 2, 1, 2):
        d = math.log(p[token] / ref[token])
        expected += 0.25 / 4 * slope(d) * (torch.eye(3)[token] - torch.tensor(p))
        estimates.append(d * d / 2 if estimator == "k2" else math.exp(-d) - 1 + d)
    torch.testing.assert_close(gradient, expected)
    assert values["kl/policy_reference"] == pytest.approx(sum(estimates) / 4, rel=1e-5)
    assert values["optimizer/loss"] == pytest.approx(0.25 * sum(estimates) / 4, rel=1e-5)


def test_the_entropy_bonus_adds_minus_the_gradient_of_the_entropy_by_hand() -> None:
    """`dH/dlogit_v = -p_v (log p_v + H)`; with a mean over tokens of one state it is that once."""
    p = torch.tensor([0.5, 0.3, 0.2])
    parts = {"aggregation": "token_mean", "entropy_coefficient": 0.2}
    gradient, values = bandit_gradient(parts, [1 / 3] * 3, ([0, 0], [0], [0]))
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(gradient, -0.2 * -p * (p.log() + entropy))
    assert values["optimizer/loss"] == pytest.approx(-0.2 * float(entropy), rel=1e-5)


def test_a_trajectory_cut_off_by_length_carries_no_loss_but_counts_in_the_baseline(new_policy: Any) -> None:
    batch = group_batch()
    parts = {"name": "grpo", "kl": "none", "kl_coefficient": 0.0}
    whole, whole_stats = update(new_learner(new_policy(), **parts), batch)
    masked, stats = update(new_learner(new_policy(), **parts, mask_overlong=True), batch)
    lost = Objective(AlgorithmConfig(**parts)).advantages(batch)[0][-1]
    by_hand = dataclasses.replace(batch, overlong=torch.zeros(6, dtype=torch.bool))
    learner = new_learner(new_policy(), **parts)
    advantages = learner.objective.advantages(by_hand)[0]
    by_hand.loss_mask[-1] = False
    learner.objective.advantages = lambda _: (advantages, [])  # type: ignore[method-assign]
    expected, _ = update(learner, by_hand)
    assert lost.abs().max() > 0.1
    assert_bitwise(masked, expected)
    assert any(not torch.equal(masked[name], whole[name]) for name in whole)
    values = reduced(stats)
    assert values["trajectory/overlong_masked_fraction"] == pytest.approx(1 / 6)
    assert values["tokens/trained"] == reduced(whole_stats)["tokens/trained"] - 4 == 24
    assert values["tokens/masked"] == 4


def test_a_batch_in_which_every_trajectory_is_masked_has_a_gradient_of_0(new_policy: Any) -> None:
    batch = dataclasses.replace(group_batch(), overlong=torch.ones(6, dtype=torch.bool))
    gradients, stats = update(new_learner(new_policy(), name="dapo"), batch)
    assert all(not g.any() for g in gradients.values())
    assert not stats.skipped
    assert (stats.num_loss_tokens, reduced(stats)["tokens/trained"], reduced(stats)["tokens/masked"]) == (0, 0, 28)


# --- off-policy --------------------------------------------------------------------------------------------------


def test_clips_are_counted_over_the_loss_tokens() -> None:
    p = [0.5, 0.3, 0.2]
    batch = three_rows(([1, 1], [1], [-1]))
    batch.behavior_logprobs[:, 1:] = torch.tensor(
        [[math.log(0.1), math.log(0.2)], [math.log(0.3), 0], [math.log(0.9), 0]]
    )
    learner = new_learner(
        Policy(TabularLM(torch.tensor([p]).log()), tokenizer=None),
        surrogate="ppo_clip",
        importance="none",
        clip_high=0.25,
    )
    values = reduced(update(learner, batch)[1])
    # Ratios 3 (A > 0, clipped), 1, 1 and 2/9 (A < 0, clipped).
    assert values["surrogate/clipped_fraction"] == 0.5
    ratios = [3, 1, 1, 2 / 9]
    squares = sum(r * r for r in ratios)
    assert values["importance/chi_square"] == pytest.approx(squares / 4 - 1, rel=1e-5)
    assert values["importance/effective_sample_fraction"] == pytest.approx(sum(ratios) ** 2 / (4 * squares), rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("importance", ["truncated", "masked"])
def test_corrections_of_the_learner_weight_the_gradient_by_hand(level: str, importance: str) -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = three_rows(([0, 1], [0], [0]))
    ratios = torch.tensor([1.5, 1.6])
    batch.behavior_logprobs[0, 1:] = p[batch.token_ids[0, 1:]].log() - ratios.log()
    parts = {"importance": importance, "importance_level": level, "max_importance_weight": 1.55}
    learner = new_learner(Policy(TabularLM(p.log()[None]), tokenizer=None), **parts)
    gradients, _ = update(learner, batch)
    outside = 1.55 if importance == "truncated" else 0.0
    both = {"sequence_mean": float(ratios.prod().sqrt()), "sequence_sum": outside}
    weight = [1.5, outside] if level == "token" else [both[level]] * 2
    expected = sum(-w * (torch.eye(3)[token] - p) for w, token in zip(weight, (1, 2), strict=True))
    torch.testing.assert_close(gradients["table"][0], expected)


# --- does it learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"on_policy_distillation"}))
def test_every_bundle_teaches_a_bandit_the_action_that_pays(name: str) -> None:
    table = torch.tensor([[0.5, 0.2, 0.3]]).log()
    settings = {"lr": 0.1, "eps": 1e-8, "loss_length": 2} if name == "dr_grpo" else {"lr": 0.1, "eps": 1e-8}
    learner = new_learner(Policy(TabularLM(table), tokenizer=None), name=name, **settings)
    generator = torch.Generator().manual_seed(0)
    chances = []
    for _ in range(30):
        logprobs = learner.policy.model.table.detach()[0].log_softmax(-1)
        chances.append(float(logprobs[1].exp()))
        groups = []
        for number in range(4):
            actions = torch.multinomial(logprobs.exp(), 8, replacement=True, generator=generator).reshape(4, 2)
            rows = [make_trajectory([0], row.tolist(), logprobs[row].tolist()) for row in actions]
            groups.append(make_scored(rows, [[0.0, float((row == 1).sum())] for row in actions], number))
        batch = collate(groups)
        batch = dataclasses.replace(batch, ref_logprobs=table.log_softmax(-1)[0][batch.token_ids])
        learner.update(batch)
    assert chances[0] == pytest.approx(0.2)
    assert chances[-1] > 0.7, chances


@pytest.mark.parametrize("importance", ["truncated", "masked"])
def test_the_lower_bound_of_importance_weights_reaches_the_learner(importance: str) -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = three_rows(([0, 1], [0], [0]))
    batch.behavior_logprobs[:, 1:] = p[batch.token_ids[:, 1:]].log()
    batch.behavior_logprobs[0, 1:] -= torch.tensor([0.5, 0.9]).log()
    parts = {"importance": importance, "min_importance_weight": 0.75}
    gradients, stats = update(new_learner(Policy(TabularLM(p.log()[None]), tokenizer=None), **parts), batch)
    weights_by_hand = [0.75 if importance == "truncated" else 0.0, 0.9]
    expected = sum(-w * (torch.eye(3)[token] - p) for w, token in zip(weights_by_hand, (1, 2), strict=True))
    torch.testing.assert_close(gradients["table"][0], expected)
    assert reduced(stats)["importance/truncated_fraction"] == 1 / 4


@pytest.mark.parametrize(("dual_clip", "weight"), [(None, 4.0), (2.0, 0.0)])
def test_the_dual_clip_reaches_the_learner(dual_clip: float | None, weight: float) -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    batch = three_rows(([0, 0], [0], [-1]))
    batch.behavior_logprobs[:, 1:] = p[batch.token_ids[:, 1:]].log()
    batch.behavior_logprobs[2, 1] -= math.log(4)
    parts = {"surrogate": "ppo_clip", "importance": "none", "dual_clip": dual_clip}
    gradients, _ = update(new_learner(Policy(TabularLM(p.log()[None]), tokenizer=None), **parts), batch)
    torch.testing.assert_close(gradients["table"][0], weight * (torch.eye(3)[2] - p))
