"""verl's functions and what they are in our settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from align.algorithm import guards, losses, returns, surrogates
from tests.conformance import critics, verl_advantages, verl_corrections
from tests.conformance.departures import charged_distance, straight_through_gradient
from tests.conformance.peers import (
    EXACT,
    WITH_EPSILON,
    Case,
    Differs,
    Equal,
    NotOffered,
    Pairs,
    Verdict,
    at,
    loss_of,
    scaled,
    whole_mean,
)
from tests.conformance.policies import entropy_verdict, logprob_verdict
from tests.conformance.verl_advantages import KL, NO_ABS
from tests.conformance.verl_corrections import LEVELS, bounded_weights, importance_parts, rejection_band

AGGREGATION = {
    "token-mean": "token_mean",
    "token-sum": "sum",
    "seq-mean-token-sum": "trajectory_mean",
    "seq-mean-token-mean": "trajectory_token_mean",
    "seq-mean-token-sum-norm": "constant_length",
}
NOT_OFFERED = {
    "compute_grpo_passk_outcome_advantage": "pass@k: only the best of a group is rewarded",
    "compute_opo_outcome_advantage": "OPO: baseline weighted by length",
    "compute_gpg_outcome_advantage": "GPG: scaled by the number of non-zero rewards",
    "compute_remax_outcome_advantage": "ReMax: needs a greedy rollout as baseline",
    "compute_optimal_token_baseline_advantage": "optimal token baseline: needs sum over v of pi(v)^2",
    "compute_multi_turn_optimal_token_baseline_advantage": "optimal token baseline: needs sum over v of pi(v)^2",
    "compute_gdpo_outcome_advantage": "GDPO: several rewards, each normalised by itself",
    "compute_policy_loss_geo_mean": "GMPO: geometric mean of clipped ratios",
    "compute_policy_loss_dro": "DRO: quadratic loss on the log-ratio",
    "compute_policy_loss_dppo_tv": "DPPO: tokens masked by a divergence of distributions",
    "compute_policy_loss_dppo_kl": "DPPO: tokens masked by a divergence of distributions",
    "calculate_sum_pi_squared_from_logits": "read by the optimal token baseline alone",
    "masked_var": "a step inside whitening; compared there",
}


# --- losses ------------------------------------------------------------------------------------------------------


def aggregation(params: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None, int]:
    """Our parts, the whole batch's rows and tokens, and the factor of data parallelism that their mean over ranks undoes."""
    how = AGGREGATION[params["loss_agg_mode"].split(" ")[0]]
    known = {**params, **params.get("global_batch_info", {})}
    parts: dict[str, Any] = {"aggregation": how}
    if how == "constant_length":
        parts["loss_length"] = known.get("loss_scale_factor", 9)
    whole = (known["global_batch_size"], known["batch_num_tokens"]) if "global_batch_size" in known else None
    return parts, whole, known.get("dp_size", 1)


def aggregated(case: Case) -> Verdict:
    """`agg_loss`, shown on the loss -A * log pi with log pi = -1: its losses are A."""
    parts, whole, ranks = aggregation(case.params)
    mask, values = case.mask("loss_mask"), case.input("loss_mat")
    result = loss_of(mask, -torch.ones_like(values), torch.zeros_like(values), values, whole=whole, **parts)
    ours = {"loss": ranks * result["loss"], "gradient": -ranks * result["gradient"] / values}
    pairs = {
        "loss": (ours["loss"], case.output("loss")),
        "gradient": (ours["gradient"], case.output("grad_loss_mat")),
    }
    if "(old)" in case.function:
        rows = float(mask.any(1).sum())
        explained = {name: value * rows for name, value in ours.items()}
        return Differs("not divided by the number of trajectories", pairs, WITH_EPSILON, explained)
    return Equal(pairs, WITH_EPSILON)


