"""The learner: one batch in, one Adam step on the policy, statistics out.

The gradient is that of the mission: `sum_t grad log pi(a_t | s_t) * A_t`, added up over all samples, divided by a global
denominator (1 for the plain sum), with the advantage `A_t = G_t - baseline`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from align import losses
from align.algorithms import AlgorithmConfig
from align.batching import Batch, micro_batches
from align.head import MAX_LOGITS_BYTES
from align.metrics import Metric
from align.objective import Objective, mean, off_policy_metrics
from align.optimizer import Optimizer, OptimizerConfig
from align.packing import pack
from align.policy import Policy, TokenLogprobs


class LearnerConfig(BaseModel):
    """Memory and speed; none of it changes the gradient."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens_per_micro_batch: int = Field(8192, ge=1, description="Tokens per forward pass on one device.")
    packing: bool = Field(
        True,
        description="Put trajectories into one row without padding; a model that cannot be packed is padded, and says so.",
    )
    max_logits_bytes: int = Field(
        MAX_LOGITS_BYTES, ge=1, description="Logits held at a time; the rest is never there at once."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: a third more work, far less memory."
    )
    deterministic: bool = Field(
        False,
        description="Refuse operations whose result may differ from run to run (some are slower, some raise). A CPU gives equal "
        "bits without it, at equal num_threads.",
    )
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray sets aside for the learner.")
    num_threads: int = Field(1, ge=1, description="CPU threads of the learner.")
    num_gpus: int = Field(0, ge=0, le=1, description="GPUs of the learner.")
    max_skipped_updates: int = Field(3, ge=1, description="Non-finite updates in a row that stop the run.")


class NonFiniteUpdates(RuntimeError):
    """Several updates in a row were not finite."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one update did.

    Attributes:
        metrics: Parts of metrics, to be reduced.
        num_loss_tokens: Tokens that carried loss.
        skipped: True if loss or gradient was not finite and the weights were left as they were.
    """

    metrics: list[Metric]
    num_loss_tokens: int
    skipped: bool


