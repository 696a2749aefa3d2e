"""TRL's functions and what they are in our settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align.algorithm import corrections, losses, returns
from tests.conformance import critics
from tests.conformance.departures import blown_up_rounding, straight_through_gradient
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
    loss_of,
    resolve,
    scaled,
    whole_mean,
)
from tests.conformance.policies import entropy_verdict, logprob_verdict, output_of, shared_logits

AGGREGATION = {
    "grpo": "trajectory_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant_length",
    "luspo": "trajectory_mean",
    "sapo": "trajectory_token_mean",
}
OTHER_LOSSES = {
    "vespo": "VESPO: gamma-shaped weights of the sequence's ratio",
}
NOT_OFFERED = {
    "gmpo:GMPOTrainer._compute_loss": "GMPO: geometric mean of clipped ratios",
    "grpo_trainer:GRPOTrainer.get_off_policy_mask": "trajectories masked by advantage and divergence",
    "grpo_trainer:GRPOTrainer.get_gamma_weights": "VESPO: gamma-shaped weights of the sequence's ratio",
    "grpo_trainer:GRPOTrainer.get_high_entropy_mask": "loss on the tokens of highest entropy alone",
    "rloo_trainer:RLOOTrainer._compute_loss": "one ratio per completion, unbounded product of token ratios, clipped",
    "ppo_trainer:masked_var": "a step inside whitening; compared there",
    "utils:nanstd": "statistics over missing rewards; ours refuses a reward that is not finite",
}


# --- losses ------------------------------------------------------------------------------------------------------


def without_counterpart(case: Case) -> str | None:
    """Why a loss case has none, or None."""
    params = case.params
    loss_type, by_sequence = params["loss_type"], params["importance_sampling_level"] != "token"
    reasons = {
        OTHER_LOSSES.get(loss_type, ""): loss_type in OTHER_LOSSES,
        "CISPO with one ratio per sequence": loss_type == "cispo" and by_sequence,
        "SAPO with one ratio per sequence": loss_type == "sapo" and by_sequence,
        "a cap below 1 would cut on-policy tokens; clip_high cannot be negative": (
            loss_type == "cispo" and params["epsilon_high"] < 1
        ),
        "KL multiplied by the ratio, with its gradient": params.get("use_bias_correction_kl", False),
        "trajectories masked by advantage and divergence": "off_policy_mask_threshold" in params,
        "loss on the tokens of highest entropy alone": "top_entropy_quantile" in params,
        "LUSPO with token-wise terms: its mean runs over all cells, padding included": (
            loss_type == "luspo"
            and ("beta" in params or not by_sequence or "/tok" in case.id or "tool_mask" in case.id)
        ),
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def parts_of(params: dict[str, Any]) -> dict[str, Any]:
    """Our parts for their arguments."""
    loss_type = params["loss_type"]
    parts: dict[str, Any] = {"aggregation": AGGREGATION[loss_type]}
    if loss_type == "cispo":  # their epsilon_high is the cap itself, and there is no lower bound
        parts |= {"surrogate": "cispo", "clip_low": 1.0, "clip_high": params["epsilon_high"] - 1}
    elif loss_type == "sapo":
        gates = {"gate_positive": params["sapo_temperature_pos"], "gate_negative": params["sapo_temperature_neg"]}
        parts |= {"surrogate": "soft_gate", **gates}
    else:
        surrogate = "ppo_clip" if params["importance_sampling_level"] == "token" else "gspo"
        parts |= {"surrogate": surrogate, "clip_low": params["epsilon"], "clip_high": params["epsilon_high"]}
    if "delta" in params:
        parts["dual_clip"] = params["delta"]
    if params.get("beta", 0) > 0:
        parts |= {"kl": "loss", "kl_estimator": "k3", "kl_coefficient": params["beta"]}
    if loss_type == "dr_grpo":
        parts["loss_length"] = params["max_completion_length"]
    if "entropy_coef" in params:
        parts["entropy_coefficient"] = params["entropy_coef"]
    return parts


def rows_of(case: Case, name: str) -> Tensor:
    """Advantages by row or by token, as [B, 1] or [B, T]."""
    return torch.zeros(12, 1).double() if case.inputs[name] in (0, "0") else case.input(name).reshape(12, -1)


def policy_loss(case: Case) -> Verdict:
    if reason := without_counterpart(case):
        return NotOffered(reason)
    params = case.params
    mask = case.mask("tool_mask" if "tool_mask" in case.inputs else "completion_mask")
    names = {"ref": "ref_per_token_logps", "entropies": "entropies", "weights": "importance_sampling_ratio"}
    more = {ours: case.input(theirs) for ours, theirs in names.items() if theirs in case.inputs}
    whole = (20, 123) if params.get("num_items_in_batch") == 123 else None
    arguments = (mask, case.input("per_token_logps"), case.input("old_per_token_logps"), rows_of(case, "advantages"))
    parts = parts_of(params)
    result = loss_of(*arguments, whole=whole, **more, **parts)
    pairs = compared(case, result)
    rows = int(mask.any(1).sum())
    if rows < 12 and parts["aggregation"].startswith(("trajectory", "constant")):
        reason = "a trajectory without tokens counts in the mean over trajectories"
        return Differs(reason, pairs, EXACT, scaled(result, rows / 12))
    if params.get("current_gradient_accumulation_steps") == 2 and params["loss_type"] != "dapo":
        reason = "divided by the number of micro-batches, each a mean of its own; ours is a share of the whole batch"
        return Differs(reason, pairs, EXACT, scaled(result, 1 / 2))
    if "entropies" in more and params["loss_type"] == "grpo":
        without = loss_of(*arguments, **{**parts, "entropy_coefficient": 0.0})["loss"]
        bonus = params["entropy_coef"] * whole_mean(more["entropies"], mask, "token_mean")
        return Differs(
            "the entropy bonus is a mean over tokens where the loss is a mean over trajectories",
            {"loss": pairs["loss"]},
            EXACT,
            {"loss": without - bonus},
            equal={"gradient": pairs["gradient"]},
        )
    if params["importance_sampling_level"] == "sequence_token" and "/tok" in case.id:
        explained = straight_through_gradient(*arguments, None, parts)
        return Differs(
            "GSPO-token: each token gets the gradient of its own advantage; ours is the gradient of the loss",
            {"gradient": pairs["gradient"]},
            WITH_EPSILON,
            {"gradient": explained},
            equal={"loss": pairs["loss"]},
        )
    return Equal(pairs, EXACT)


def compared(case: Case, result: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "loss": (result["loss"], case.output("loss")),
        "gradient": (result["gradient"], case.output("grad_per_token_logps")),
    }


def asynchronous_loss(case: Case) -> Verdict:
    clips = {"clip_low": case.params["epsilon"], "clip_high": case.params["epsilon_high"]}
    result = loss_of(
        case.mask("completion_mask"),
        case.input("per_token_logps"),
        case.input("old_log_probs"),
        rows_of(case, "advantages"),
        surrogate="ppo_clip",
        aggregation="token_mean",
        **clips,
    )
    return Equal(compared(case, result), EXACT)


# --- corrections -------------------------------------------------------------------------------------------------


def importance_parts(case: Case) -> dict[str, Any]:
    """Our parts for their mode and bounds. Their sequence modes take the product over tokens."""
    mode, low, high = (case.params[f"vllm_importance_sampling_{name}"] for name in ("mode", "clip_min", "clip_max"))
    level, bound = mode.split("_")
    return {
        "importance_level": {"token": "token", "sequence": "sequence_sum"}[level],
        "importance": {"truncate": "truncated", "mask": "masked"}[bound],
        "min_importance_weight": low or 0.0,
        "max_importance_weight": high or math.inf,
    }


def ratio_of(case: Case) -> Tensor:
    """Our weights under these parts."""
    parts = importance_parts(case)
    weights, _ = corrections.importance_weights(
        case.input("old_per_token_logps"),
        case.input("sampling_per_token_logps"),
        case.mask("completion_mask"),
        level=parts["importance_level"],
        bound=parts["importance"],
        min_weight=parts["min_importance_weight"],
        max_weight=parts["max_importance_weight"],
    )
    return weights


def sampling_ratio(case: Case) -> Verdict:
    mask = case.mask("completion_mask")
    return Equal({"weights": (at(mask, ratio_of(case)), at(mask, case.output("ratio")))}, EXACT)


def corrected_loss(case: Case) -> Verdict:
    """Decoupled PPO: weights between sampler and old, PPO's clip between old and new."""
    weights, mask = ratio_of(case), case.mask("completion_mask")
    result = loss_of(
        mask,
        case.input("per_token_logps"),
        case.input("old_per_token_logps"),
        rows_of(case, "advantages"),
        rollout=case.input("sampling_per_token_logps"),
        surrogate="ppo_clip",
        aggregation="token_mean",
        clip_low=case.params["epsilon"],
        clip_high=case.params["epsilon_high"],
        **importance_parts(case),
    )
    pairs = compared(case, result)
    return Equal({**pairs, "weights": (at(mask, weights), at(mask, case.output("ratio")))}, EXACT)


