"""The peers' numbers, and ours for the same inputs by way of an `AlgorithmConfig`: what is compared is what a run file sets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.algorithm import losses
from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch
from align.data.token_logprobs import TokenLogprobs
from align.metrics import Metric

NUMBERS = Path(__file__).parent / "numbers"
PEERS = ("verl", "trl", "openrlhf")
EXACT, WITH_EPSILON, FLOAT32 = 1e-12, 1e-7, 1e-6
"""Relative tolerances: the same float64 formula; one that adds 1e-8 to a denominator; float32 somewhere."""

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One stored call of a peer's function."""

    id: str
    function: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    outputs: dict[str, Any]

    def input(self, name: str) -> Tensor:
        """An input as a tensor, in the type that the peer was given."""
        return resolve(self.inputs[name], self.dtype)

    def mask(self, name: str) -> Tensor:
        """An input as a mask."""
        return self.input(name) > 0

    def index(self, name: str) -> Tensor:
        """An input as group numbers."""
        return self.input(name).long()

    def output(self, name: str) -> Tensor:
        """What the peer gave, in float64."""
        return torch.tensor(self.outputs[name], dtype=torch.float64)

    def metric(self, name: str) -> Tensor:
        """One of the peer's metrics."""
        return torch.tensor(self.outputs["metrics"][name], dtype=torch.float64)

    @property
    def dtype(self) -> torch.dtype:
        """What the peer's function got."""
        return torch.float32 if self.params.get("input_dtype") == "f32" else torch.float64


@dataclass(frozen=True)
class Equal:
    """Ours and theirs, by name, are the same to a relative tolerance."""

    pairs: Pairs
    tolerance: float


@dataclass(frozen=True)
class Differs:
    """Ours and theirs are not the same, for a reason that is shown.

    Attributes:
        reason: What they do.
        pairs: Ours and theirs, which must be apart.
        explained: Theirs again, computed from our parts and the departure that `reason` names.
        tolerance: Between `explained` and theirs.
        equal: What is the same all the same.
        shown: Claims about theirs that take the place of `explained` where it cannot be recomputed (rounding).
    """

    reason: str
    pairs: Pairs
    tolerance: float = EXACT
    explained: Mapping[str, Tensor] = field(default_factory=dict)
    equal: Pairs = field(default_factory=dict)
    shown: tuple[bool, ...] = ()


@dataclass(frozen=True)
class NotOffered:
    """We have nothing to compare, for this reason."""

    reason: str


Verdict = Equal | Differs | NotOffered


@cache
def cases(peer: str) -> list[Case]:
    """All stored cases of a peer."""
    stored = json.loads((NUMBERS / f"{peer}.json").read_text(encoding="utf-8"))
    return [Case(c["id"], c["function"], c["params"], c.get("inputs", {}), c.get("outputs", {})) for c in stored]


@cache
def inputs() -> dict[str, dict[str, Any]]:
    """The arrays that cases name."""
    content: dict[str, dict[str, Any]] = json.loads((NUMBERS / "inputs.json").read_text(encoding="utf-8"))
    return content