def policy_loss(surrogate: str) -> Callable[[Case], Verdict]:
    """The handler of a loss that is one of our surrogates."""

    def handler(case: Case) -> Verdict:
        parts, whole, ranks = aggregation(case.params)
        parts["surrogate"] = surrogate
        if surrogate in ("ppo_clip", "gspo", "cispo"):
            parts["clip_low"] = case.params.get("clip_ratio_low", case.params.get("cliprange_low"))
            parts["clip_high"] = case.params.get("clip_ratio_high", case.params.get("cliprange_high"))
        if surrogate == "ppo_clip":
            parts["dual_clip"] = case.params["clip_ratio_c"]
        if surrogate in ("gspo", "soft_gate"):
            parts["aggregation"] = "trajectory_token_mean"
        if surrogate == "soft_gate":
            parts |= {"gate_positive": case.params["tau_pos"], "gate_negative": case.params["tau_neg"]}
        result = loss_of(*arguments(case), weights=given_weights(case), whole=whole, **parts)
        pairs = compared(case, scaled(result, ranks))
        if surrogate == "gspo" and ("/tok" in case.id or given_weights(case) is not None):
            return straight_through(case, result, parts)
        if surrogate in ("ppo_clip", "gspo") and clip_fraction(case, "lower") == 0:
            pairs["clipped"] = (result["clipped"], torch.tensor(clip_fraction(case, "")).double())
        return Equal(pairs, WITH_EPSILON)

    return handler


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, log-probs, those that the ratio starts from, advantages."""
    old = "old_log_prob" if "old_log_prob" in case.inputs else "rollout_log_prob"
    return case.mask("response_mask"), case.input("log_prob"), case.input(old), case.input("advantages")


def given_weights(case: Case) -> Tensor | None:
    return None if case.inputs.get("rollout_is_weights") is None else case.input("rollout_is_weights")


def compared(case: Case, result: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "loss": (result["loss"], case.output("loss")),
        "gradient": (result["gradient"], case.output("grad_log_prob")),
    }


def clip_fraction(case: Case, which: str) -> float:
    name = f"pg_clipfrac_{which}".removesuffix("_")
    return float(case.outputs["metrics"][f"actor/{name}"] if "metrics" in case.outputs else case.outputs[name])


def straight_through(case: Case, result: dict[str, Tensor], parts: dict[str, Any]) -> Verdict:
    """GSPO with token advantages or weights: each token has the gradient of its own, not of the row's mean."""
    explained = straight_through_gradient(*arguments(case), given_weights(case), parts)
    pairs = compared(case, result)
    return Differs(
        "GSPO-token: each token gets the gradient of its own advantage; ours is the gradient of the loss",
        {"gradient": pairs["gradient"]},
        WITH_EPSILON,
        {"gradient": explained},
        equal={"loss": pairs["loss"]},
    )


def bypass(case: Case) -> Verdict:
    correction = case.params["rollout_correction"]
    if correction["rollout_rs"] == "token_k3":
        return NotOffered("rejection by k2, k3 or a maximum over tokens")
    mask, logprobs, old, advantages = arguments(case)
    parts: dict[str, Any] = {"aggregation": "token_mean"}
    if correction["rollout_rs"] is not None:
        low, high = rejection_band(correction["rollout_rs_threshold"])
        parts |= {"importance": "rejected", "importance_level": LEVELS[correction["rollout_rs"]]}
        parts |= {"min_importance_weight": low, "max_importance_weight": high, "surrogate": "ppo_clip"}
        clips = {"clip_low": case.params["clip_ratio_low"], "clip_high": case.params["clip_ratio_high"]}
        result = loss_of(mask, logprobs, old, advantages, **clips, dual_clip=case.params["clip_ratio_c"], **parts)
        kept = int(mask.sum()) * (1 - result["rejected"])
        reason = "what is rejected leaves the denominator, which is then known only after a pass over the whole batch"
        explained = scaled(result, int(mask.sum()) / float(kept))
        return Differs(reason, compared(case, result), WITH_EPSILON, explained)
    if correction["loss_type"] == "ppo_clip":
        return policy_loss("ppo_clip")(case)
    parts |= {"importance": "truncated", "importance_level": "sequence_sum"}
    result = loss_of(mask, logprobs, old, advantages, max_importance_weight=correction["rollout_is_threshold"], **parts)
    return Equal(compared(case, result), WITH_EPSILON)


