"""Batches without an engine."""

from __future__ import annotations

import dataclasses
import math

import torch

from align.data.batching import Batch, collate
from align.data.types import FinishReason
from tests.fakes.models import VOCAB_SIZE
from tests.fakes.trajectories import make_scored, make_trajectory

LENGTHS = ((2, 5), (4, 1), (1, 9), (3, 3), (6, 6))
"""Prompt and completion tokens of the trajectories of `ragged_batch`."""


def ragged_batch(seed: int = 0) -> Batch:
    """Five trajectories in three groups, with one hole in a mask and behavior log-probs of no policy in particular."""
    generator = torch.Generator().manual_seed(seed)
    scored = []
    for number, (prompt, completion) in enumerate(LENGTHS):
        ids = torch.randint(3, VOCAB_SIZE, (prompt + completion,), generator=generator).tolist()
        logprobs = (-6 * torch.rand(completion, generator=generator)).tolist()
        rewards = torch.randn(completion, generator=generator).tolist()
        scored.append(make_scored([make_trajectory(ids[:prompt], ids[prompt:], logprobs)], [rewards], number))
    batch = collate(scored)
    batch.loss_mask[2, 4] = False
    return dataclasses.replace(batch, group_index=torch.tensor([0, 0, 1, 1, 2]))


def bandit_batch(actions: list[int], rewards: list[float], behavior: list[float] | None = None) -> Batch:
    return collate([make_scored([make_trajectory([0], actions, behavior)], [rewards])])


def poisoned(batch: Batch, value: float = math.inf) -> Batch:
    bad = dataclasses.replace(batch, rewards=batch.rewards.clone())
    bad.rewards[3, 4] = value
    return bad


def group_batch(seed: int = 0) -> Batch:
    """Two groups of three ragged trajectories, mildly off-policy, with a reference; the last one was cut off by length."""
    generator = torch.Generator().manual_seed(seed)
    scored = []
    for number, lengths in enumerate(((5, 1, 9), (3, 6, 4))):
        trajectories, rewards = [], []
        for completion in lengths:
            ids = torch.randint(3, VOCAB_SIZE, (2 + completion,), generator=generator).tolist()
            logprobs = (-4 * torch.rand(completion, generator=generator)).tolist()
            trajectories.append(make_trajectory(ids[:2], ids[2:], logprobs))
            rewards.append(torch.randn(completion, generator=generator).tolist())
        if number == 1:
            trajectories[-1] = dataclasses.replace(trajectories[-1], finish_reason=FinishReason.LENGTH)
        scored.append(make_scored(trajectories, rewards, number))
    batch = collate(scored)
    ref = batch.behavior_logprobs + 0.5 * torch.randn(batch.rewards.shape, generator=generator)
    return dataclasses.replace(batch, ref_logprobs=ref)


def three_rows(rewards: tuple[list[float], list[float], list[float]]) -> Batch:
    """A group of a trajectory of two tokens and one of one, and one alone of one token, on a bandit."""
    first = make_scored([make_trajectory([0], [1, 2]), make_trajectory([0], [1])], rewards[:2])
    return collate([first, make_scored([make_trajectory([0], [2])], rewards[2:], number=1)])


def batch_of(step: int, num_groups: int = 4) -> Batch:
    """Groups of three ragged trajectories, 3 to 40 tokens; the behavior log-probs are of no policy in particular."""
    generator = torch.Generator().manual_seed(step)
    scored = []
    for number in range(num_groups):
        trajectories, rewards = [], []
        for _ in range(3):
            length = min(int(torch.empty(()).log_normal_(2.3, 0.8, generator=generator)) + 1, 35)
            ids = torch.randint(3, VOCAB_SIZE, (2 + number + length,), generator=generator).tolist()
            logprobs = (-4 * torch.rand(length, generator=generator)).tolist()
            trajectories.append(make_trajectory(ids[:-length], ids[-length:], logprobs, version=step))
            rewards.append(torch.randn(length, generator=generator).tolist())
        scored.append(make_scored(trajectories, rewards, number))
    return collate(scored)
