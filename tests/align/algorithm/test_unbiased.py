"""Which estimators have the gradient of the expected return as their expectation, and what the others have instead.

All by exact enumeration of the batches that can be sampled (`enumeration.py`), through the configured `Objective`: no sampling
error, so "unbiased" is equality and a bias is compared with what theory says it is. `test_policy_gradient.py` has the sampled
counterparts within their confidence intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from align.algorithm.config import AlgorithmConfig
from tests.oracles.enumeration import ACTIONS, COMPLETIONS, MASK, NUM_STATES, STATES, Process, T, V, logprobs_of

ON, OFF = Process.new(), Process.new(off_policy=True)
OUTCOME = {"rewards": "outcome", "importance": "none"}
INF = math.inf
LENGTHS = MASK.sum(dim=1)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the expected gradient's norm."""
    return float((actual - expected).norm() / expected.norm())


def scale_and_rest(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The multiple of the expected gradient that is nearest, and how far it is, both relative."""
    scale = float((actual * expected).sum() / expected.square().sum())
    return scale, distance(actual, scale * expected) / abs(scale)


def returns_of(case: Process, discount: float = 1.0) -> Tensor:
    """Reward-to-go by a loop [N, T]."""
    result = torch.zeros(len(COMPLETIONS), T, dtype=torch.float64)
    for row, actions in enumerate(COMPLETIONS):
        for t in range(len(actions)):
            result[row, t] = sum(discount ** (k - t) * case.token_rewards[row, k] for k in range(t, len(actions)))
    return result


def expected(case: Process, weights: Tensor) -> Tensor:
    """`E[sum_t w_t grad log pi_t]` under the behaviour. [N, T] -> [states, V]."""
    return case.contract(case.probabilities[:, None] * weights * MASK)


# --- unbiased ----------------------------------------------------------------------------------------------------

IMPORTANCE = {"importance": "truncated", "importance_level": "sequence_sum", "max_importance_weight": INF}
LEAVE_ONE_OUT = {**OUTCOME, "baseline": "leave_one_out"}
RATIO = {"importance": "none"}
UNBIASED: dict[str, tuple[Process, int, dict[str, Any], float]] = {
    "reward-to-go": (ON, 2, {}, 1),
    "sum over the batch": (ON, 2, {"aggregation": "sum"}, 2),
    "constant length": (ON, 2, {"aggregation": "constant_length", "loss_length": T}, 1 / T),
    "outcome": (ON, 2, OUTCOME, 1),
    "leave-one-out of 2": (ON, 2, LEAVE_ONE_OUT, 1),
    "leave-one-out of 3": (ON, 3, LEAVE_ONE_OUT, 1),
    "importance-weighted surrogate": (ON, 2, {**RATIO, "surrogate": "importance_weighted"}, 1),
    "PPO's clip": (ON, 2, {**RATIO, "surrogate": "ppo_clip"}, 1),
    "CISPO": (ON, 2, {**RATIO, "surrogate": "cispo"}, 1),
    "bounded weights, on-policy": (ON, 2, {"importance": "masked", "max_importance_weight": 2.0}, 1),
    "whole outcome, off-policy, exact weights": (OFF, 2, {**OUTCOME, **IMPORTANCE}, 1),
    "leave-one-out, off-policy, exact weights": (OFF, 2, {**LEAVE_ONE_OUT, **IMPORTANCE}, 1),
    "reward-to-go, off-policy, exact weights": (OFF, 2, IMPORTANCE, 1),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_an_unbiased_estimator_has_the_gradient_of_the_expected_return_as_its_expectation(name: str) -> None:
    case, group_size, parts, scale = UNBIASED[name]
    same(case.expectation(group_size, **parts), scale * case.gradient())


@pytest.mark.parametrize("rewards", ["token", "outcome"])
def test_kl_by_k1_in_the_reward_gives_the_gradient_of_return_less_kl_of_whole_trajectories(rewards: str) -> None:
    parts = {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": 0.3, "rewards": rewards}
    same(ON.expectation(**parts), ON.gradient(kl_coefficient=0.3))
    assert distance(ON.gradient(), ON.gradient(kl_coefficient=0.3)) > 0.05


# --- baselines that contain a row's own return -------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [2, 3])
def test_a_group_mean_with_the_row_itself_scales_the_gradient_by_1_less_1_over_g(group_size: int) -> None:
    found = ON.expectation(group_size, **OUTCOME, baseline="group_outcome_mean")
    same(found, (1 - 1 / group_size) * ON.gradient())


def test_the_position_mean_scales_each_position_by_how_many_rows_reach_it() -> None:
    """A row that reaches position k shares it with `Bin(G - 1, q_k)` others, and `E[1/(1 + Bin)] = (1 - (1 - q)^G) / (G q)`."""
    group_size = 2
    found = ON.expectation(group_size, baseline="position_mean")
    by_position = torch.zeros_like(found)
    for k in range(T):
        reached = float(ON.probabilities[k < LENGTHS].sum())
        kept = 1 - (1 - (1 - reached) ** group_size) / (group_size * reached)
        only_k = torch.zeros(len(COMPLETIONS), T, dtype=torch.float64)
        only_k[:, k] = kept * returns_of(ON)[:, k]
        by_position += expected(ON, only_k)
    same(found, by_position)
    assert scale_and_rest(found, ON.gradient())[1] > 0.01, "a common factor would pass too"


@pytest.mark.parametrize("baseline", ["batch_mean", "group_mean"])
def test_a_mean_over_the_tokens_of_all_rows_has_a_bias_that_falls_as_1_over_g(baseline: str) -> None:
    """Its denominator, the number of tokens, depends on the row's own actions: the direction is wrong too."""
    bias = {g: ON.expectation(g, baseline=baseline) - ON.gradient() for g in (1, 2)}
    assert float(bias[1].norm() / ON.gradient().norm()) > 0.3
    assert float(bias[2].norm() / bias[1].norm()) == pytest.approx(1 / 2, rel=0.1)
    assert scale_and_rest(bias[2] + ON.gradient(), ON.gradient())[1] > 0.01, "the direction is right"


# --- scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        {**OUTCOME, "baseline": "group_outcome_mean", "group_std": True},
        {**LEAVE_ONE_OUT, "group_std": True},
        {"whiten": True},
        {**OUTCOME, "whiten": True},
    ],
    ids=["GRPO", "leave-one-out with std", "whitened tokens", "whitened outcomes"],
)
def test_dividing_by_a_standard_deviation_forgets_the_size_and_the_offset_of_the_rewards(parts: dict[str, Any]) -> None:
    """`E` is the same for ten times the rewards, whose true gradient is ten times larger: each prompt is scaled by 1 / std."""
    found = ON.expectation(2, **parts)
    larger = Process(ON.policy, ON.behavior, ON.reference, 10 * ON.rewards)
    same(larger.expectation(2, **parts), found)
    same(larger.gradient(), 10 * ON.gradient())
    scale, rest = scale_and_rest(found, ON.gradient())
    assert scale > 0.1 and rest > 0.01, "the direction is biased as well, but still uphill"


