"""Exact match: the answer found in the completion equals the one that came with the prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.data.types import Prompt
from align.rewards.extraction import Extraction


class ExactMatchConfig(Extraction):
    """1 if the completion's answer equals the prompt's after normalisation, else 0; paid at the last sampled token."""

    kind: Literal["exact_match"] = Field("exact_match", description="Kind of the reward.")
    answer: str = Field("answer", description="Column of the prompt's row that holds the right answer.")


class ExactMatch:
    """A `Verifier` that compares with a column of the prompt's metadata.

    `1[normalise(find(completion)) = normalise(metadata[answer])]`, see `Extraction`.

    Args:
        cfg: Where the answers are.
    """

    def __init__(self, cfg: ExactMatchConfig) -> None:
        self.cfg = cfg

    def check(self, prompt: Prompt) -> None:
        """See `Verifier`."""
        if (expected := prompt.metadata.get(self.cfg.answer)) is None:
            raise ValueError(
                f"prompt {prompt.id!r} has no column {self.cfg.answer!r} (reward.answer) to compare with; its row has: "
                f"{', '.join(prompt.metadata) or 'no other column'}"
            )
        try:
            self.cfg.normalise(str(expected))
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}, column {self.cfg.answer!r}: {error}; set reward.extract") from None

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """See `Verifier`."""
        found = self.cfg.find(completion)
        expected = self.cfg.normalise(str(prompt.metadata[self.cfg.answer]))
        return float(found is not None and self.cfg.normalise(found) == expected)