# --- advantages --------------------------------------------------------------------------------------------------

MISSING = "a reward function that returned nothing is left out; ours refuses a reward that is not finite"


def outcome_of(case: Case) -> Tensor:
    """The weighted sum of the reward functions, with float32 weights as in the trainer."""
    rewards = [resolve(spec, case.dtype) for spec in case.inputs["rewards_per_func"]]
    weights = torch.tensor(case.params.get("reward_weights") or [1.0] * len(rewards))
    return torch.stack([r * w for r, w in zip(rewards, weights, strict=True)]).sum(0)


def by_row(case: Case, **parts: Any) -> Tensor:
    """Our advantages [B] for an outcome that is paid at the last token."""
    mask = case.mask("completion_mask")
    rewards = returns.on_last_action(outcome_of(case), mask)
    index = torch.arange(12) // case.params["num_generations"]
    behavior = case.input("old_per_token_logps") if "old_per_token_logps" in case.inputs else None
    ref = case.input("ref_per_token_logps") if "ref_per_token_logps" in case.inputs else None
    return advantages_of(batch_of(mask, rewards, behavior, ref, index), rewards="outcome", **parts)[:, 0]


def group_relative(case: Case) -> Verdict:
    params = case.params
    if params["multi_objective_aggregation"] != "sum_then_normalize":
        return NotOffered("GDPO: several rewards, each normalised by itself")
    if "nan" in case.id:
        return NotOffered(MISSING)
    if params["scale_rewards"] == "batch":
        return over_the_batch(case)
    with_std = params["scale_rewards"] == "group"
    ours = by_row(case, baseline="group_outcome_mean", group_std=with_std, group_std_epsilon=1e-4 if with_std else 0.0)
    theirs = case.output("advantages")
    if "const6" in case.id and with_std and case.dtype == torch.float32:
        column = torch.ones(12, 1, dtype=torch.bool)
        return blown_up_rounding(column, ours[:, None], theirs[:, None], 1e-4, slice(0, 6))
    tolerance = FLOAT32 if case.dtype == torch.float32 else EXACT
    return Equal({"advantages": (ours, theirs)}, tolerance)


