"""Scored groups -> one padded Batch -> micro-batches under a token budget, padded (`micro_batches`) or packed (`packing.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from align.data.types import FinishReason, ScoredGroup, TokenRewards, Trajectory


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one update consumes, right-padded to the longest trajectory.

    Padding needs no mask in the model: under causal attention a token never sees what stands to its right.

    Attributes:
        token_ids: [B, T] int64; padding is 0, which is never read.
        lengths: [B] int64 number of real tokens.
        loss_mask: [B, T] bool.
        behavior_logprobs: [B, T] float32.
        rewards: [B, T] float32.
        ref_logprobs: [B, T] float32; NaN where no reference was asked.
        versions: [B, T] int64 policy version that sampled the token; -1 outside `loss_mask`.
        group_index: [B] int64.
        overlong: [B] bool, true where the completion was cut off by length.
        old_logprobs: [B, T] of the policy at the start of the update; the learner puts them there where something reads them.
        old_values: [B, T] the critic's at the start of the update; so too.
        value_targets: [B, T] what the critic learns; so too.
        step_ends: [B, T] bool, the last token of each step; None if every sampled token is a step.
        guarded: [B, T] bool tokens that an entropy guard holds; None without one.
        ref_top_ids: [B, T, K] int64 tokens that the reference ranks highest; None if that was not asked.
        ref_top_logprobs: [B, T, K] float32 their log-probabilities; 0 outside `loss_mask`.
    """

    token_ids: Tensor
    lengths: Tensor
    loss_mask: Tensor
    behavior_logprobs: Tensor
    rewards: Tensor
    ref_logprobs: Tensor
    versions: Tensor
    group_index: Tensor
    overlong: Tensor
    old_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    value_targets: Tensor | None = None
    step_ends: Tensor | None = None
    guarded: Tensor | None = None
    ref_top_ids: Tensor | None = None
    ref_top_logprobs: Tensor | None = None

    @property
    def num_trajectories(self) -> int:
        """B."""
        return self.token_ids.shape[0]

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.loss_mask.sum())

    def rows(self, index: Sequence[int] | slice) -> Batch:
        """The given trajectories, cut to the longest of them."""
        rows = index if isinstance(index, slice) else torch.as_tensor(index, dtype=torch.long)
        longest = int(self.lengths[rows].max())
        picked = {name: tensor[rows] for name, tensor in self.tensors()}
        return Batch(**{k: v[:, :longest] if v.dim() > 1 else v for k, v in picked.items()})

    def without_loss(self) -> Batch:
        """The same trajectories with no token that carries loss."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))

    def tokens(self) -> Batch:
        """Its M loss tokens, row by row, each as a trajectory of its own: [M, 1]. For what depends on single tokens alone."""
        row, _ = self.loss_mask.nonzero(as_tuple=True)
        picked = {k: v[self.loss_mask][:, None] if v.dim() > 1 else v[row] for k, v in self.tensors()}
        return Batch(**picked | {"lengths": torch.ones_like(row)})

    def save(self, path: Path) -> None:
        """Write all tensors as safetensors, by their names here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors()}, path)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is there, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ((name, tensor) for name, tensor in named if tensor is not None)


def collate(groups: Sequence[ScoredGroup]) -> Batch:
    """Stack the trajectories of all groups, in order.

    Raises:
        ValueError: If there is no trajectory.
    """
    rows = [
        (index, trajectory, score)
        for index, scored in enumerate(groups)
        for trajectory, score in zip(scored.group.trajectories, scored.scores, strict=True)
    ]
    if not rows:
        raise ValueError("a batch needs at least one trajectory")
    lengths = [len(trajectory.token_ids) for _, trajectory, _ in rows]
    shape = (len(rows), max(lengths))
    arrays = {
        "token_ids": np.zeros(shape, np.int64),
        "loss_mask": np.zeros(shape, np.bool_),
        "behavior_logprobs": np.zeros(shape, np.float32),
        "rewards": np.zeros(shape, np.float32),
        "ref_logprobs": np.full(shape, np.nan, np.float32),
        "versions": np.full(shape, -1, np.int64),
    }
    for row, (_, trajectory, score) in enumerate(rows):
        end = lengths[row]
        arrays["token_ids"][row, :end] = trajectory.token_ids
        arrays["loss_mask"][row, :end] = trajectory.loss_mask
        arrays["behavior_logprobs"][row, :end] = trajectory.behavior_logprobs
        arrays["rewards"][row, :end] = score.rewards
        if score.ref_logprobs is not None:
            arrays["ref_logprobs"][row, :end] = score.ref_logprobs
        for span in trajectory.versions:
            arrays["versions"][row, span.start : span.end] = span.version
    arrays |= _asked_for(rows, shape)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    group_index = torch.tensor([index for index, _, _ in rows])
    overlong = torch.tensor([trajectory.finish_reason is FinishReason.LENGTH for _, trajectory, _ in rows])
    return Batch(lengths=torch.tensor(lengths), group_index=group_index, overlong=overlong, **tensors)


def _asked_for(rows: Sequence[tuple[int, Trajectory, TokenRewards]], shape: tuple[int, int]) -> dict[str, Any]:
    """Arrays of what only some rewards give: step ends if any gives them, the reference's likeliest tokens if all do.

    Raises:
        ValueError: If some trajectories have the likeliest tokens and others have not.
    """
    arrays: dict[str, Any] = {}
    if any(score.step_ends is not None for _, _, score in rows):
        arrays["step_ends"] = np.zeros(shape, np.bool_)
        for row, (_, trajectory, score) in enumerate(rows):
            ends = trajectory.loss_mask if score.step_ends is None else score.step_ends & trajectory.loss_mask
            arrays["step_ends"][row, : len(ends)] = ends
    tops = [score.ref_top for _, _, score in rows if score.ref_top is not None]
    if not tops:
        return arrays
    if len(tops) != len(rows):
        raise ValueError(
            f"{len(tops)} of {len(rows)} trajectories have the reference's likeliest tokens; all or none must"
        )
    shape_k = (*shape, tops[0].token_ids.shape[1])
    arrays["ref_top_ids"] = np.zeros(shape_k, np.int64)
    arrays["ref_top_logprobs"] = np.zeros(shape_k, np.float32)
    for row, ((_, trajectory, _), top) in enumerate(zip(rows, tops, strict=True)):
        sampled = np.flatnonzero(trajectory.loss_mask)
        arrays["ref_top_ids"][row, sampled] = top.token_ids
        arrays["ref_top_logprobs"][row, sampled] = top.logprobs
    return arrays


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut trajectories into micro-batches whose padded size (rows times longest) is at most `max_tokens`.

    Sorting by length first keeps padding small. A trajectory longer than the budget gets a micro-batch of its own. The
    cut depends on the lengths alone, so the same batch is always cut the same way.

    Returns:
        Lists of row numbers; each row appears exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    result: list[list[int]] = []
    for row in order:
        if result and lengths[result[-1][0]] * (len(result[-1]) + 1) <= max_tokens:
            result[-1].append(row)
        else:
            result.append([row])
    return result
