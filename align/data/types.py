"""The data that flows through a run: Prompt -> Trajectory -> Group -> ScoredGroup -> Batch.

Shapes are written in brackets: B trajectories, T tokens (prompt and completion), G group size, V vocabulary.

Alignment of indices, stated once: every per-token array is indexed by the token it is *about*. `behavior_logprobs[t]` is
the log-probability of `token_ids[t]` given the tokens before it. Position 0 is given by nobody and is never in `loss_mask`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens or the context was reached
    ABORT = "abort"  # cut short by the engine; never trained on


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with its metadata, already tokenized.

    Attributes:
        id: Stable name of the prompt, unique within its source.
        text: What the model reads, after template and system prompt.
        token_ids: `text` as tokens; at least one.
        metadata: The other columns of the source row (answers, tags).
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} has no tokens; give it some text")


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to roll out one prompt once.

    Attributes:
        number: Position in the run's prompt order, counted from 0 over all epochs; unique within a run.
        prompt: The prompt.
        seeds: One sampling seed per trajectory of the group [G].
    """

    number: int
    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `start <= t < end` of a trajectory were sampled by policy version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode: the prompt's tokens followed by the sampled ones.

    Attributes:
        token_ids: [T] prompt and completion.
        loss_mask: [T] true for the tokens that carry loss (the sampled ones); position 0 never.
        behavior_logprobs: [T] log-probability under the distribution that sampled the token; 0 outside `loss_mask`.
        versions: Which policy version sampled which tokens, in order; together they cover the sampled tokens.
        finish_reason: Why the completion ended.
        seed: The sampling seed.
    """

    token_ids: IntArray
    loss_mask: BoolArray
    behavior_logprobs: FloatArray
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    seed: int

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids)
        for name in ("loss_mask", "behavior_logprobs"):
            if getattr(self, name).shape != (num_tokens,):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, token_ids has {num_tokens} tokens")
        if num_tokens and self.loss_mask[0]:
            raise ValueError("position 0 is in loss_mask, but nothing predicts the first token")
        stamped = [t for span in self.versions for t in range(span.start, span.end)]
        if stamped != np.flatnonzero(self.loss_mask).tolist():
            raise ValueError(
                f"version spans {self.versions} do not cover the {int(self.loss_mask.sum())} sampled tokens"
            )

    @property
    def num_completion_tokens(self) -> int:
        """Number of sampled tokens."""
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled a token of this trajectory."""
        return min(span.version for span in self.versions)

    @staticmethod
    def from_completion(
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        completion_logprobs: Sequence[float],
        completion_versions: Sequence[VersionSpan],
        finish_reason: FinishReason,
        seed: int,
    ) -> Trajectory:
        """Join a prompt and its completion; spans count from the first completion token and are shifted here."""
        start, end = len(prompt_ids), len(prompt_ids) + len(completion_ids)
        loss_mask = np.zeros(end, dtype=np.bool_)
        loss_mask[start:] = True
        behavior_logprobs = np.zeros(end, dtype=np.float32)
        behavior_logprobs[start:] = completion_logprobs
        return Trajectory(
            token_ids=np.asarray([*prompt_ids, *completion_ids], dtype=np.int64),
            loss_mask=loss_mask,
            behavior_logprobs=behavior_logprobs,
            versions=tuple(VersionSpan(s.version, s.start + start, s.end + start) for s in completion_versions),
            finish_reason=finish_reason,
            seed=seed,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The G trajectories of one ticket."""

    ticket: Ticket
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        if len(self.trajectories) != len(self.ticket.seeds):
            raise ValueError(f"{len(self.trajectories)} trajectories for {len(self.ticket.seeds)} seeds")


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The tokens that a distribution ranks highest, for each of the C sampled tokens of a trajectory.

    Attributes:
        token_ids: [C, K], likeliest first.
        logprobs: [C, K] their log-probabilities.
    """

    token_ids: Int32Array
    logprobs: FloatArray


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """What a Reward gives one trajectory.

    Attributes:
        rewards: [T] reward of each token; 0 outside `loss_mask`.
        ref_logprobs: [T] log-probability under the reference, or None if no reference was asked; 0 outside `loss_mask`.
        ref_top: What the reference ranks highest, or None if that was not asked.
        step_ends: [T] bool, the last token of each step that a process reward judged; None if every sampled token is a step.
        parts: Sum of the weighted token rewards of each part of a composite reward, by its kind; empty for others.
        failure: Traceback of a reward that failed on this trajectory, which is then not trained; None if it was judged.
    """

    rewards: FloatArray
    ref_logprobs: FloatArray | None = None
    ref_top: TopTokens | None = None
    step_ends: BoolArray | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with the rewards of each of its trajectories."""

    group: Group
    scores: tuple[TokenRewards, ...]

    def __post_init__(self) -> None:
        for trajectory, score in zip(self.group.trajectories, self.scores, strict=True):
            if score.rewards.shape != trajectory.token_ids.shape:
                raise ValueError(f"rewards of shape {score.rewards.shape} for {trajectory.token_ids.shape} tokens")
            if not np.isfinite(score.rewards).all():
                raise ValueError(f"prompt {self.group.ticket.prompt.id!r}: a reward is not finite")
            if score.step_ends is not None and (score.rewards[~score.step_ends] != 0).any():
                raise ValueError(f"prompt {self.group.ticket.prompt.id!r}: a token that ends no step has a reward")

    def judged(self) -> ScoredGroup:
        """The group as if the trajectories whose reward failed had never been sampled."""
        kept = [index for index, score in enumerate(self.scores) if score.failure is None]
        if len(kept) == len(self.scores):
            return self
        ticket = replace(self.group.ticket, seeds=tuple(self.group.ticket.seeds[i] for i in kept))
        group = Group(ticket, tuple(self.group.trajectories[i] for i in kept))
        return ScoredGroup(group, tuple(self.scores[i] for i in kept))
