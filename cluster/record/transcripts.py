"""Trajectories written to disk: one Parquet file per step, one row per trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from align.data.types import ScoredGroup

if TYPE_CHECKING:
    from align.learner.learner import UpdateStats


def write(
    path: Path, groups: Sequence[ScoredGroup], tokenizer: Any, step: int, stats: UpdateStats | None = None
) -> None:
    """Write the trajectories of a step; the file appears complete or not at all.

    Per-token columns run over the sampled tokens [C].

    Args:
        path: The file.
        groups: What the step learned from.
        tokenizer: The policy's.
        step: Its number.
        stats: What the update made of them; None before it, and what it adds stays empty.
    """
    rows = [row for group in groups for row in _rows(group, tokenizer, step)]
    masks = [trajectory.loss_mask for group in groups for trajectory in group.group.trajectories]
    for name in ("advantages", "policy_logprobs"):
        values = None if stats is None else getattr(stats, name).cpu().numpy()
        for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            row[name] = None if values is None else values[index, : len(mask)][mask]
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    pyarrow.parquet.write_table(table, aside, compression="zstd")
    aside.replace(path)


def _rows(scored: ScoredGroup, tokenizer: Any, step: int) -> Iterator[dict[str, Any]]:
    ticket = scored.group.ticket
    for repeat, (t, score) in enumerate(zip(scored.group.trajectories, scored.scores, strict=True)):
        mask = t.loss_mask
        completion_ids = t.token_ids[mask]
        yield {
            "step": step,
            "ticket": ticket.number,
            "repeat": repeat,
            "prompt_id": ticket.prompt.id,
            "prompt": ticket.prompt.text,
            "completion": tokenizer.decode(completion_ids.tolist(), skip_special_tokens=True),
            "finish_reason": t.finish_reason.value,
            "seed": t.seed,
            "reward": float(score.rewards.sum()),
            "reward_parts": dict(score.parts) or None,
            "token_ids": completion_ids,
            "behavior_logprobs": t.behavior_logprobs[mask],
            "ref_logprobs": None if score.ref_logprobs is None else score.ref_logprobs[mask],
            "rewards": score.rewards[mask],
            "step_ends": None if score.step_ends is None else score.step_ends[mask],
            "versions": np.concatenate([np.full(s.end - s.start, s.version) for s in t.versions]),
        }
