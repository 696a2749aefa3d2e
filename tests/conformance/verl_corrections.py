"""verl's rollout correction, and what it is in our settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align.algorithm import corrections, losses
from tests.conformance.peers import (
    EXACT,
    WITH_EPSILON,
    Case,
    Differs,
    Equal,
    NotOffered,
    Verdict,
    at,
    whole_mean,
)

LEVELS = {"token_k1": "token", "seq_sum_k1": "sequence_sum", "seq_mean_k1": "sequence_mean"}


def importance_parts(case: Case) -> dict[str, Any]:
    """Our parts for their `rollout_is` and its threshold: one number truncates from above, two are IcePop's band."""
    threshold = case.params["rollout_is_threshold"]
    band = [float(x) for x in threshold.split("_")] if isinstance(threshold, str) else [0.0, float(threshold)]
    return {
        "importance_level": {"token": "token", "sequence": "sequence_sum"}[case.params["rollout_is"]],
        "importance": "masked" if isinstance(threshold, str) else "truncated",
        "min_importance_weight": band[0],
        "max_importance_weight": band[1],
    }


def bounded_weights(case: Case, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Our weights under these parts."""
    parts = importance_parts(case)
    return corrections.importance_weights(
        log_ratio,
        torch.zeros_like(log_ratio),
        mask,
        level=parts["importance_level"],
        bound=parts["importance"],
        min_weight=parts["min_importance_weight"],
        max_weight=parts["max_importance_weight"],
    )


def rollout_weights(case: Case) -> Verdict:
    if case.params["rollout_is_batch_normalize"]:
        return NotOffered("weights divided by their batch mean: bounded no longer, and biased by the batch")
    mask, log_ratio = case.mask("response_mask"), case.input("log_ratio")
    weights, _ = bounded_weights(case, log_ratio, mask)
    if "error" in case.outputs:
        empty = corrections.effective_sample_fraction(weights, mask) == 0 and not weights[mask].any()
        shown = (case.outputs["error"] == "ZeroDivisionError", empty)
        absent = {"weights": (weights[mask], torch.ones(57))}
        return Differs("where every trajectory is rejected the metric divides by 0; ours is 0", absent, shown=shown)
    ours = torch.tensor(corrections.effective_sample_fraction(weights, mask)).double()
    pairs = {
        "weights": (at(mask, weights), at(mask, case.output("weights"))),
        "effective samples": (ours, case.metric("rollout_is_eff_sample_size")),
    }
    return Equal(pairs, WITH_EPSILON)


def rejection_band(threshold: str) -> tuple[float, float]:
    """Theirs bounds rollout/train, ours train/rollout: the inverse band. One number u is 1/u to u."""
    if "_" in threshold:
        low, high = map(float, threshold.split("_"))
        return 1 / high, 1 / low
    return 1 / float(threshold), float(threshold)


def kept(case: Case, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Tokens that our mask of the same band keeps."""
    low, high = rejection_band(case.params["rollout_rs_threshold"])
    _, outside = corrections.importance_weights(
        log_ratio,
        torch.zeros_like(log_ratio),
        mask,
        level=LEVELS[case.params["rollout_rs"]],
        bound="masked",
        min_weight=low,
        max_weight=high,
    )
    return mask & ~outside


def rejection(case: Case) -> Verdict:
    if case.params["rollout_rs"] not in LEVELS:
        return NotOffered("rejection by k2, k3 or a maximum over tokens")
    mask = case.mask("response_mask")
    ours = kept(case, case.input("log_ratio"), mask)
    return Equal({"kept": (ours.double(), case.output("mask"))}, EXACT)


def weights_and_rejection(case: Case) -> Verdict:
    mask = case.mask("response_mask")
    log_ratio = case.input("old_log_prob") - case.input("rollout_log_prob")
    weights, _ = bounded_weights(case, log_ratio, mask)
    keeps = kept(case, log_ratio, mask) if "rollout_rs" in case.params else mask
    pairs = {
        "weights": (at(mask, weights), at(mask, case.output("weights"))),
        "kept": (keeps.double(), case.output("mask")),
    }
    return Equal(pairs, EXACT)


def off_policy_metrics(case: Case) -> Verdict:
    """chi-square by token, k1 and k3 between rollout and policy; not perplexities and the chi-square by trajectory."""
    mask = case.mask("response_mask")
    policy = case.input("old_log_prob" if "old_log_prob" in case.inputs else "log_prob")
    rollout = case.input("rollout_log_prob")
    prefix = "" if "chi2_token" in case.outputs["metrics"] else "rollout_corr/"
    ours = {
        "chi2_token": torch.tensor(corrections.chi_square(policy, rollout, mask)),
        "kl": whole_mean(losses.kl_estimate(rollout, policy, "k1"), mask, "token_mean"),
        "k3_kl": whole_mean(losses.kl_estimate(rollout, policy, "k3"), mask, "token_mean"),
    }
    return Equal({name: (value, case.metric(prefix + name)) for name, value in ours.items()}, WITH_EPSILON)
