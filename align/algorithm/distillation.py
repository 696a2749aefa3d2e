"""Divergences of the policy's next-token distribution from the reference's, over the tokens that the reference ranks highest.

Pure functions of tensors. Log-probabilities come for K tokens per position. What both distributions give to all other tokens
together is treated as the probability of one more token, the *rest*: the divergence is that of the two so merged distributions.
Merging outcomes never raises an f-divergence, so this is a lower bound that grows with K, and where the K tokens are the whole
vocabulary it is exact (the rest is then the rounding of a sum). Dropping the rest instead, as verl does, would make a loss that
can fall below 0, and that rewards or punishes moving probability out of the K tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("reverse_kl", "forward_kl", "jensen_shannon")


def divergence(logprobs: Tensor, ref_logprobs: Tensor, kind: str, mixture: float = 0.5) -> Tensor:
    """Divergence at each position, with the gradient by the policy's log-probabilities at that position alone.

    With p the policy and q the reference: `reverse_kl` is `sum_v p log(p / q)`, `forward_kl` is `sum_v q log(q / p)`, and
    `jensen_shannon` is `b * KL(q || m) + (1 - b) * KL(p || m)` with `m = b * q + (1 - b) * p` and b the mixture: divided by b or
    by `1 - b` it tends to the forward or the reverse KL as b tends to 0 or 1. That the policy chose the states is not
    differentiated.

    Args:
        logprobs: [..., K] of the policy at the K tokens, with gradient.
        ref_logprobs: [..., K] of the reference at the same tokens.
        kind: `reverse_kl`, `forward_kl` or `jensen_shannon`.
        mixture: b, in (0, 1).

    Returns:
        [...] nats, at least 0 up to rounding.

    Raises:
        ValueError: If the kind is unknown or the mixture out of range.

    Source: Agarwal et al. (2023), On-policy distillation of language models (GKD), equation 1 and section 3.
    """
    if not 0 < mixture < 1:
        raise ValueError(f"mixture is {mixture}; it must be between 0 and 1")
    logprobs, ref_logprobs = with_rest(logprobs), with_rest(ref_logprobs.detach())
    match kind:
        case "reverse_kl":
            return _kl(logprobs, ref_logprobs)
        case "forward_kl":
            return _kl(ref_logprobs, logprobs)
        case "jensen_shannon":
            mixed = torch.logaddexp(ref_logprobs + math.log(mixture), logprobs + math.log1p(-mixture))
            return mixture * _kl(ref_logprobs, mixed) + (1 - mixture) * _kl(logprobs, mixed)
    raise ValueError(f"unknown divergence {kind!r}; choose {', '.join(KINDS)}")


def with_rest(logprobs: Tensor) -> Tensor:
    """The log-probabilities [..., K] with that of all other tokens together appended: `log(1 - sum_k p_k)`. [..., K + 1].

    A rest below the machine epsilon is taken to be that, without gradient.
    """
    rest = 1 - logprobs.exp().sum(dim=-1, keepdim=True)
    return torch.cat([logprobs, rest.clamp(min=torch.finfo(logprobs.dtype).eps).log()], dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`sum_v p_v (log p_v - log q_v)`."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
