"""A critic that is small enough for every test."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from align.learner.critic import Critic, CriticConfig
from align.model.value import ValueModel


class MeanTrunk(nn.Module):
    """A causal trunk without attention: the hidden state is the mean of the embeddings so far and the last one.

    Args:
        vocab_size: V.
        hidden_size: H, even.
    """

    def __init__(self, vocab_size: int, hidden_size: int = 8) -> None:
        super().__init__()
        table = torch.randn(vocab_size, hidden_size // 2, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Hidden states [B, T, H]."""
        embedded = self.table[input_ids]
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(last_hidden_state=torch.cat([embedded.cumsum(dim=1) / count, embedded], dim=-1))


def new_critic(
    vocab_size: int = 64,
    *,
    value_clip: float | None = 0.2,
    max_tokens: int = 10_000,
    warmup_steps: int = 0,
    **optimizer: Any,
) -> Critic:
    """A critic over `MeanTrunk`; equal in every test."""
    cfg = CriticConfig.model_validate({"optimizer": {"lr": 1e-2, **optimizer}, "warmup_steps": warmup_steps})
    model = ValueModel(MeanTrunk(vocab_size), 8)
    return Critic(model, cfg, num_steps=10, value_clip=value_clip, max_tokens=max_tokens)
