"""The tokens that a truncated sampler may choose: top-k first, then top-p of what is left, as the engine does it."""

from __future__ import annotations

import torch
from torch import Tensor

from align.data.sampling import Sampling


def kept_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens top-k and then top-p keep.

    top-k keeps every token whose logit is at least the k-th largest, equal ones included. top-p renormalises over those, adds the
    probabilities up from the smallest, and drops tokens while the sum is at most `1 - top_p`; the likeliest token always stays.
    Of equal probabilities at that edge, sorting decides which one goes.

    Args:
        logits: [N, V], already divided by the temperature.
        sampling: Whose top_k and top_p.

    Returns:
        [N, V] bool.

    Source: vLLM 0.32, `apply_top_k_top_p_pytorch`, whose order and rules for ties these are; top-p: Holtzman et al. (2020), The
    curious case of neural text degeneration.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = logits >= logits.topk(sampling.top_k, dim=-1).values[..., -1:]
    if sampling.top_p < 1:
        ascending, order = logits.masked_fill(~kept, -torch.inf).sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[..., -1] = False
        kept = torch.zeros_like(kept).scatter(-1, order, ~dropped)
    return kept


def restricted(logits: Tensor, token_ids: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The logits with all tokens outside the support at the lowest number, so that a softmax gives them 0.

    A sampled token that is outside the support of these logits stays in it: engine and learner differ by rounding, and a token
    at the edge may fall on either side.

    Args:
        logits: [N, V], already divided by the temperature; with gradient for the tokens that stay.
        token_ids: [N] the sampled tokens.
        sampling: As above.

    Returns:
        Logits [N, V], and a bool [N] of the sampled tokens that were outside.
    """
    kept = kept_tokens(logits.detach(), sampling)
    chosen = token_ids[:, None]
    outside = ~kept.gather(-1, chosen).squeeze(-1)
    kept = kept.scatter(-1, chosen, True)
    return logits.masked_fill(~kept, torch.finfo(logits.dtype).min), outside
