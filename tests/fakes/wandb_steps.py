"""Steps on disk whose trajectories can be told by their letters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from cluster.record import transcripts


class Letters:
    """Token n is the n-th letter."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def write_step(folder: Path, step: int, rewards: list[float], version: int, parts: bool = False) -> Path:
    """One group; trajectory k answers with two tokens and is paid `rewards[k]` for each."""
    span = VersionSpan(version, 0, 2)
    answers = [
        Trajectory.from_completion([8], [k, k], [-1.0, -1.0], [span], FinishReason.STOP, seed=k)
        for k in range(len(rewards))
    ]
    scores = [TokenRewards(np.array([0, reward, reward], np.float32)) for reward in rewards]
    if parts:
        scores = [replace(score, parts={"exact_match": 1.0, "overlong": -0.5}) for score in scores]
    group = Group(Ticket(42, Prompt("p", "question", (8,)), tuple(range(len(rewards)))), tuple(answers))
    path = folder / f"step_{step:05d}.parquet"
    transcripts.write(path, [ScoredGroup(group, tuple(scores))], Letters(), step)
    return path