def guarded(guard: str) -> Callable[[Case], Verdict]:
    """The handler of Clip-Cov or KL-Cov, which take their covariance from the current log-probs."""

    def handler(case: Case) -> Verdict:
        parts, _, _ = aggregation(case.params)
        band = (-math.inf, math.inf)
        if guard == "clip_cov":
            band = (case.params["clip_cov_lb"], case.params["clip_cov_ub"])
            parts |= {"surrogate": "ppo_clip", "guard_band": band}
            parts |= {"clip_low": case.params["clip_ratio_low"], "clip_high": case.params["clip_ratio_high"]}
        else:
            parts |= {"surrogate": "importance_weighted", "guard_coefficient": case.params["ppo_kl_coef"]}
        fraction = case.params[f"{guard}_ratio"]
        mask, logprobs, old, advantages = arguments(case)
        weights = given_weights(case)
        ours = loss_of(
            mask, logprobs, old, advantages, weights=weights, entropy_guard=guard, guard_fraction=fraction, **parts
        )
        pairs = compared(case, ours)
        if "random" in case.id:
            return chosen_at_random(case, parts, pairs)
        covariance = guards.token_covariance(logprobs, advantages, mask)
        if guard == "clip_cov":
            clipped = surrogates.ppo_clip(logprobs, old, advantages, mask, parts["clip_low"], parts["clip_high"])[1]
            covariance = covariance.masked_fill(clipped, -math.inf)
        theirs = guards.highest(covariance, mask, fraction, *band)
        if torch.equal(logprobs, old):
            return Equal(pairs, WITH_EPSILON)
        if guard == "clip_cov":
            explained = loss_of(*arguments(case), weights=weights, guarded=theirs, entropy_guard=guard, **parts)
            reason = (
                "covariances of the current log-probs, less those of clipped tokens; ours are those at sampling time"
            )
            return Differs(reason, pairs, WITH_EPSILON, {name: explained[name] for name in pairs})
        parts.pop("guard_coefficient")
        plain = loss_of(*arguments(case), weights=weights, **parts)
        more = charged_distance(mask, logprobs, old, theirs, weights, case.params["ppo_kl_coef"])
        reason = "covariances of the current log-probs, and |log ratio| is charged where ours is an estimate of the KL"
        return Differs(reason, pairs, WITH_EPSILON, {name: plain[name] + more[name] for name in pairs})

    return handler


def chosen_at_random(case: Case, parts: dict[str, Any], pairs: Pairs) -> Verdict:
    """Clip-Cov where the band holds more tokens than may be guarded: theirs are some of the band, as many as ours."""
    mask, logprobs, old, advantages = arguments(case)
    plain = {name: value for name, value in parts.items() if name != "guard_band"}
    without = loss_of(mask, logprobs, old, advantages, **plain)["gradient"]
    lost = (case.output("grad_log_prob") == 0) & (without != 0)
    covariance = guards.token_covariance(logprobs, advantages, mask)[lost]
    low, high = parts["guard_band"]
    as_many = round(clip_fraction(case, "") * 57) == int(
        case.params["clip_cov_ratio"] * 57
    )  # one has an advantage of 0
    shown = (as_many, len(covariance) > 0, bool(((covariance > low) & (covariance < high)).all()))
    reason = "tokens of the band are drawn at random; ours are those of highest covariance in it"
    return Differs(reason, {"gradient": pairs["gradient"]}, WITH_EPSILON, shown=shown)


def corrected_policy_loss(case: Case) -> Verdict:
    """Decoupled PPO: weights between rollout and old, PPO's clip between old and new."""
    mask, logprobs, old, advantages = arguments(case)
    rollout = case.input("rollout_log_prob")
    weights, _ = bounded_weights(case, old - rollout, mask)
    clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": case.params["clip_ratio_c"]}
    parts = {"surrogate": "ppo_clip", "aggregation": "token_mean", **clips, **importance_parts(case)}
    result = loss_of(mask, logprobs, old, advantages, rollout=rollout, **parts)
    pairs = compared(case, result)
    return Equal({**pairs, "weights": (at(mask, weights), at(mask, case.output("weights")))}, WITH_EPSILON)


# --- KL, entropy, statistics -------------------------------------------------------------------------------------


def kl(case: Case) -> Verdict:
    name = case.params["kl_penalty"]
    plus, name = name.endswith("+"), name.removesuffix("+")
    if name == "abs":
        return NO_ABS
    kind = KL[name]
    if plus and kind == "k1":
        return NotOffered("the value of k1 with the gradient of k2: as a loss it is k2, whose value is at hand")
    if "error" in case.outputs:
        logprobs, ref = case.input("logprob"), case.input("ref_logprob")
        ours = losses.kl_estimate(logprobs, ref, "k3_grad_k2")
        shown = (case.outputs["error"] == "NotImplementedError", bool(ours.isfinite().all()))
        absent = {"kl": (ours, torch.zeros_like(ours))}
        return Differs("the older version looks the name up with its plus sign and raises", absent, shown=shown)
    return kl_verdict(case, "k3_grad_k2" if plus and kind == "k3" else kind, bound=10.0)


