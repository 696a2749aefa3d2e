"""verl's rewards and advantages, and what they are in our settings."""

from __future__ import annotations

from typing import Any

import torch

from align.algorithm import losses, returns
from tests.conformance.critics import gae_parts, with_values
from tests.conformance.departures import blown_up_rounding, restarted_returns
from tests.conformance.peers import (
    EXACT,
    FLOAT32,
    WITH_EPSILON,
    Case,
    Differs,
    Equal,
    NotOffered,
    Verdict,
    advantages_of,
    at,
    batch_of,
)

KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
NO_ABS = NotOffered("|d| estimates no KL divergence")
GROUP = {"rewards": "outcome", "baseline": "group_outcome_mean", "importance": "none"}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "grpo": {**GROUP, "group_std": True, "group_std_epsilon": 1e-6},
    "rloo": {"rewards": "outcome", "baseline": "leave_one_out"},
    "reinforce_plus_plus": {"whiten": True},
    "reinforce_plus_plus_baseline": {**GROUP, "whiten": True},
}


def group_relative(case: Case) -> Verdict:
    mask = case.mask("response_mask")
    index, with_std = case.index("index"), case.params["norm_adv_by_std_in_grpo"]
    parts = {**GROUP, "group_std": with_std, "group_std_epsilon": case.params["epsilon"] * with_std}
    rewards = case.input("token_level_rewards")
    ours = advantages_of(batch_of(mask, rewards, group_index=index), **parts)
    pairs = {"advantages": (at(mask, ours), at(mask, case.output("advantages")))}
    vectorized, float32 = "vectorized" in case.function, case.dtype == torch.float32
    tolerance = FLOAT32 if vectorized or float32 else EXACT
    alone = ours.clone()  # ours with their rule for a trajectory alone in its group
    if "singleton" in case.id:
        alone[11] = float(rewards[11].sum()) / (1 + case.params["epsilon"] * with_std)
    if vectorized and "inexact" in case.id and with_std and not float32:
        return blown_up_rounding(mask, alone, case.output("advantages"), case.params["epsilon"], slice(4, 8))
    if "const6" in case.id and (vectorized or float32):
        return blown_up_rounding(mask, ours, case.output("advantages"), case.params["epsilon"], slice(0, 6))
    if "singleton" in case.id:
        reason = "a trajectory alone in its group keeps its raw reward; ours has nothing to compare it with: 0"
        return Differs(reason, pairs, FLOAT32, {"advantages": at(mask, alone)})
    return Equal(pairs, tolerance)


def leave_one_out(case: Case) -> Verdict:
    mask = case.mask("response_mask")
    rewards, index = case.input("token_level_rewards"), case.index("index")
    ours = advantages_of(batch_of(mask, rewards, group_index=index), **ESTIMATORS["rloo"])
    pairs = {"advantages": (at(mask, ours), at(mask, case.output("advantages")))}
    if "singleton" in case.id and "vectorized" not in case.function:
        alone = ours.clone()
        alone[11] = float(rewards[11].sum())
        reason = "a trajectory alone in its group keeps its raw reward (their vectorized form gives 0, as we do)"
        return Differs(reason, pairs, EXACT, {"advantages": at(mask, alone)})
    return Equal(pairs, EXACT)


def whitened(case: Case) -> Verdict:
    mask, rewards = case.mask("response_mask"), case.input("token_level_rewards")
    discount = case.params["gamma"]
    batch = batch_of(mask, rewards)
    ours = advantages_of(batch, whiten=True, discount=discount)
    togo = advantages_of(batch, discount=discount)
    pairs = {
        "advantages": (at(mask, ours), at(mask, case.output("advantages"))),
        "returns": (at(mask, togo), at(mask, case.output("returns"))),
    }
    if "(old)" in case.function and "holes" in case.id:
        restarted = restarted_returns(rewards, mask, discount)
        explained = {
            "advantages": at(mask, returns.whiten(restarted, mask)),
            "returns": at(mask, restarted),
        }
        return Differs("the return starts again at each hole of the mask", pairs, WITH_EPSILON, explained)
    return Equal(pairs, WITH_EPSILON)


def whitened_group(case: Case) -> Verdict:
    mask, index = case.mask("response_mask"), case.index("index")
    rewards = case.input("token_level_rewards")
    ours = advantages_of(batch_of(mask, rewards, group_index=index), **ESTIMATORS["reinforce_plus_plus_baseline"])
    pairs = {"advantages": (at(mask, ours), at(mask, case.output("advantages")))}
    if "singleton" in case.id:
        outcome = returns.outcomes(rewards, mask)
        centred = outcome[:, None] - returns.group_outcome_mean(outcome, mask, index)
        centred[11] = outcome[11]
        explained = {"advantages": at(mask, returns.whiten(centred.masked_fill(~mask, 0.0), mask))}
        return Differs("a trajectory alone in its group keeps its raw reward", pairs, WITH_EPSILON, explained)
    return Equal(pairs, WITH_EPSILON)


def kl_in_reward(case: Case) -> Verdict:
    """`apply_kl_penalty`; the coefficient that it also returns is compared by its own function."""
    if case.params["kl_penalty"] == "abs":
        return NO_ABS
    mask = case.mask("response_mask")
    kind = KL[case.params["kl_penalty"]]
    difference = (case.input("old_log_probs"), case.input("ref_log_prob"))
    scores, coefficient = case.input("token_level_scores"), case.params["init_kl_coef"]
    ours = scores - coefficient * losses.kl_estimate(*difference, kind)
    pairs = {"rewards": (at(mask, ours), at(mask, case.output("token_rewards")))}
    if kind == "k3" and "extreme" in case.id:
        explained = scores - coefficient * losses.kl_estimate(*difference, kind).clamp(-10, 10)
        return Differs("the value of k3 is cut at 10", pairs, EXACT, {"rewards": at(mask, explained)})
    return Equal(pairs, EXACT)


def rewards_with_kl(case: Case) -> Verdict:
    kl = losses.kl_estimate(case.input("old_log_prob"), case.input("ref_log_prob"), "k1")
    ours = case.input("token_level_scores") - case.params["kl_ratio"] * kl
    return Equal({"rewards": (ours, case.output("token_rewards"))}, EXACT)


def advantages_with_kl(case: Case) -> Verdict:
    estimator = case.params["estimator"]
    mask = case.mask("response_mask")
    names = ("token_level_scores", "old_log_probs", "ref_log_prob")
    batch = batch_of(mask, *(case.input(name) for name in names), group_index=case.index("index"))
    kl = {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": case.params["kl_coef"]}
    parts = ESTIMATORS.get(estimator, {})
    if estimator == "gae":
        batch, parts = with_values(batch, case), {"whiten": True, **gae_parts(case.params)}
    ours = advantages_of(batch, **parts, **kl)
    return Equal({"advantages": (at(mask, ours), at(mask, case.output("advantages")))}, WITH_EPSILON)
