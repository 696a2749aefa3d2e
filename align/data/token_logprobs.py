"""What a policy says of the tokens of a batch: log-probabilities, entropies, and what else was asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Per-token quantities, indexed by the token they are about.

    Attributes:
        logprobs: [B, T] log-probability of each token given those before it; 0 where not wanted.
        entropy: [B, T] entropy in nats of the distribution the token was drawn from; with gradient only on request.
        of_others: [B, T, K] log-probabilities of other tokens at the same places, or None if none were asked for.
        outside: [B, T] bool, tokens outside the support of this policy's own truncated distribution; None if nothing truncates.
    """

    logprobs: Tensor
    entropy: Tensor
    of_others: Tensor | None = None
    outside: Tensor | None = None

    @classmethod
    def at(
        cls,
        places: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        of_others: Tensor | None = None,
        outside: Tensor | None = None,
    ) -> TokenLogprobs:
        """Numbers [M] (of others [M, K]) of the tokens at M places [B, T] bool; 0 elsewhere."""
        blank = torch.zeros(places.shape, device=places.device)
        if of_others is not None:
            empty = blank[..., None].expand(*places.shape, of_others.shape[-1])
            of_others = empty.masked_scatter(places[..., None], of_others)
        return cls(
            blank.masked_scatter(places, logprobs),
            blank.masked_scatter(places, entropy),
            of_others,
            None if outside is None else torch.zeros_like(places).masked_scatter(places, outside),
        )
