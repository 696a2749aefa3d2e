"""Which rewards there are: the `[reward]` section of a run file, and what it is made into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from align.choices import choices
from align.data.types import Group, TokenRewards
from align.rewards.exact_match import ExactMatch, ExactMatchConfig
from align.rewards.gym import GymRewardConfig, GymVerifier
from align.rewards.outcome import DEADLINE_S, Decode, Verifier, VerifierReward
from align.rewards.overlong import OverlongConfig, OverlongReward
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig
from align.rewards.reward import Reward


def _reference_unless_named(value: Any) -> Any:
    return {"kind": "reference", **value} if isinstance(value, dict) else value


_BY_KIND = (Field(discriminator="kind"), BeforeValidator(_reference_unless_named))
_SINGLE = {
    "reference": "the reference model's log-probability of each token",
    "exact_match": "1 for an answer that equals the prompt's, else 0",
    "reasoning_gym": "the score that the prompt's own task gives the answer",
    "overlong": "a soft penalty on long completions",
}
SingleConfig = ReferenceRewardConfig | ExactMatchConfig | GymRewardConfig | OverlongConfig


class WeightedConfig(BaseModel):
    """One part of a composite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1.0, allow_inf_nan=False, description="Factor of its token rewards.")
    reward: Annotated[SingleConfig, *_BY_KIND] = Field(
        description=choices(
            "A reward of any other kind, with that kind's keys; without a kind it is reference.", _SINGLE
        )
    )


class CompositeConfig(BaseModel):
    """The weighted sum of other rewards, token by token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["composite"] = Field("composite", description="Kind of the reward.")
    parts: tuple[WeightedConfig, ...] = Field(description="The rewards and their weights.")

    @model_validator(mode="after")
    def _has_parts(self) -> CompositeConfig:
        if not self.parts:
            raise ValueError("a composite without parts pays nothing")
        return self


RewardConfig = SingleConfig | CompositeConfig
KINDS = {**_SINGLE, "composite": "the weighted sum of other rewards"}
"""What each kind pays."""
RewardSection = Annotated[RewardConfig, *_BY_KIND]
"""A `[reward]` section of a run file: `kind` says which of these it is; without one it is the reference model's."""


class CompositeReward:
    """`R_t = sum_i weight_i R_t^i`; the reference's log-probabilities are those of the part that has them.

    Args:
        parts: Weights and rewards.
        names: Of the parts, for what is recorded of them; left out: nothing is.
    """

    def __init__(self, parts: list[tuple[float, Reward]], names: Sequence[str] = ()) -> None:
        self.parts = parts
        self.names = names

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`."""
        weights = [weight for weight, _ in self.parts]
        columns = zip(*(reward(group) for _, reward in self.parts), strict=True)
        return tuple(_weighted_sum(weights, scores, self.names) for scores in columns)


def _weighted_sum(weights: list[float], scores: tuple[TokenRewards, ...], names: Sequence[str]) -> TokenRewards:
    weighted = [np.float32(weight) * score.rewards for weight, score in zip(weights, scores, strict=True)]
    refs = [score.ref_logprobs for score in scores if score.ref_logprobs is not None]
    parts = {name: float(rewards.sum()) for name, rewards in zip(names, weighted, strict=False)}
    failure = next((score.failure for score in scores if score.failure is not None), None)
    total, ends = np.asarray(sum(weighted)), [score.step_ends for score in scores if score.step_ends is not None]
    steps = np.logical_or.reduce([*ends, total != 0]) if ends else None
    return TokenRewards(total, refs[0] if refs else None, step_ends=steps, parts=parts, failure=failure)


def _names(kinds: Sequence[str]) -> list[str]:
    """The kinds; of several parts of one kind the later ones numbered."""
    seen = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    return [f"{kind}_{before + 1}" if before else kind for kind, before in zip(kinds, seen, strict=True)]


class WithReference:
    """Another reward, with what the reference says added, for a KL term or a distillation.

    Args:
        reward: Gives the rewards.
        reference: Gives the log-probabilities.
    """

    def __init__(self, reward: Reward, reference: ReferenceReward) -> None:
        self.reward = reward
        self.reference = reference

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`."""
        pairs = zip(self.reward(group), self.reference(group), strict=True)
        return tuple(replace(score, ref_logprobs=ref.ref_logprobs, ref_top=ref.ref_top) for score, ref in pairs)


def make_reward(
    cfg: RewardConfig,
    decode: Decode,
    reference: Callable[[ReferenceRewardConfig], ReferenceReward],
    deadline_s: float = DEADLINE_S,
) -> Reward:
    """The reward that a `[reward]` section describes.

    Args:
        cfg: The section.
        decode: Sampled tokens to text.
        reference: Makes the reward of the reference model; called only where `reads_reference` is true.
        deadline_s: Time for a verifier to judge one trajectory.
    """
    match cfg:
        case ReferenceRewardConfig():
            return reference(cfg)
        case OverlongConfig():
            return OverlongReward(cfg)
        case CompositeConfig():
            parts = [(part.weight, make_reward(part.reward, decode, reference, deadline_s)) for part in cfg.parts]
            return CompositeReward(parts, _names([part.reward.kind for part in cfg.parts]))
        case ExactMatchConfig() | GymRewardConfig():
            return VerifierReward(_make_verifier(cfg), decode, deadline_s)


def _make_verifier(cfg: ExactMatchConfig | GymRewardConfig) -> Verifier:
    return ExactMatch(cfg) if isinstance(cfg, ExactMatchConfig) else GymVerifier(cfg)


def kinds_in(cfg: RewardConfig) -> Iterator[RewardConfig]:
    """The reward itself, or the parts of a composite."""
    if isinstance(cfg, CompositeConfig):
        yield from (part.reward for part in cfg.parts)
    else:
        yield cfg


def reads_reference(cfg: RewardConfig) -> bool:
    """Whether the reward asks the reference model."""
    return any(isinstance(part, ReferenceRewardConfig) for part in kinds_in(cfg))


def verifier_of(cfg: RewardConfig) -> Verifier | None:
    """What says how right an answer is: the first part that verifies, without its weight; None if no part does."""
    verifying = (part for part in kinds_in(cfg) if isinstance(part, ExactMatchConfig | GymRewardConfig))
    return next(map(_make_verifier, verifying), None)
