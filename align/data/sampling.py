"""The distribution that completions are sampled from, as engine, learner and head have to agree on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature first, then top-k and top-p of what is left, renormalised.

    Attributes:
        temperature: What logits are divided by, above 0.
        top_k: Most likely tokens; 0 for all.
        top_p: Nucleus of what top_k keeps, in (0, 1]; 1 for all.

    Raises:
        ValueError: If a limit is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k} and top_p {self.top_p}; top_k is at least 0, top_p above 0 and at most 1"
            )

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be sampled."""
        return self.top_k > 0 or self.top_p < 1


PLAIN = Sampling()
"""The model's own distribution: temperature 1, every token."""