# --- credit and length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_a_discount_below_1_has_the_gradient_with_discounted_credit(discount: float) -> None:
    found = ON.expectation(1, discount=discount)
    same(found, expected(ON, returns_of(ON, discount)))
    assert distance(found, ON.gradient()) > 0.02


def test_the_bias_of_a_discount_grows_as_the_discount_falls() -> None:
    biases = [distance(ON.expectation(1, discount=d), ON.gradient()) for d in (1.0, 0.9, 0.5, 0.0)]
    assert biases[0] < 1e-6
    assert biases == sorted(biases)


def test_the_mean_over_a_trajectorys_tokens_favours_short_good_and_long_bad_trajectories() -> None:
    """Each trajectory's gradient is divided by its own length (what Dr. GRPO takes out)."""
    found = ON.expectation(2, **OUTCOME, aggregation="trajectory_token_mean")
    whole = returns_of(ON)[:, :1].expand(-1, T)
    same(found, expected(ON, whole / LENGTHS[:, None]))
    assert scale_and_rest(found, ON.gradient())[1] > 0.1


def test_the_mean_over_all_tokens_is_a_ratio_whose_bias_falls_with_the_batch() -> None:
    """`E[sum / N]` is not `E[sum] / E[N]`; the gradient over the expected number of tokens is the limit."""
    limit = ON.gradient() / float((ON.probabilities * LENGTHS).sum())
    alone, of_two, of_three = (distance(ON.expectation(g, aggregation="token_mean"), limit) for g in (1, 2, 3))
    assert of_three < of_two < alone
    assert of_three == pytest.approx(alone / 3, rel=0.35)


