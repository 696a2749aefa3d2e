"""The critic: a model of its own that says what the policy can expect from a state on, and its Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.algorithm import losses, returns
from align.data.batching import Batch, micro_batches
from align.learner.optimizer import Optimizer, OptimizerConfig
from align.metrics import Metric
from align.model.value import ValueModel


class CriticConfig(BaseModel):
    """The model that `algorithm.baseline = "critic"` learns values with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = Field(
        None, description="Hugging Face folder that its trunk starts from; left out: the policy's first weights."
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Its own Adam, schedule and gradient clip.")
    warmup_steps: int = Field(0, ge=0, description="First steps of the run that train the critic and leave the policy.")


class Critic:
    """A value model with its own Adam.

    It is a model of its own, as in InstructGPT. A head on the policy's trunk is not offered: its loss would pull at the weights
    that are published, by a coefficient that is one more thing to tune, and adapters or a frozen trunk would leave it without
    features; what it saves is memory.

    Args:
        model: The value model; its parameters are the master weights.
        cfg: Its optimizer and warm-up.
        num_steps: Length of the run, for the schedule.
        value_clip: See `losses.value_loss`; None for no limit.
        max_tokens: Padded tokens per forward pass.
        compute_dtype: "float32", or "bfloat16" for the trunk's matrix products (autocast).
    """

    def __init__(
        self,
        model: ValueModel,
        cfg: CriticConfig,
        num_steps: int,
        *,
        value_clip: float | None,
        max_tokens: int,
        compute_dtype: str = "float32",
    ) -> None:
        self.model = model
        self.cfg = cfg
        self.optimizer = Optimizer(model, cfg.optimizer, num_steps)
        self.value_clip = math.inf if value_clip is None else value_clip
        self.max_tokens = max_tokens
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Value of the state that each token was drawn in, under the critic as it is. [B, T], 0 at token 0 and at padding."""
        result = torch.zeros_like(batch.rewards)
        for rows in micro_batches(batch.lengths.tolist(), self.max_tokens):
            part = batch.rows(rows)
            result[rows, : part.token_ids.shape[1]] = self.model.values(part.token_ids, self.compute_dtype)
        return result.masked_fill(~_real(batch), 0.0)

    def accumulate(self, batch: Batch) -> tuple[list[Metric], float]:
        """Gradient of the mean value loss over the loss tokens of a minibatch; metrics and the gradient's norm before clipping.

        Raises:
            ValueError: If the batch has no old values and targets.
        """
        if batch.old_values is None or batch.value_targets is None:
            raise ValueError("the critic learns from old values and targets; put them into the batch first")
        self.optimizer.zero_grad()
        metrics: list[Metric] = []
        num_tokens = max(batch.num_loss_tokens, 1)
        for rows in micro_batches(batch.lengths.tolist(), self.max_tokens):
            metrics += self._backward(batch.rows(rows), num_tokens)
        grad_norm = self.optimizer.clip()
        return [*metrics, Metric("critic/grad_norm", grad_norm)], grad_norm

    def _backward(self, part: Batch, num_tokens: int) -> Iterator[Metric]:
        assert part.old_values is not None
        assert part.value_targets is not None
        mask, tokens = part.loss_mask, part.num_loss_tokens
        values = self.model.values(part.token_ids, self.compute_dtype)
        token_losses, clipped = losses.value_loss(values, part.old_values, part.value_targets, mask, self.value_clip)
        weights = torch.full((part.num_trajectories,), 1 / num_tokens, device=values.device)
        losses.aggregate(token_losses, mask, weights).backward()  # type: ignore[no-untyped-call]
        if tokens:
            yield Metric("critic/loss", float(token_losses.detach()[mask].mean()), tokens)
            yield Metric("critic/clipped_fraction", float(clipped[mask].float().mean()), tokens)

    def save(self, directory: Path) -> None:
        """Write weights and Adam's state into the folder of a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, _weights(directory))
        self.optimizer.save(_adam(directory), torch.zeros(1))

    def load(self, directory: Path) -> None:
        """Take up what `save` wrote.

        Raises:
            ValueError: If the checkpoint holds no critic, or another one.
        """
        if not _weights(directory).is_file():
            raise ValueError(f"the checkpoint {directory} holds no critic; it was written by a run without one")
        try:
            self.model.load_state_dict(load_file(_weights(directory)))
        except RuntimeError as error:
            raise ValueError(f"the critic in {directory} is not of this run's [critic] model: {error}") from None
        self.optimizer.load(_adam(directory))


def critic_metrics(batch: Batch) -> list[Metric]:
    """How good the critic was before it learned from the batch."""
    assert batch.old_values is not None
    assert batch.value_targets is not None
    mask, tokens = batch.loss_mask, batch.num_loss_tokens
    explained = returns.explained_variance(batch.old_values, batch.value_targets, mask)
    return [
        Metric("critic/explained_variance", explained, tokens),
        Metric("critic/value_mean", float(batch.old_values[mask].mean()), tokens),
    ]


def _real(batch: Batch) -> Tensor:
    """[B, T] bool, the tokens that are not padding."""
    return torch.arange(batch.token_ids.shape[1], device=batch.lengths.device) < batch.lengths[:, None]


def _weights(directory: Path) -> Path:
    return directory / "critic.safetensors"


def _adam(directory: Path) -> Path:
    return directory / "critic_optimizer.safetensors"
