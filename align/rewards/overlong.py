"""The soft penalty on long completions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.data.types import Group, TokenRewards
from align.rewards.outcome import at_the_end
from align.rules import Rule


class OverlongConfig(BaseModel):
    """0 up to max_tokens - cache_tokens sampled tokens, then linearly down to -1 at max_tokens; paid at the last of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["overlong"] = Field("overlong", description="Kind of the reward.")
    max_tokens: int = Field(
        ge=1, description="Completion length with the whole penalty, e.g. that of sampling.max_tokens."
    )
    cache_tokens: int = Field(ge=1, description="Tokens before max_tokens over which the penalty grows.")

    @model_validator(mode="after")
    def _starts_above_nothing(self) -> OverlongConfig:
        if self.cache_tokens > self.max_tokens:
            raise ValueError(f"cache_tokens ({self.cache_tokens}) is above max_tokens ({self.max_tokens})")
        return self

    def rules_in_a_run(self, max_tokens: int) -> list[Rule]:
        """What the penalty asks of the longest completion, in tokens."""
        free = self.max_tokens - self.cache_tokens
        return [
            (
                free >= max_tokens,
                f"reward 'overlong' begins above {free} tokens, which sampling.max_tokens ({max_tokens}) never lets a completion "
                "reach",
            )
        ]


def overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """`0 if n <= L_max - L_cache; (L_max - L_cache - n) / L_cache up to n = L_max; -1 above`.

    Source: Yu et al. (2025), DAPO, equation 13. The same as what verl adds in its DAPO reward, but for verl's going on
    below -1 where a completion can be longer than L_max.
    """
    free = max_tokens - cache_tokens
    return max(-1.0, min(0.0, (free - num_tokens) / cache_tokens))


class OverlongReward:
    """The penalty as a `Reward`.

    Args:
        cfg: The two lengths.
    """

    def __init__(self, cfg: OverlongConfig) -> None:
        self.cfg = cfg

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`."""
        lengths = (self.cfg.max_tokens, self.cfg.cache_tokens)
        return tuple(at_the_end(t, overlong_penalty(t.num_completion_tokens, *lengths)) for t in group.trajectories)