def resolve(spec: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """`set.name`, with what the stored sentences do to it, or literal numbers."""
    if not isinstance(spec, str):
        return torch.as_tensor(spec, dtype=dtype)
    if " - " in spec:
        left, right = spec.split(" - ")
        return resolve(left, dtype) - resolve(right, dtype)
    if spec.endswith(" placed on the last valid token, zero elsewhere"):
        mask = resolve("shared.mask") > 0
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        return last.to(dtype) * resolve(spec.split(" ")[0], dtype)[:, None]
    if spec.startswith("first column of shared.is_weights"):
        return resolve("shared.is_weights", dtype)[:, :1]
    group, name = spec.removesuffix(" (broadcast over tokens)").split(".")
    values = torch.tensor(inputs()[group][name], dtype=dtype)
    return values[:, None].expand(12, 9) if spec.endswith("tokens)") else values


# --- ours --------------------------------------------------------------------------------------------------------


def batch_of(
    mask: Tensor,
    rewards: Tensor | None = None,
    behavior: Tensor | None = None,
    ref: Tensor | None = None,
    group_index: Tensor | None = None,
) -> Batch:
    """A batch with these numbers; zeros where a test has none."""
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    return Batch(
        token_ids=torch.zeros(mask.shape, dtype=torch.long),
        lengths=torch.full((len(mask),), mask.shape[1]),
        loss_mask=mask,
        behavior_logprobs=zeros if behavior is None else behavior,
        rewards=zeros if rewards is None else rewards,
        ref_logprobs=torch.full_like(zeros, math.nan) if ref is None else ref,
        versions=torch.zeros(mask.shape, dtype=torch.long),
        group_index=torch.zeros(len(mask), dtype=torch.long) if group_index is None else group_index,
        overlong=torch.zeros(len(mask), dtype=torch.bool),
    )


def advantages_of(batch: Batch, **parts: Any) -> Tensor:
    """Our advantages [B, T] under these parts, in float64."""
    return Objective(AlgorithmConfig(**parts)).advantages(batch)[0].double()


def whole_batch_weights(objective: Objective, mask: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """Weights of the rows of `mask` as part of a batch with this many rows and tokens in all."""
    rows, tokens = num_rows - int(mask.any(1).sum()), num_tokens - int(mask.sum())
    rest = torch.zeros(rows, tokens, dtype=torch.bool)
    rest[:, 0] = True
    rest[0, : tokens - rows + 1] = True
    wide = torch.zeros(len(mask), tokens, dtype=torch.bool)
    wide[:, : mask.shape[1]] = mask
    return objective.weights(batch_of(torch.cat([wide, rest])))[: len(mask)]


def loss_of(
    mask: Tensor,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    ref: Tensor | None = None,
    entropies: Tensor | None = None,
    weights: Tensor | None = None,
    rollout: Tensor | None = None,
    whole: tuple[int, int] | None = None,
    guarded: Tensor | None = None,
    **parts: Any,
) -> dict[str, Tensor]:
    """Our loss, its gradient by the log-probs, the shares of clipped and rejected tokens, and the guarded ones.

    Args:
        mask, logprobs, old, advantages: [B, T].
        ref: [B, T] for the KL term.
        entropies: [B, T] for the entropy bonus.
        weights: [B, T] or [B, 1] given importance weights.
        rollout: [B, T] of the sampler, where `old` is a policy between: decoupled PPO.
        whole: Rows and tokens of the whole batch that these rows are part of.
        guarded: [B, T] tokens that an entropy guard holds in place of those that ours chooses.
        parts: Of the algorithm.
    """
    batch = batch_of(mask, behavior=old, ref=ref)
    if rollout is not None:
        batch = replace(batch, behavior_logprobs=rollout, old_logprobs=old)
        parts["proximal"] = "recomputed"
    objective = Objective(AlgorithmConfig(**{"importance": "none", **parts}))
    batch, _ = objective.with_guard(batch, advantages.expand(mask.shape))
    if guarded is not None:
        batch = replace(batch, guarded=guarded)
    leaf = logprobs.clone().requires_grad_()
    output = TokenLogprobs(leaf, torch.zeros_like(leaf) if entropies is None else entropies)
    token_losses, metrics = objective.token_losses(batch, output, advantages.expand(mask.shape))
    if weights is not None:
        token_losses = token_losses * weights
    row_weights = objective.weights(batch) if whole is None else whole_batch_weights(objective, mask, *whole)
    loss = losses.aggregate(token_losses, mask, row_weights)
    loss.backward()
    assert leaf.grad is not None
    return {
        "loss": loss.detach(),
        "gradient": leaf.grad,
        "clipped": share(metrics, "surrogate/clipped_fraction"),
        "rejected": share(metrics, "importance/truncated_fraction"),
        "guarded": torch.zeros_like(mask) if batch.guarded is None else batch.guarded,
    }


def share(metrics: list[Metric], name: str) -> Tensor:
    """A metric's value, 0 if it is not there."""
    return torch.tensor(next((m.value for m in metrics if m.name == name), 0.0)).double()


def scaled(result: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Loss and gradient times a number."""
    return {name: result[name] * factor for name in ("loss", "gradient")}


def at(mask: Tensor, values: Tensor) -> Tensor:
    """The values where the mask is, in float64: what stands at padding is nobody's business."""
    return values.double().expand(mask.shape)[mask]


def whole_mean(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """Our aggregate of a matrix of losses."""
    weights = losses.trajectory_weights(how, mask, torch.zeros(len(mask), dtype=torch.long))
    return losses.aggregate(values, mask, weights)
