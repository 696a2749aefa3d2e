"""OpenRLHF's functions and what they are in our settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align.algorithm import losses, returns
from tests.conformance import critics
from tests.conformance.departures import blown_up_rounding
from tests.conformance.peers import (
    EXACT,
    FLOAT32,
    WITH_EPSILON,
    Case,
    Differs,
    Equal,
    NotOffered,
    Pairs,
    Verdict,
    advantages_of,
    at,
    batch_of,
    loss_of,
    resolve,
    scaled,
    whole_mean,
)
from tests.conformance.policies import entropy_verdict, logprob_verdict

NOT_OFFERED = {
    "apply_overlong_penalty": "soft length penalty; this part masks instead",
    "apply_stop_properly_penalty": "penalty for truncated trajectories; this part masks instead",
    "masked_normalize": "normalised within each row",
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "reinforce_baseline": {"rewards": "outcome", "baseline": "group_outcome_mean"},
    "rloo": {"rewards": "outcome", "baseline": "leave_one_out"},
    "group_norm": {
        "rewards": "outcome",
        "baseline": "group_outcome_mean",
        "group_std": True,
        "group_std_epsilon": 1e-9,
    },
    "dr_grpo": {"rewards": "outcome", "baseline": "group_outcome_mean"},
}


# --- advantages --------------------------------------------------------------------------------------------------


def advantages(case: Case) -> Verdict:
    """The whole of `compute_advantages_and_returns`: shaping by group, KL, return, whitening."""
    params, estimator = case.params, case.params["estimator"]
    if "overlong_buffer_len" in params or "stop_properly_penalty_coef" in params:
        return NotOffered("penalties on the reward of long or truncated trajectories; this part masks instead")
    parts, last = settings(params)
    mask, theirs = case.mask("action_mask"), case.output("advantages")
    batch = experience(case, returns.on_last_action(case.input("rewards"), mask))
    ours = advantages_of(batch, **parts)
    pairs = {"advantages": (at(mask, ours), at(mask, theirs))}
    if case.dtype == torch.float32 and "const6" in case.id and estimator == "group_norm":
        return blown_up_rounding(mask, ours, theirs, 1e-9, slice(0, 6))
    reasons = {
        "KL and the reward's range come after the group baseline; ours before": is_late(parts),
        "k1 is cut at 10": "kl" in parts and "extreme" in case.id,
        "whitened with the variance over n; ours over n - 1": last == "whiten",
        "centred over all tokens once more": last == "centre" and estimator != "reinforce",
        "discounted through the tokens outside the mask, which take no time in ours": is_through_holes(case),
    }
    if not any(reasons.values()):
        return Equal(pairs, FLOAT32 if "kl" in parts or case.dtype == torch.float32 else WITH_EPSILON)
    explained = theirs_from_our_parts(case, batch.rewards, parts)
    if last == "whiten":
        num_tokens = int(mask.sum())
        explained = explained * math.sqrt(num_tokens / (num_tokens - 1))
    if last == "centre" and estimator != "reinforce":
        explained = explained - returns.batch_mean(explained, mask)
    reason = "; ".join(reason for reason, is_so in reasons.items() if is_so)
    return Differs(f"order and statistics: {reason}", pairs, FLOAT32, {"advantages": at(mask, explained)})


def settings(params: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Our parts, and what theirs do last over all tokens: whiten, centre or nothing."""
    parts = critics.gae_parts(params) if params["estimator"] == "gae" else dict(ESTIMATORS[params["estimator"]])
    if params["kl_coef"] > 0:
        parts |= {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": params["kl_coef"]}
    if params["reward_clip_range"] is not None:
        parts["reward_range"] = params["reward_clip_range"]
    if not params["estimator"].startswith(("reinforce", "gae")):
        return parts, ""
    if params["estimator"] == "reinforce":  # the group estimators force the discount to 1
        parts["discount"] = params["gamma"]
        if params["no_std_norm"]:
            return {**parts, "baseline": "batch_mean"}, "centre"
    if params["no_std_norm"]:
        return parts, "centre"
    return {**parts, "whiten": True}, "whiten"


def is_late(parts: dict[str, Any]) -> bool:
    """Whether the reward has terms that theirs add after the group baseline."""
    return parts.get("rewards") == "outcome" and ("kl" in parts or "reward_range" in parts)


def is_through_holes(case: Case) -> bool:
    return case.params["estimator"] == "gae" and "holes" in case.id


def gae_through_holes(case: Case, rewards: Tensor, parts: dict[str, Any]) -> Tensor:
    """Their GAE of the rewards less KL, whitened."""
    batch, mask = experience(case, rewards, cut=10), case.mask("action_mask")
    kl = losses.kl_estimate(batch.behavior_logprobs, batch.ref_logprobs, "k1")
    paid = rewards - parts["kl_coefficient"] * kl
    raw, _ = critics.gae_over_holes(paid, case.input("values"), mask, case.params)
    return returns.whiten(raw.masked_fill(~mask, 0.0), mask)


def experience(case: Case, rewards: Tensor, cut: float = math.inf) -> Any:
    """A batch with the log-probs that the stored KL was made of, their difference cut at will; "0" means no KL."""
    kl = str(case.inputs["kl"])
    names = kl[kl.find("(") + 1 : kl.find(")")].split(", ")[:2] if "(" in kl else []
    behavior, ref = (resolve(name) for name in names) if names else (None, None)
    if behavior is not None and ref is not None:
        behavior = ref + (behavior - ref).clamp(-cut, cut)
    index = torch.arange(12) // case.params["n_samples_per_prompt"]
    batch = batch_of(case.mask("action_mask"), rewards, behavior, ref, index)
    return critics.with_values(batch, case) if case.params["estimator"] == "gae" else batch


def theirs_from_our_parts(case: Case, rewards: Tensor, parts: dict[str, Any]) -> Tensor:
    """Our parts in their order: group shaping of the outcome, then the range, then KL by token, then the return."""
    if is_through_holes(case):
        return gae_through_holes(case, rewards, parts)
    if not is_late(parts):
        return advantages_of(experience(case, rewards, cut=10), **parts)
    mask = case.mask("action_mask")
    group_parts = ("rewards", "baseline", "group_std", "group_std_epsilon")
    shaped = advantages_of(experience(case, rewards), **{k: v for k, v in parts.items() if k in group_parts})
    first = torch.stack([row[m][0] for row, m in zip(shaped, mask, strict=True)])
    rest = {k: v for k, v in parts.items() if k not in group_parts}
    if "reward_range" in rest:
        first = first.clamp(*rest.pop("reward_range"))
    return advantages_of(experience(case, returns.on_last_action(first, mask), cut=10), **rest)


def cumulative_returns(case: Case) -> Verdict:
    mask, rewards, discount = case.mask("action_mask"), case.input("rewards"), case.params["gamma"]
    ours = advantages_of(batch_of(mask, rewards), discount=discount)
    pairs = {"returns": (at(mask, ours), at(mask, case.output("returns")))}
    if "holes" in case.id and discount < 1:
        explained = returns.reward_to_go(rewards, torch.ones_like(mask), discount)
        reason = "discounted across the tokens outside the mask, which take no time in ours"
        return Differs(reason, pairs, EXACT, {"returns": at(mask, explained)})
    return Equal(pairs, EXACT)


def reward(case: Case) -> Verdict:
    params = case.params
    if params["kl_coef"] < 0:
        return NotOffered("a negative KL coefficient silently means none; ours is refused")
    mask = case.mask("action_mask")
    group = case.id.split("/")[1]
    estimate = losses.kl_estimate(resolve(f"{group}.old_logp"), resolve(f"{group}.ref_logp"), "k1")
    outcome = case.input("r")
    if params["reward_clip_range"] is not None:
        outcome = outcome.clamp(*params["reward_clip_range"])
    ours, explained = (
        at(mask, returns.on_last_action(outcome, mask) - params["kl_coef"] * kl)
        for kl in (estimate, estimate.clamp(-10, 10))
    )
    pairs = {"rewards": (ours, at(mask, case.output("reward")))}
    if group == "extreme" and params["kl_coef"] > 0:
        return Differs("k1 is cut at 10 in theirs", pairs, FLOAT32, {"rewards": explained})
    return Equal(pairs, FLOAT32)


# --- losses ------------------------------------------------------------------------------------------------------


def whole_batch(params: dict[str, Any]) -> tuple[tuple[int, int] | None, int]:
    """Rows and tokens of the whole batch, and the ranks whose mean their factor undoes."""
    if "global_batch_size" not in params:
        return None, 1
    return (int(params["global_batch_size"]), int(params["batch_num_tokens"])), params["dp_size"]


def how(params: dict[str, Any]) -> str:
    return "token_mean" if params["token_level_loss"] else "trajectory_token_mean"


def aggregated(case: Case) -> Verdict:
    """`aggregate_loss`, shown on the loss -A * log pi with log pi = -1: its losses are A."""
    whole, ranks = whole_batch(case.params)
    mask, values = case.mask("loss_mask"), case.input("loss")
    result = loss_of(
        mask, -torch.ones_like(values), torch.zeros_like(values), values, whole=whole, aggregation=how(case.params)
    )
    pairs = {
        "loss": (ranks * result["loss"], case.output("loss")),
        "gradient": (-ranks * result["gradient"] / values, case.output("grad_loss")),
    }
    return Equal(pairs, EXACT)


def batch_counts(case: Case) -> Verdict:
    mask = case.mask("loss_mask")
    index = torch.zeros(len(mask), dtype=torch.long)
    tokens, rows = (1 / losses.trajectory_weights(name, mask, index)[0] for name in ("token_mean", "trajectory_mean"))
    pairs = {
        "tokens": (tokens, case.output("batch_num_tokens")),
        "trajectories": (rows, case.output("global_batch_size")),
    }
    return Equal(pairs, EXACT)


def policy_loss(case: Case) -> Verdict:
    params = case.params
    by_sequence, corrected = params["policy_loss_type"] == "gspo", params["enable_vllm_is_correction"]
    kind = params["vllm_is_correction_type"] if corrected and not by_sequence else None
    if by_sequence and params["dual_clip"] is not None:
        return NotOffered("a dual clip on the sequence's ratio")
    if kind == "seq-mask-tis":
        return NotOffered("trajectories kept by their geometric mean, tokens weighted without any bound")
    mask = case.mask("action_mask")
    old = case.input("rollout_log_probs" if by_sequence and corrected else "old_log_probs")
    whole, ranks = whole_batch(params)
    parts: dict[str, Any] = {
        "surrogate": "gspo" if by_sequence else "ppo_clip",
        "aggregation": "trajectory_token_mean" if by_sequence else how(params),
        "clip_low": params["clip_eps_low"],
        "clip_high": params["clip_eps_high"],
    }
    if params["dual_clip"] is not None:
        parts["dual_clip"] = params["dual_clip"]
    rollout = None
    if kind:  # decoupled PPO
        low, high = params["vllm_is_truncated_threshold"]
        parts["importance"] = {"tis": "truncated", "icepop": "masked"}[kind]
        parts |= {"min_importance_weight": low, "max_importance_weight": high}
        rollout = case.input("rollout_log_probs")
    inputs = (mask, case.input("log_probs"), old, case.input("advantages"))
    result = loss_of(*inputs, rollout=rollout, whole=whole, **parts)
    return Equal(compared(case, result, ranks), EXACT)


def compared(case: Case, result: dict[str, Tensor], ranks: int) -> Pairs:
    loss = scaled(result, ranks)
    return {
        "loss": (loss["loss"], case.output("loss")),
        "gradient": (loss["gradient"], case.output("grad_log_probs")),
    }


# --- KL and statistics -------------------------------------------------------------------------------------------


def kl(case: Case) -> Verdict:
    """In float32, every estimator cut at +-10, and its gradient with it."""
    leaf, kind = case.input("log_probs").requires_grad_(), case.params["kl_estimator"]
    ours = losses.kl_estimate(leaf, case.input("log_probs_base"), kind)
    results = []
    for values in (ours, ours.clamp(-10, 10)):
        if "loss" in case.outputs:
            values = whole_mean(values, case.mask("action_mask"), how(case.params))
        (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
        results.append({"value": values.detach(), "gradient": gradient})
    theirs = {
        "value": case.output("loss" if "loss" in case.outputs else "kl"),
        "gradient": case.output("grad_log_probs"),
    }
    pairs = {name: (results[0][name], value) for name, value in theirs.items()}
    if kind != "k1" and "extreme" in case.id:
        return Differs("every estimate is cut at 10, where its gradient ends", pairs, FLOAT32, results[1])
    return Equal(pairs, FLOAT32)


def masked_mean(case: Case) -> Verdict:
    mask, values = case.mask("mask"), case.input("tensor")
    parts = [slice(None)] if "dim" not in case.params else [slice(b, b + 1) for b in range(12)]
    ours = torch.stack([whole_mean(values[rows], mask[rows], "token_mean") for rows in parts])
    return Equal({"out": (ours.reshape(case.output("out").shape), case.output("out"))}, EXACT)


HANDLERS: dict[str, Callable[[Case], Verdict]] = {
    "RemoteExperienceMaker.compute_advantages_and_returns": advantages,
    "RemoteExperienceMaker.get_cumulative_returns": cumulative_returns,
    "RemoteExperienceMaker.get_advantages_and_returns": critics.plain_gae,
    "ValueLoss": critics.value_loss("values", "old_values", "returns", "action_mask", "clip_eps"),
    "AdaptiveKLController.update": critics.kl_controller,
    "compute_reward": reward,
    "aggregate_loss": aggregated,
    "get_loss_batch_info": batch_counts,
    "PolicyLoss": policy_loss,
    "compute_approx_kl": kl,
    "aggregate_loss(compute_approx_kl)": kl,
    "masked_mean": masked_mean,
    "compute_entropy": entropy_verdict,
    "log_probs_from_logits": logprob_verdict,
}
