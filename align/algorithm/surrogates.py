"""Surrogate losses: what is differentiated in place of the expected return. Pure functions of tensors.

Tensors are `[B, T]`, padded, with a boolean `mask` [B, T] of the tokens that carry loss. A loss is minimised; its gradient
is minus the policy gradient. What stands outside the mask is ignored and gets no gradient.

`old_logprobs` are the log-probabilities that the ratio `r_t = exp(log pi - log old)` starts from: those of the policy at the
start of the update where several optimizer steps share a batch, those of the behaviour policy where each batch has one step.
Each function also returns which tokens lost their gradient to a bound, so that every bound that is hit can be counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are kept within +-20 before `exp`: far beyond any clip, and `exp` stays finite in every dtype."""


def reinforce(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """`-A_t * log pi(a_t | s_t)`, whose gradient is `-A_t * grad log pi`.

    Args:
        policy_logprobs: [B, T] with gradient.
        advantages: [B, T]; treated as constants.

    Returns:
        [B, T] losses, not yet masked or aggregated.

    Source: Williams (1992), Simple statistical gradient-following algorithms, equation 11.
    """
    return -advantages.detach() * policy_logprobs


def importance_weighted(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """`-r_t * A_t`, whose gradient is `-r_t * A_t * grad log pi`: no clip, only the bound of the log-ratio.

    Args:
        policy_logprobs: [B, T] with gradient.
        old_logprobs: [B, T].
        advantages: [B, T]; treated as constants.
        mask: [B, T] bool.

    Returns:
        Losses [B, T], and a bool [B, T] of the tokens whose log-ratio hit its bound.

    Source: Schulman et al. (2017), Proximal Policy Optimization, equation 6 (the conservative policy iteration objective).
    """
    log_ratio, hit = _bounded(_log_ratio(policy_logprobs, old_logprobs, mask), mask)
    return -log_ratio.exp() * advantages.detach(), hit


def ppo_clip(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """`-min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)`, and at most `-dual_clip * A_t` where `A_t < 0`.

    Args:
        policy_logprobs: [B, T] with gradient.
        old_logprobs: [B, T].
        advantages: [B, T]; treated as constants.
        mask: [B, T] bool.
        clip_low: In [0, 1]; 1 is no lower bound.
        clip_high: At least 0.
        dual_clip: Above 1; bounds the loss of a token with a negative advantage. inf for none.

    Returns:
        Losses [B, T], and a bool [B, T] of the tokens that a clip left without gradient.

    Raises:
        ValueError: If a clip is out of range.

    Source: Schulman et al. (2017), equation 7; two clips: Yu et al. (2025), DAPO, equation 8; dual clip: Ye et al. (2020),
    Mastering complex control in MOBA games with deep reinforcement learning.
    """
    _check_clips(clip_low, clip_high)
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or it would cut on-policy tokens")
    log_ratio, hit = _bounded(_log_ratio(policy_logprobs, old_logprobs, mask), mask)
    losses, clipped = _clipped(log_ratio.exp(), advantages.detach(), clip_low, clip_high)
    if math.isfinite(dual_clip):
        limit = -dual_clip * advantages.detach()
        cut = (advantages < 0) & (losses > limit)
        losses, clipped = torch.where(cut, limit, losses), clipped | cut
    return losses, (clipped | hit) & mask


def gspo(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clip with one ratio per sequence: `s = exp((1/n) sum_t log r_t)`, the geometric mean of the token ratios.

    The gradient goes through the mean: every token of a row gets `(1/n)` of what the row gets.

    Args:
        policy_logprobs: [B, T] with gradient.
        old_logprobs: [B, T].
        advantages: [B, T]; treated as constants. The paper's are constant along a row.
        mask: [B, T] bool.
        clip_low: In [0, 1].
        clip_high: At least 0.

    Returns:
        Losses [B, T] and a bool [B, T] of the tokens that the clip left without gradient.

    Raises:
        ValueError: If a clip is out of range.

    Source: Zheng et al. (2025), Group Sequence Policy Optimization, equations 5 and 7. The gradient is that of equation 5 for
    token-wise advantages too; the paper's GSPO-token (equation 13), which gives each token its own, is not used.
    """
    _check_clips(clip_low, clip_high)
    total = _log_ratio(policy_logprobs, old_logprobs, mask).sum(dim=1, keepdim=True)
    log_ratio, hit = _bounded((total / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand(mask.shape), mask)
    losses, clipped = _clipped(log_ratio.exp(), advantages.detach(), clip_low, clip_high)
    return losses, (clipped | hit) & mask


def cispo(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """`-clip(r_t, 1 - clip_low, 1 + clip_high) * A_t * log pi`, the clipped ratio being a constant: no token loses its gradient.

    Args:
        policy_logprobs: [B, T] with gradient.
        old_logprobs: [B, T].
        advantages: [B, T]; treated as constants.
        mask: [B, T] bool.
        clip_low: In [0, 1]; the least weight is `1 - clip_low`, so 1 is no lower bound.
        clip_high: At least 0; the largest weight is `1 + clip_high` (some implementations call the cap itself epsilon).

    Returns:
        Losses [B, T] and a bool [B, T] of the tokens whose ratio was clipped.

    Raises:
        ValueError: If a clip is out of range.

    Source: MiniMax (2025), MiniMax-M1, equations 4 and 5 (its runs have no lower bound).
    """
    _check_clips(clip_low, clip_high)
    log_ratio, _ = _bounded(_log_ratio(policy_logprobs, old_logprobs, mask).detach(), mask)
    ratio = log_ratio.exp()
    clipped = ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)) & mask
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages.detach() * policy_logprobs, clipped


def soft_gate(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    gate_positive: float,
    gate_negative: float,
) -> tuple[Tensor, Tensor]:
    """`-(4 / tau) * sigmoid(tau * (r_t - 1)) * A_t`: the gradient fades as the ratio leaves 1, and never ends at an edge.

    `tau` is `gate_positive` where `A_t > 0`, else `gate_negative`. The gradient is that of `-r_t * A_t` times
    `4 * p * (1 - p)` with `p = sigmoid(tau * (r_t - 1))`, which is 1 at `r_t = 1`.

    Args:
        policy_logprobs: [B, T] with gradient.
        old_logprobs: [B, T].
        advantages: [B, T]; treated as constants.
        mask: [B, T] bool.
        gate_positive: Above 0; larger fades sooner.
        gate_negative: Above 0.

    Returns:
        Losses [B, T], and a bool [B, T] of the tokens whose log-ratio hit its bound.

    Raises:
        ValueError: If a gate is not above 0.

    Source: Gao et al. (2025), Soft Adaptive Policy Optimization (SAPO), with 1.0 and 1.05 there.
    """
    if not (gate_positive > 0 and gate_negative > 0):
        raise ValueError(f"gates are {gate_positive} and {gate_negative}; both must be above 0")
    log_ratio, hit = _bounded(_log_ratio(policy_logprobs, old_logprobs, mask), mask)
    advantages = advantages.detach()
    tau = torch.full_like(log_ratio, gate_negative).masked_fill(advantages > 0, gate_positive)
    return -torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau) * advantages, hit


def _log_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    return (policy_logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)


def _bounded(log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept within +-MAX_LOG_RATIO, where the gradient ends; and the tokens that hit it."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), (log_ratio.abs() > MAX_LOG_RATIO) & mask


def _clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """The larger of the two losses, and where it is the clipped one."""
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(plain, bounded), bounded > plain


def _check_clips(clip_low: float, clip_high: float) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}; a ratio is clipped at 1 - clip_low, so it must be between 0 and 1")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}; a ratio is clipped at 1 + clip_high, so it must be at least 0")