# --- off-policy --------------------------------------------------------------------------------------------------


def dynamic_programming(case: Process) -> Tensor:
    """`sum_s d_mu(s) sum_a grad pi(a|s) Q_mu(s, a)`: the gradient with the behaviour's states and returns. [states, V]."""
    mu, pi = case.behavior.softmax(dim=-1), case.policy.softmax(dim=-1)
    q = torch.zeros(NUM_STATES, V, dtype=torch.float64)
    for state in reversed(range(NUM_STATES)):
        for action in range(V):
            then = V * state + 1 + action
            goes_on = action != 0 and then < NUM_STATES
            q[state, action] = case.rewards[state, action] + (float(mu[then] @ q[then]) if goes_on else 0.0)
    visits = torch.zeros(NUM_STATES, dtype=torch.float64)
    visits.index_add_(0, STATES[MASK], case.probabilities[:, None].expand(-1, T)[MASK])
    return visits[:, None] * pi * (q - (pi * q).sum(dim=1, keepdim=True))


TOKEN_RATIOS = {
    "weights": {"importance": "truncated", "max_importance_weight": INF},
    "importance-weighted surrogate": {**RATIO, "surrogate": "importance_weighted"},
    "CISPO without bounds": {**RATIO, "surrogate": "cispo", "clip_low": 1.0, "clip_high": INF},
    "PPO without clips": {**RATIO, "surrogate": "ppo_clip", "clip_low": 1.0, "clip_high": INF},
}


@pytest.mark.parametrize("name", TOKEN_RATIOS)
def test_ratios_by_token_correct_the_action_but_not_the_states_before_and_the_return_after(name: str) -> None:
    found = OFF.expectation(1, **TOKEN_RATIOS[name])
    same(found, dynamic_programming(OFF))
    uncorrected = OFF.expectation(1, importance="none")
    assert 0.05 < distance(found, OFF.gradient()) < distance(uncorrected, OFF.gradient())


def test_without_correction_the_expectation_is_that_of_the_behaviours_samples() -> None:
    same(OFF.expectation(1, importance="none"), expected(OFF, returns_of(OFF)))


def log_ratios() -> Tensor:
    return logprobs_of(OFF.policy) - logprobs_of(OFF.behavior)


def weights_by_loop(kept: Callable[[float], float]) -> Tensor:
    """Exact ratios of whole trajectories after a bound, times their returns [N, T]."""
    rows = [kept(math.exp(float(log_ratios()[row].sum()))) for row in range(len(COMPLETIONS))]
    return torch.tensor(rows, dtype=torch.float64)[:, None] * returns_of(OFF)


@pytest.mark.parametrize("bound", ["truncated", "masked"])
@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_a_bound_on_exact_ratios_leaves_out_what_is_above_it(bound: str, limit: float) -> None:
    found = OFF.expectation(1, **(IMPORTANCE | {"importance": bound, "max_importance_weight": limit}))
    kept = {"truncated": lambda w: min(w, limit), "masked": lambda w: w if w <= limit else 0.0}[bound]
    same(found, expected(OFF, weights_by_loop(kept)))
    assert distance(found, OFF.gradient()) > 0.02


def test_the_bias_of_truncation_falls_as_the_bound_rises_and_its_variance_grows() -> None:
    bias, variance = [], []
    for limit in (1.0, 1.5, 3.0, INF):
        cfg = AlgorithmConfig(**(IMPORTANCE | {"max_importance_weight": limit, "aggregation": "trajectory_mean"}))
        mean, total = OFF.moments(cfg, 1)
        bias.append(distance(mean, OFF.gradient()))
        variance.append(total)
    assert bias == sorted(bias, reverse=True) and bias[-1] < 1e-6 < bias[0]
    assert variance == sorted(variance)


