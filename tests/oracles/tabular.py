"""A causal language model without a network: its logits are a table, so that everything about it can be computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class TabularLM(nn.Module):
    """Logits by the tokens that follow the prompt's single token, for `Policy` and so for the real learner.

    The states are numbered as a heap: 0 before the first completion token, and `V * state + 1 + token` after one more.
    States beyond the table share its last row; a table of one row is a bandit, the same distribution everywhere.

    Args:
        table: [states, V] logits; they become the parameter `table`.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.config = SimpleNamespace(vocab_size=table.shape[1])

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [B, K, V] after the tokens at the K positions `logits_to_keep`."""
        num_states, vocab_size = self.table.shape
        states = [torch.zeros_like(input_ids[:, 0])]
        for token in input_ids.T[1:]:
            states.append((vocab_size * states[-1] + 1 + token).clamp(max=num_states - 1))
        return SimpleNamespace(logits=self.table[torch.stack(states, dim=1)[:, logits_to_keep]])