def over_the_batch(case: Case) -> Verdict:
    tolerance = FLOAT32 if case.dtype == torch.float32 else EXACT
    ours = by_row(case, baseline="group_outcome_mean", batch_std=True)
    centred = by_row(case, baseline="group_outcome_mean")
    return Differs(
        "divided by the standard deviation of the batch's raw rewards, plus 1e-4; ours is that of the advantages",
        {"advantages": (ours, case.output("advantages"))},
        tolerance,
        {"advantages": centred / (outcome_of(case).double().std() + 1e-4)},
    )


def leave_one_out(case: Case) -> Verdict:
    params = case.params
    if params.get("normalize_advantages"):
        return NotOffered("leave-one-out advantages whitened over trajectories, not tokens")
    if "nan" in case.id:
        return NotOffered(MISSING)
    parts: dict[str, Any] = {"baseline": "leave_one_out"}
    if params["beta"] > 0:
        parts |= {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": params["beta"]}
    if "reward_clip_range" in params:
        parts["reward_range"] = params["reward_clip_range"]
    tolerance = FLOAT32 if case.dtype == torch.float32 else EXACT
    return Equal({"advantages": (by_row(case, **parts), case.output("advantages"))}, tolerance)


# --- KL and statistics -------------------------------------------------------------------------------------------


def kl(case: Case) -> Verdict:
    leaf = case.input("per_token_logps").requires_grad_()
    ours = losses.kl_estimate(leaf, case.input("ref_per_token_logps"), "k3")
    (gradient,) = torch.autograd.grad(ours.sum(), leaf)
    pairs = {"kl": (ours.detach(), case.output("kl")), "gradient": (gradient, case.output("grad_logprob"))}
    return Equal(pairs, EXACT)


def masked(case: Case) -> Verdict:
    if not case.params.get("shift_mean", True):
        return NotOffered("scaling without centring")
    mask, values = case.mask("mask"), case.input("values")
    if case.function == "ppo_trainer:masked_mean":
        return Equal({"out": (whole_mean(values, mask, "token_mean"), case.output("out"))}, EXACT)
    return Equal({"out": (at(mask, returns.whiten(values, mask)), at(mask, case.output("out")))}, WITH_EPSILON)


def log_softmax(case: Case) -> Verdict:
    if "topk" in case.id:
        index = case.input("index").long()
        output, _ = output_of(shared_logits(case), index[..., 0], others=index)
        assert output.of_others is not None
        return Equal({"logprobs": (output.of_others[:, 1:].detach(), case.output("logprob"))}, FLOAT32)
    verdict = logprob_verdict(case)
    if case.params["input_dtype"] != "bf16" or not isinstance(verdict, Equal):
        return verdict
    logits = shared_logits(case).bfloat16()
    labels = case.input("index").long()
    ours = output_of(logits.double(), labels)[0].logprobs[:, 1:].detach()
    theirs = case.output("logprob")
    rounding = 2.0**-7 * float(torch.maximum(theirs.abs().max(), logits.abs().max()))
    shown = (bool(((ours - theirs).abs() <= rounding).all()), bool((theirs.bfloat16() == theirs).all()))
    reason = "computed in bfloat16, right to its 8 bits; ours takes logits to float32 first"
    return Differs(reason, {"logprobs": (ours, theirs)}, FLOAT32, shown=shown)


HANDLERS: dict[str, Callable[[Case], Verdict]] = {
    "grpo_trainer:GRPOTrainer._compute_loss": policy_loss,
    "gspo_token:GRPOTrainer._compute_loss": policy_loss,
    "async_grpo:AsyncGRPOTrainer.compute_loss": asynchronous_loss,
    "grpo_trainer:GRPOTrainer._compute_loss [per_token_kl]": kl,
    "grpo_trainer:GRPOTrainer._generate_and_score_completions": group_relative,
    "rloo_trainer:RLOOTrainer._generate_and_score_completions": leave_one_out,
    "grpo_trainer:GRPOTrainer._generate_and_score_completions [importance_sampling_ratio]": sampling_ratio,
    "grpo_trainer:GRPOTrainer._generate_and_score_completions + _compute_loss": corrected_loss,
    "ppo_trainer:PPOTrainer.train [rewards, GAE, losses]": critics.trl_ppo,
    "ppo_trainer:masked_mean": masked,
    "ppo_trainer:masked_whiten": masked,
    "utils:entropy_from_logits": entropy_verdict,
    "utils:selective_log_softmax": log_softmax,
}
