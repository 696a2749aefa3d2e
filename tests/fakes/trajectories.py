"""Trajectories and groups without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan


def make_trajectory(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], logprobs: Sequence[float] | None = None, version: int = 0
) -> Trajectory:
    """A finished trajectory of one policy version."""
    spans = [VersionSpan(version, 0, len(completion_ids))]
    logprobs = [-1.0] * len(completion_ids) if logprobs is None else logprobs
    return Trajectory.from_completion(prompt_ids, completion_ids, logprobs, spans, FinishReason.STOP, seed=0)


def make_group(trajectories: Sequence[Trajectory], number: int = 0) -> Group:
    """A group of the given trajectories."""
    prompt = Prompt(f"prompt-{number}", "", (1,))
    return Group(Ticket(number, prompt, tuple(range(len(trajectories)))), tuple(trajectories))


def make_scored(
    trajectories: Sequence[Trajectory], completion_rewards: Sequence[Sequence[float]], number: int = 0
) -> ScoredGroup:
    """A group whose sampled tokens have the given rewards."""
    scores = []
    for trajectory, values in zip(trajectories, completion_rewards, strict=True):
        rewards = np.zeros(len(trajectory.token_ids), np.float32)
        rewards[trajectory.loss_mask] = values
        scores.append(TokenRewards(rewards))
    return ScoredGroup(make_group(trajectories, number), tuple(scores))