class Learner:
    """Holds the policy and Adam; `update` applies one step.

    Args:
        policy: The network being trained.
        algorithm: How rewards become a gradient.
        optimizer: Adam and its schedule.
        cfg: Memory and speed.
        num_steps: Length of the run, for the schedule.
        temperature: The sampler's temperature; log-probabilities are taken at it.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        cfg: LearnerConfig,
        num_steps: int,
        temperature: float = 1.0,
    ) -> None:
        self.policy = policy
        policy.max_logits_bytes = cfg.max_logits_bytes
        if cfg.activation_checkpointing:
            policy.trunk.checkpoint_activations()
        self.objective = Objective(algorithm)
        self.optimizer = Optimizer(policy.model, optimizer, num_steps)
        self.cfg = cfg
        self.temperature = temperature
        self.version = 0
        self.skipped_in_a_row = 0
        self.skipped_updates = 0

    def update(self, batch: Batch) -> UpdateStats:
        """One policy-gradient step; afterwards `version` is one higher.

        If loss or gradient is not finite the weights and the optimizer stay bitwise unchanged, and the step is counted.

        Ratios of policy and behaviour are taken before the step, so they are 1 on-policy: a batch has one step.

        Raises:
            NonFiniteUpdates: After `max_skipped_updates` such steps in a row.
            ValueError: If KL is asked for and the batch has no reference log-probabilities.
        """
        started = time.perf_counter()
        batch = batch.to(self.policy.device)
        advantages, metrics = self.objective.advantages(batch)
        batch, mask_metrics = self.objective.with_loss(batch)
        metrics += [*mask_metrics, *self._accumulate(batch, advantages)]
        grad_norm = self.optimizer.clip()
        finite = math.isfinite(grad_norm) and all(math.isfinite(m.value) for m in metrics if m.name == "optimizer/loss")
        lr = self._step(finite)
        elapsed = time.perf_counter() - started
        metrics += [
            Metric("optimizer/grad_norm", grad_norm),
            Metric("optimizer/lr", lr),
            Metric("tokens/trained", batch.num_loss_tokens if finite else 0),
            Metric("optimizer/skipped_updates", self.skipped_updates),
            Metric("throughput/trained_tokens_per_s", int(batch.lengths.sum()) / elapsed),
        ]
        return UpdateStats([m for m in metrics if math.isfinite(m.value)], batch.num_loss_tokens, not finite)

    def _accumulate(self, batch: Batch, advantages: Tensor) -> Iterator[Metric]:
        """Forward and backward over the micro-batches; gradients add up under the global denominator."""
        self.optimizer.zero_grad()
        weights = self.objective.weights(batch)
        policy_logprobs = torch.zeros_like(batch.behavior_logprobs)
        computed = 0
        for rows in self._micro_batches(batch.lengths.tolist()):
            part = batch.rows(rows)
            longest = part.token_ids.shape[1]
            logprobs, metrics = self._backward(part, advantages[rows, :longest], weights[rows])
            policy_logprobs[rows, :longest] = logprobs
            computed += int(part.lengths.sum()) if self._packs else part.token_ids.numel()
            yield from metrics
        yield Metric("throughput/padding_fraction", 1 - int(batch.lengths.sum()) / computed)
        yield from off_policy_metrics(batch, policy_logprobs)

    @property
    def _packs(self) -> bool:
        return self.cfg.packing and self.policy.trunk.packs

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        return (pack if self._packs else micro_batches)(lengths, self.cfg.max_tokens_per_micro_batch)

    def _backward(self, part: Batch, advantages: Tensor, weights: Tensor) -> tuple[Tensor, list[Metric]]:
        """Add the gradient of one micro-batch; returns its log-probabilities [B, T]."""
        mask = part.loss_mask
        states = self.policy.states(part.token_ids, mask, part.lengths if self._packs else None)
        compute = self._loss_by_token if self.objective.is_by_token else self._loss_by_trajectory
        loss, output, metrics = compute(states, part, advantages, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        logprobs = output.logprobs.detach()
        return logprobs, [*metrics, *self._statistics(part, logprobs, output.entropy.detach())]

    def _loss_by_token(
        self, states: Tensor, part: Batch, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, TokenLogprobs, list[Metric]]:
        """The loss whose gradient is formed as the log-probabilities are computed, chunk by chunk of tokens."""
        metrics: list[Metric] = []
        mask, tokens = part.loss_mask, part.tokens()
        advantages, weights = advantages[mask][:, None], weights.repeat_interleave(mask.sum(dim=1))

        def loss(chunk: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
            output = TokenLogprobs(logprobs[:, None], entropy[:, None])
            value, found = self._loss(tokens.rows(chunk), output, advantages[chunk], weights[chunk])
            metrics.extend(found)
            return value

        targets = part.token_ids[mask]
        total, logprobs, entropy = self.policy.head.token_loss(states, targets, loss, temperature=self.temperature)
        return total, TokenLogprobs.at(mask, logprobs, entropy), metrics

    def _loss_by_trajectory(
        self, states: Tensor, part: Batch, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, TokenLogprobs, list[Metric]]:
        """The loss that needs all log-probabilities of a trajectory before its gradient is known."""
        mask = part.loss_mask
        values = self.policy.head.logprobs(states, part.token_ids[mask], temperature=self.temperature)
        output = TokenLogprobs.at(mask, *values)
        loss, metrics = self._loss(part, output, advantages, weights)
        return loss, output, metrics

    def _loss(
        self, part: Batch, output: TokenLogprobs, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Metric]]:
        mask = part.loss_mask
        token_losses, metrics = self.objective.token_losses(part, output, advantages)
        metrics.append(Metric("optimizer/loss", mean(token_losses.detach(), mask), part.num_loss_tokens))
        return losses.aggregate(token_losses, mask, weights), metrics

    def _statistics(self, part: Batch, logprobs: Tensor, entropy: Tensor) -> Iterator[Metric]:
        mask, behavior = part.loss_mask, part.behavior_logprobs
        tokens = int(mask.sum())
        yield Metric("policy/entropy", float(entropy[mask].mean()), tokens)
        kl = losses.kl_estimate(behavior, logprobs, "k3")
        yield Metric("kl/policy_behavior", float(kl[mask].mean()), tokens)
        referenced = mask & part.ref_logprobs.isfinite()
        if referenced.any():
            kl = losses.kl_estimate(behavior, part.ref_logprobs, "k1")
            yield Metric("kl/behavior_reference", float(kl[referenced].mean()), int(referenced.sum()))
        own = mask & (part.versions == self.version)
        if own.any():
            mismatch = (behavior - logprobs)[own].abs()
            yield Metric("mismatch/abs_mean", float(mismatch.mean()), int(own.sum()))
            yield Metric("mismatch/abs_max", float(mismatch.max()))

    def _step(self, finite: bool) -> float:
        """Apply Adam if the gradient is finite; either way the version counts one update."""
        step = self.version + 1
        if finite:
            self.optimizer.step(step)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_updates += not finite
        self.version += 1
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= self.cfg.max_skipped_updates:
            raise NonFiniteUpdates(
                f"{self.skipped_in_a_row} updates in a row were not finite (limit learner.max_skipped_updates); "
                "lower optimizer.lr, or look at the rewards of the last steps"
            )
        return self.optimizer.lr(step)

    def save_optimizer(self, path: Path) -> None:
        """Write the optimizer's state and the skipped updates."""
        self.optimizer.save(path, torch.tensor([self.skipped_updates, self.skipped_in_a_row]))

    def load_optimizer(self, path: Path, version: int) -> None:
        """Take up what `save_optimizer` wrote, at policy version `version`.

        Raises:
            ValueError: If the file holds state of a parameter that the policy does not train.
        """
        self.skipped_updates, self.skipped_in_a_row = self.optimizer.load(path).tolist()
        self.version = version
