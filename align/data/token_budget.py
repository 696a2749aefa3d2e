"""The tokens of a forward pass, and how trajectories are cut into passes of at most so many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.data.batching import micro_batches
from align.data.packing import pack


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many tokens a forward pass takes, and whether padding is among them.

    Attributes:
        max_tokens: Tokens of a pass; a longer trajectory has one of its own.
        packs: Whether the trajectories of a pass share one row without padding, or have a padded row each.
    """

    max_tokens: int
    packs: bool

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Trajectories of these lengths into micro-batches of their numbers; see `pack` and `micro_batches`."""
        return (pack if self.packs else micro_batches)(lengths, self.max_tokens)
