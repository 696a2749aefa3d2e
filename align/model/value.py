"""A transformer that says what can be expected from a state on, as a number: the network of a critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.model.folder import checked_model_directory
from align.model.precision import autocast


class ValueModel(nn.Module):
    """A transformer's trunk with a linear head of one output, 0 at first: a critic that knows nothing says 0.

    Args:
        trunk: A model whose output has `last_hidden_state` [B, T, H].
        hidden_size: H.
    """

    def __init__(self, trunk: Any, hidden_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def load(cls, directory: Path | str, device: str = "cpu") -> ValueModel:
        """A value model whose trunk has the weights of a causal language model's folder.

        Raises:
            ValueError: If the folder is missing or holds no causal language model.
        """
        from transformers import AutoModel

        trunk = AutoModel.from_pretrained(
            checked_model_directory(directory),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        return cls(trunk.eval(), int(trunk.config.get_text_config().hidden_size)).to(device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Value of the state *after* each token [B, T], the head's product in float32."""
        hidden = self.trunk(input_ids=token_ids, use_cache=False).last_hidden_state
        with torch.autocast(token_ids.device.type, enabled=False):
            values: Tensor = self.head(hidden.float()).squeeze(-1)
        return values

    def values(self, token_ids: Tensor, compute_dtype: str = "float32") -> Tensor:
        """Value of the state that each token is drawn in: the one shift by one, as `Policy.states` has it for the policy.

        Args:
            token_ids: [B, T], right-padded.
            compute_dtype: "float32", or "bfloat16" for the trunk's matrix products (autocast).

        Returns:
            [B, T], indexed by the token; 0 at token 0, which nothing draws.
        """
        with autocast(self.head.weight.device, compute_dtype):
            after = self(token_ids[:, :-1])
        return torch.nn.functional.pad(after, (1, 0))
