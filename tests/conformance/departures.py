"""What a peer does differently, computed again from our parts: the proof that a difference is the one that is named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.conformance.peers import FLOAT32, Differs, Verdict, at


def blown_up_rounding(mask: Tensor, ours: Tensor, theirs: Tensor, epsilon: float, rows: slice) -> Verdict:
    """A group of equal rewards: theirs are what float32 rounds of their mean (an ulp of it or less) over epsilon."""
    constant, rest = theirs[rows][mask[rows]], mask.clone()
    rest[rows] = False
    return Differs(
        "the float32 mean of equal rewards is off by its last bit, which epsilon blows up",
        {"advantages": (at(mask, ours), at(mask, theirs))},
        FLOAT32,
        equal={"the other groups": (at(rest, ours), at(rest, theirs))},
        shown=(not ours[rows].any(), bool((constant != 0).all()), float(constant.abs().max()) * epsilon < 2**-23),
    )


def straight_through_gradient(
    mask: Tensor, logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor | None, parts: dict[str, Any]
) -> Tensor:
    """Gradient by the log-probs of GSPO-token with a mean over trajectories of the mean over their tokens."""
    count = mask.sum(1, keepdim=True)
    ratio = ((logprobs - old).masked_fill(~mask, 0).sum(1, keepdim=True) / count.clamp(min=1)).exp()
    low, high = 1 - parts["clip_low"], 1 + parts["clip_high"]
    free = torch.where(advantages > 0, ratio <= high, ratio >= low)
    coefficients = advantages if weights is None else advantages * weights
    return (-ratio * coefficients * free / (mask.any(1).sum() * count)).masked_fill(~mask, 0.0)


def charged_distance(
    mask: Tensor, logprobs: Tensor, old: Tensor, guarded: Tensor, weights: Tensor | None, coefficient: float
) -> dict[str, Tensor]:
    """What KL-Cov adds to loss and gradient with |log pi - log old| at the guarded tokens, a mean over tokens."""
    leaf = logprobs.clone().requires_grad_()
    distance = coefficient * (leaf - old).abs() * (1.0 if weights is None else weights)
    loss = distance.masked_fill(~guarded, 0.0).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"loss": loss.detach(), "gradient": gradient}


def restarted_returns(rewards: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`G_t = R_t + discount * G_{t+1}` whose memory a column outside the mask wipes."""
    result, running = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + discount * running
        result[:, t] = running
        running = running * mask[:, t]
    return result
