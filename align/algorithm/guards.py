"""Entropy guards: which tokens a covariance singles out, because raising them would cost the most entropy.

Pure functions of tensors. The selection is made once for a whole batch, from the log-probabilities at sampling time, so that
micro-batches change nothing.

Source: Cui et al. (2025), The entropy mechanism of reinforcement learning for reasoning language models: the entropy falls with
the covariance of log-probability and advantage. Departs from the authors' code (as in verl) in three ways. There the covariance
is taken within each micro-batch and with the current log-probabilities, which on-policy are those at sampling time. Clip-Cov
draws its tokens at random from a band, where these are the ones of highest covariance in it, so that a run can be repeated.
KL-Cov charges |log pi - log mu|, whose slope stays 1 however small the distance is, where here it is the k3 estimate of the
paper's KL(mu || pi), which ignores rounding between engine and learner.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """`(log mu_t - mean log mu) * (A_t - mean A)`, the means over all tokens of the mask. [B, T], 0 outside the mask.

    Its mean over the tokens is the covariance of log-probability and advantage.

    Args:
        logprobs: [B, T] at sampling time.
        advantages: [B, T].
        mask: [B, T] bool.

    Source: Cui et al. (2025), equation 10.
    """
    centred = [
        (values.double() - values[mask].double().mean()).masked_fill(~mask, 0.0) for values in (logprobs, advantages)
    ]
    return centred[0] * centred[1]


def highest(covariance: Tensor, mask: Tensor, fraction: float, least: float, largest: float) -> Tensor:
    """The `max(1, floor(fraction * tokens))` tokens of highest covariance among those strictly between two bounds.

    Of equal covariances the earlier token is taken.

    Args:
        covariance: [B, T].
        mask: [B, T] bool.
        fraction: Of the tokens of the mask, in (0, 1].
        least: -inf for none.
        largest: inf for none.

    Returns:
        [B, T] bool.

    Raises:
        ValueError: If the fraction is out of range.

    Source: Cui et al. (2025): KL-Cov takes the highest of all tokens (2e-3 and 2e-4 of them for 7B and 32B), Clip-Cov some of a
    band (2e-4, between 1 and 5).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
    eligible = mask & (covariance > least) & (covariance < largest)
    wanted = max(1, int(fraction * int(mask.sum())))
    ranked = torch.sort(covariance[eligible], descending=True, stable=True).indices[:wanted]
    chosen = torch.zeros_like(covariance[eligible], dtype=torch.bool)
    chosen[ranked] = True
    result = torch.zeros_like(mask)
    result[eligible] = chosen
    return result
