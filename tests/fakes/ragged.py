"""Ragged rewards and masks, drawn by Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

NUMBERS = st.floats(-8, 8, width=32)
Ragged = tuple[Tensor, Tensor]


@st.composite
def ragged(draw: st.DrawFn) -> Ragged:
    """Rewards [B, T] in float64 and a mask with holes, ragged ends and rows without any action."""
    num_rows, num_tokens = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    row = st.lists(NUMBERS, min_size=num_tokens, max_size=num_tokens)
    mask = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    rows = [draw(row) for _ in range(num_rows)]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor([draw(mask) for _ in range(num_rows)])