def kl_verdict(case: Case, kind: str, bound: float) -> Verdict:
    """Elementwise or aggregated KL; theirs cuts the value of k3, and with it the gradient unless that is k2's."""
    leaf = case.input("logprob").requires_grad_()
    ref = case.input("ref_logprob")
    ours = losses.kl_estimate(leaf, ref, kind)
    cut = ours.clamp(-bound, bound) if kind == "k3" else ours + (ours.clamp(-bound, bound) - ours).detach()
    theirs = {"gradient": case.output("grad_logprob")} if "grad_logprob" in case.outputs else {}
    results = []
    for values in (ours, cut):
        if "loss" in case.outputs:
            mask = case.mask("loss_mask")
            how = AGGREGATION[case.params["loss_agg_mode"]]
            values = losses.aggregate(values, mask, losses.trajectory_weights(how, mask, torch.zeros(12).long()))
        (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
        results.append({"value": values.detach(), "gradient": gradient})
    theirs["value"] = case.output("loss" if "loss" in case.outputs else "kl")
    pairs = {name: (results[0][name], value) for name, value in theirs.items()}
    tolerance = WITH_EPSILON if "loss" in case.outputs else EXACT
    if kind.startswith("k3") and "extreme" in case.id:
        explained = {name: results[1][name] for name in theirs}
        return Differs(
            "k3 is cut at 10; beyond it the value stays and its own gradient ends", pairs, tolerance, explained
        )
    return Equal(pairs, tolerance)


def masked(case: Case) -> Verdict:
    if not case.params.get("shift_mean", True):
        return NotOffered("scaling without centring")
    mask, values = case.mask("mask"), case.input("values")
    if case.function == "masked_whiten":
        theirs = at(mask, case.output("out"))
        return Equal({"out": (at(mask, returns.whiten(values, mask)), theirs)}, WITH_EPSILON)
    how = "sum" if case.function == "masked_sum" else "token_mean"
    parts = [slice(None)] if "axis" not in case.params else [slice(b, b + 1) for b in range(12)]
    ours = torch.stack([whole_mean(values[rows], mask[rows], how) for rows in parts])
    return Equal({"out": (ours.reshape(case.output("out").shape), case.output("out"))}, WITH_EPSILON)


HANDLERS: dict[str, Callable[[Case], Verdict]] = {
    "compute_grpo_outcome_advantage": verl_advantages.group_relative,
    "compute_grpo_vectorized_outcome_advantage": verl_advantages.group_relative,
    "compute_grpo_vectorized_outcome_advantage (old)": verl_advantages.group_relative,
    "compute_rloo_outcome_advantage": verl_advantages.leave_one_out,
    "compute_rloo_vectorized_outcome_advantage": verl_advantages.leave_one_out,
    "compute_reinforce_plus_plus_outcome_advantage": verl_advantages.whitened,
    "compute_reinforce_plus_plus_outcome_advantage (old)": verl_advantages.whitened,
    "compute_reinforce_plus_plus_baseline_outcome_advantage": verl_advantages.whitened_group,
    "compute_gae_advantage_return": critics.whitened_gae,
    "compute_value_loss": critics.value_loss("vpreds", "values", "returns", "response_mask", "cliprange_value"),
    "AdaptiveKLController.update": critics.kl_controller,
    "apply_kl_penalty": verl_advantages.kl_in_reward,
    "apply_kl_penalty + advantage": verl_advantages.advantages_with_kl,
    "compute_rewards": verl_advantages.rewards_with_kl,
    "agg_loss": aggregated,
    "agg_loss (old)": aggregated,
    "compute_policy_loss_vanilla": policy_loss("ppo_clip"),
    "compute_policy_loss": policy_loss("ppo_clip"),
    "compute_policy_loss_gspo": policy_loss("gspo"),
    "compute_policy_loss_cispo": policy_loss("cispo"),
    "compute_policy_loss_sapo": policy_loss("soft_gate"),
    "compute_policy_loss_clip_cov": guarded("clip_cov"),
    "compute_policy_loss_kl_cov": guarded("kl_cov"),
    "compute_policy_loss_gpg": policy_loss("reinforce"),
    "compute_policy_loss_reinforce": policy_loss("reinforce"),
    "compute_policy_loss_bypass_mode": bypass,
    "compute_rollout_correction_weights + compute_policy_loss_vanilla": corrected_policy_loss,
    "kl_penalty": kl,
    "kl_penalty (old)": kl,
    "kl_penalty_forward": kl,
    "agg_loss(kl_penalty)": kl,
    "entropy_from_logits": entropy_verdict,
    "entropy_from_logits_with_chunking": entropy_verdict,
    "compute_entropy_loss": entropy_verdict,
    "logprobs_from_logits_naive": logprob_verdict,
    "logprobs_from_logits_v2": logprob_verdict,
    "logprobs_from_logits": logprob_verdict,
    "masked_mean": masked,
    "masked_sum": masked,
    "masked_whiten": masked,
    "compute_rollout_correction_weights": verl_corrections.rollout_weights,
    "compute_rollout_rejection_mask": verl_corrections.rejection,
    "compute_rollout_correction_and_rejection_mask": verl_corrections.weights_and_rejection,
    "compute_offpolicy_metrics": verl_corrections.off_policy_metrics,
    "compute_rollout_corr_metrics_from_logprobs": verl_corrections.off_policy_metrics,
}
