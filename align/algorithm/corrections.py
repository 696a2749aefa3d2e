"""Importance weights between the policy that sampled and the policy that learns: pure functions of tensors.

Tensors are `[B, T]`, padded, with a boolean `mask` [B, T]; weights are 1 outside it. Weights are constants: no gradient flows
through them. They are always bounded from above, and every bound that is hit is marked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_weights(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    bound: str = "truncated",
    min_weight: float = 0.0,
    max_weight: float,
) -> tuple[Tensor, Tensor]:
    """Bounded `pi / mu`, without gradient.

    With `d_t = log pi - log mu` the ratio is `exp(d_t)` by `token`; of a whole row, repeated at its tokens, it is
    `exp(mean_t d_t)` by `sequence_mean` (the geometric mean) and `exp(sum_t d_t)` by `sequence_sum` (the exact one).
    `truncated` moves a ratio outside [min_weight, max_weight] to the bound; `masked` makes it 0; `rejected` makes it 0 too, and
    every ratio inside 1: what is kept is not weighted.

    Args:
        policy_logprobs: [B, T].
        behavior_logprobs: [B, T].
        mask: [B, T] bool.
        level: `token`, `sequence_mean` or `sequence_sum`.
        bound: `truncated`, `masked` or `rejected`.
        min_weight: In [0, 1]; 0 is none.
        max_weight: At least 1.

    Returns:
        Weights [B, T] (1 outside the mask) and a bool [B, T] of the tokens whose ratio was out of bounds.

    Raises:
        ValueError: If a bound would cut on-policy tokens, or a name is unknown.

    Source: Ionides (2008), Truncated importance sampling, and Espeholt et al. (2018), IMPALA, rho-bar (`truncated`); Team Ling
    (2025), Every step evolves, IcePop (`masked` by token). A lower bound for `truncated` is found in implementations only, and
    so is `rejected` (verl's rollout rejection; there what is rejected leaves the denominator too, here it only adds 0, so that
    the denominator is known before the first micro-batch).
    """
    if not max_weight >= 1.0:
        raise ValueError(f"max_weight is {max_weight}; below 1 even on-policy tokens would be truncated")
    if not 0.0 <= min_weight <= 1.0:
        raise ValueError(f"min_weight is {min_weight}; it must be between 0 and 1, or on-policy tokens would be cut")
    log_ratio = _ratio_of(level, (policy_logprobs - behavior_logprobs).detach().masked_fill(~mask, 0.0), mask)
    low, high = math.log(min_weight) if min_weight > 0 else -math.inf, math.log(max_weight)
    outside = ((log_ratio < low) | (log_ratio > high)) & mask
    weights = log_ratio.clamp(max=high).exp().clamp(min_weight, max_weight)
    match bound:
        case "truncated":
            pass
        case "masked":
            weights = weights.masked_fill(outside, 0.0)
        case "rejected":
            weights = (~outside).to(weights.dtype)
        case _:
            raise ValueError(f"unknown bound {bound!r}; choose truncated, masked or rejected")
    return weights.masked_fill(~mask, 1.0), outside


def interpolated_logprobs(policy_logprobs: Tensor, behavior_logprobs: Tensor, staleness: Tensor) -> Tensor:
    """Log-probabilities of the policy at the start of the update, guessed from those of behaviour and policy. No gradient.

    `log prox = log mu + (d - 1) / d * (log pi - log mu)`, where the policy that is being made is d = staleness + 1 versions
    younger than the one that sampled the token: on the straight line in log space, one version before its end. A token that the
    policy of the batch's start sampled (staleness 0) gets `log mu` itself, which is exact. It saves a forward pass.

    Args:
        policy_logprobs: [B, T].
        behavior_logprobs: [B, T].
        staleness: [B, T] integer, learner's version minus the token's; what is negative counts as 0.

    Source: AReaL's documentation of the proximal log-probability approximation ("loglinear"), of Li et al. (2025), A-3PO. Their
    current version is the one that the update makes, hence the 1.
    """
    policy, behavior = policy_logprobs.detach(), behavior_logprobs.detach()
    share = staleness.clamp(min=0) / (staleness.clamp(min=0) + 1)
    return behavior + share.to(policy.dtype) * (policy - behavior)


def _ratio_of(level: str, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The log-ratio of each token's level, at every token. Rounding must not push a ratio of 1 over a bound of 1."""
    match level:
        case "token":
            return log_ratio
        case "sequence_mean":
            count = mask.sum(dim=1, keepdim=True).clamp(min=1)
            return (log_ratio.sum(dim=1, keepdim=True) / count).expand(mask.shape)
        case "sequence_sum":
            return log_ratio.sum(dim=1, keepdim=True).expand(mask.shape)
    raise ValueError(f"unknown level {level!r}; choose token, sequence_mean or sequence_sum")


def effective_sample_fraction(weights: Tensor, mask: Tensor) -> float:
    """`(sum w)^2 / (n sum w^2)` over the tokens of the mask: the share of tokens that would say as much unweighted.

    1 for equal weights, `1/n` where one outweighs all, 0 where every weight is 0 or the mask is empty.

    Source: Kong (1992), A note on importance sampling using standardized weights; divided by n.
    """
    values = weights[mask].double()
    squares = float(values.square().sum())
    return float(values.sum()) ** 2 / (values.numel() * squares) if squares > 0 else 0.0


def chi_square(policy_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> float:
    """`mean(rho_t^2) - 1` over the tokens of the mask, with `rho = pi / mu`: estimates the chi-square divergence of pi from mu.

    The variance of importance weights grows with it. Log-ratios are kept within +-20, so it is finite; 0 for an empty mask.

    Source: the definition, `E_mu[(pi/mu)^2] - 1`, by Monte Carlo.
    """
    log_ratio = (policy_logprobs - behavior_logprobs)[mask].double().clamp(-20.0, 20.0)
    return float(torch.expm1(2 * log_ratio).mean()) if log_ratio.numel() else 0.0
