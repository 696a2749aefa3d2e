"""What a model says next, by a forward pass over the whole prefix: no padding, no packing, no shift."""

from __future__ import annotations

import torch

from align.model.policy import Policy
from tests.oracles import formulas


def naive_distribution(policy: Policy, prefix: list[int], temperature: float = 1.0) -> list[float]:
    """The next token's probabilities after a whole, unpadded prefix."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prefix])).logits[0, -1]
    return formulas.softmax(logits.tolist(), temperature)
