"""The scoring functions of `reasoning-gym`, for prompts that its generators made (see `align.data.tasks`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from align.data.tasks import reasoning_gym
from align.data.types import Prompt
from align.rewards.extraction import Extraction


class GymRewardConfig(Extraction):
    """The score, 0 to 1, that the prompt's own task gives the completion's answer; paid at the last sampled token."""

    kind: Literal["reasoning_gym"] = Field("reasoning_gym", description="Kind of the reward.")


class GymVerifier:
    """A `Verifier` that asks `score_answer` of the generator which made the prompt.

    Args:
        cfg: Where the answer is in the completion.
    """

    def __init__(self, cfg: GymRewardConfig) -> None:
        self.cfg = cfg

    def check(self, prompt: Prompt) -> None:
        """See `Verifier`."""
        if not isinstance(prompt.metadata.get("entry"), dict):
            raise ValueError(
                f"prompt {prompt.id!r} was not made by reasoning-gym, so nothing can score its answers; use "
                "prompts.tasks with generator = 'reasoning_gym', or reward.kind = 'exact_match'"
            )

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """See `Verifier`."""
        entry: Any = prompt.metadata["entry"]
        return float(_score_function(entry["metadata"]["source_dataset"])(self.cfg.find(completion), entry))


@functools.cache
def _score_function(dataset: str) -> Callable[[str | None, Any], float]:
    score: Callable[[str | None, Any], float] = reasoning_gym().get_score_answer_fn(dataset)
    return score