def test_off_policy_ppos_clip_drops_the_tokens_that_went_far_in_the_direction_of_their_advantage() -> None:
    found = OFF.expectation(1, **RATIO, surrogate="ppo_clip")
    ratio, advantages = log_ratios().exp(), returns_of(OFF)
    kept = torch.zeros_like(advantages)
    for row, actions in enumerate(COMPLETIONS):
        for t in range(len(actions)):
            r, a = float(ratio[row, t]), float(advantages[row, t])
            dropped = (r > 1.2 and a > 0) or (r < 0.8 and a < 0)
            kept[row, t] = 0.0 if dropped else r * a
    same(found, expected(OFF, kept))
    assert distance(found, dynamic_programming(OFF)) > 0.1, "no token was clipped, the test shows nothing"


def test_gspo_off_policy_weighs_by_the_geometric_mean_and_on_policy_is_the_mean_over_tokens() -> None:
    parts = {**OUTCOME, "surrogate": "gspo", "clip_low": 1.0, "clip_high": INF, "aggregation": "trajectory_token_mean"}
    whole = returns_of(OFF)[:, :1].expand(-1, T)
    mean_ratio = (log_ratios().sum(dim=1) / LENGTHS).exp()[:, None]
    same(OFF.expectation(1, **parts), expected(OFF, mean_ratio * whole / LENGTHS[:, None]))
    on_policy = ON.expectation(1, **parts)
    same(on_policy, ON.expectation(1, **OUTCOME, aggregation="trajectory_token_mean"))


# --- KL ----------------------------------------------------------------------------------------------------------

KL = {"kl_coefficient": 0.3, "discount": 0.0}


@pytest.mark.parametrize("estimator", ["k2", "k3_grad_k2"])
def test_kl_in_the_loss_by_k2_equals_k1_in_the_reward_without_credit_for_later_tokens(estimator: str) -> None:
    """Both are the gradient of KL at each state that is visited; neither sees that actions choose the later states."""
    in_loss = ON.expectation(1, kl="loss", kl_estimator=estimator, **KL)
    same(in_loss, ON.expectation(1, kl="reward", kl_estimator="k1", **KL))
    same(in_loss, expected(ON, ON.token_rewards - 0.3 * kl_k1()))


def test_kl_in_the_loss_by_k3_has_the_gradient_of_the_other_direction() -> None:
    """`d/dtheta E_pi`-frozen of k3 is `pi - P_ref` at each state: the gradient of `KL(P_ref || pi)`."""
    found = ON.expectation(1, kl="loss", kl_estimator="k3", **KL) - ON.expectation(1, discount=0.0)
    visits = torch.zeros(NUM_STATES, dtype=torch.float64)
    visits.index_add_(0, STATES[MASK], ON.probabilities[:, None].expand(-1, T)[MASK])
    forward = visits[:, None] * (ON.policy.softmax(dim=-1) - ON.reference.softmax(dim=-1))
    same(found, -0.3 * forward)
    k2 = ON.expectation(1, kl="loss", kl_estimator="k2", **KL) - ON.expectation(1, discount=0.0)
    assert distance(found, k2) > 0.1


def test_kl_in_the_reward_with_full_credit_differs_from_kl_in_the_loss_by_the_kl_of_later_states() -> None:
    full = ON.expectation(1, kl="reward", kl_estimator="k1", kl_coefficient=0.3)
    in_loss = ON.expectation(1, kl="loss", kl_estimator="k2", kl_coefficient=0.3)
    togo = kl_k1().flip(1).cumsum(1).flip(1)
    same(in_loss - full, expected(ON, 0.3 * (togo - kl_k1())))
    assert distance(in_loss, full) > 0.005


def kl_k1() -> Tensor:
    return (logprobs_of(ON.policy) - logprobs_of(ON.reference)) * MASK


def test_the_enumeration_is_a_distribution_over_all_completions() -> None:
    assert len(COMPLETIONS) == 15
    assert float(ON.probabilities.sum()) == pytest.approx(1)
    assert sum(p for _, p in OFF.batches(2)) == pytest.approx(1)
    assert ACTIONS[LENGTHS < T].gather(1, LENGTHS[LENGTHS < T, None] - 1).unique().tolist() == [0]
