"""The tokens that a truncated sampler may choose: top-k first, then top-p of what is left, as the engine does it."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_tokens(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Which tokens top-k and then top-p keep.

    top-k keeps every token whose logit is at least the k-th largest, equal ones included. top-p renormalises over those, adds the
    probabilities up from the smallest, and drops tokens while the sum is at most `1 - top_p`; the likeliest token always stays.
    Of equal probabilities at that edge, sorting decides which one goes.

    Args:
        logits: [N, V], already divided by the temperature.
        top_k: Most likely tokens; 0 for all.
        top_p: In (0, 1]; 1 for all.

    Returns:
        [N, V] bool.

    Raises:
        ValueError: If a limit is out of range.

    Source: vLLM 0.32, `apply_top_k_top_p_pytorch`, whose order and rules for ties these are; top-p: Holtzman et al. (2020), The
    curious case of neural text degeneration.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; top_k is at least 0, top_p above 0 and at most 1")
    kept = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        kept = logits >= logits.topk(top_k, dim=-1).values[..., -1:]
    if top_p < 1:
        ascending, order = logits.masked_fill(~kept, -torch.inf).sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        kept = torch.zeros_like(kept).scatter(-1, order, ~dropped)
    return kept


def restricted(logits: Tensor, token_ids: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The logits with all tokens outside the support at the lowest number, so that a softmax gives them 0.

    A sampled token that is outside the support of these logits stays in it: engine and learner differ by rounding, and a token
    at the edge may fall on either side.

    Args:
        logits: [N, V], already divided by the temperature; with gradient for the tokens that stay.
        token_ids: [N] the sampled tokens.
        top_k: As above.
        top_p: As above.

    Returns:
        Logits [N, V], and a bool [N] of the sampled tokens that were outside.
    """
    kept = kept_tokens(logits.detach(), top_k, top_p)
    chosen = token_ids[:, None]
    outside = ~kept.gather(-1, chosen).squeeze(-1)
    kept = kept.scatter(-1, chosen, True)
    return logits.masked_fill(~kept, torch.finfo(logits.dtype).min), outside
