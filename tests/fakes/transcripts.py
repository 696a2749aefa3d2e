"""A group on disk: two trajectories, one stale and one fresh, with what a reference says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from cluster.record import transcripts


class FakeTokenizer:
    """Token 0 is special, the others are letters."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Their letters."""
        assert skip_special_tokens
        return "".join(chr(ord("a") + token) for token in token_ids if token)


def _trajectory(completion: list[int], spans: list[VersionSpan], reason: FinishReason, seed: int) -> Trajectory:
    logprobs = [-0.5 * (i + 1) for i in range(len(completion))]
    return Trajectory.from_completion([8, 9], completion, logprobs, spans, reason, seed)


def scored_group(with_reference: bool = True) -> ScoredGroup:
    """Ticket 42: a long trajectory of versions 4 and 5, and a short one of version 5."""
    prompt = Prompt("p-1", "ij", (8, 9))
    long = _trajectory([1, 2, 3], [VersionSpan(4, 0, 1), VersionSpan(5, 1, 3)], FinishReason.LENGTH, seed=11)
    short = _trajectory([7, 0], [VersionSpan(5, 0, 2)], FinishReason.STOP, seed=12)
    scores = []
    for one in (long, short):
        rewards = np.where(one.loss_mask, np.arange(len(one.token_ids)), 0).astype(np.float32)
        scores.append(TokenRewards(rewards, -rewards if with_reference else None))
    return ScoredGroup(Group(Ticket(42, prompt, (11, 12)), (long, short)), tuple(scores))


def written(path: Path, *groups: ScoredGroup) -> list[dict[str, Any]]:
    """The rows of the groups, as they are on disk."""
    transcripts.write(path, groups, FakeTokenizer(), step=6)
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows
