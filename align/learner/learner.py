"""The learner: one batch in, one Adam step on the policy (or several, with inner epochs), statistics out.

The gradient is that of the mission: `sum_t grad log pi(a_t | s_t) * A_t`, added up over all samples, divided by a global
denominator (1 for the plain sum), with the advantage `A_t = G_t - baseline`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective, off_policy_metrics
from align.data.batching import Batch
from align.data.sampling import PLAIN, Sampling
from align.data.token_budget import TokenBudget
from align.learner.critic import Critic, critic_metrics
from align.learner.epochs import minibatches, old_logprobs
from align.learner.gradient import Gradient, distances
from align.learner.optimizer import Optimizer, OptimizerConfig
from align.learner.shares import passes
from align.metrics import Metric
from align.model.head import MAX_LOGITS_BYTES
from align.model.policy import Policy
from align.rules import Rule


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
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray sets aside for every rank of the learner.")
    num_threads: int = Field(1, ge=1, description="CPU threads of every rank of the learner.")
    num_gpus: int = Field(0, ge=0, le=1, description="GPUs of every rank of the learner.")
    num_ranks: int = Field(
        1,
        ge=1,
        description="Processes that share the learner: each holds a shard of the weights and trains on its share.",
    )
    max_skipped_updates: int = Field(3, ge=1, description="Non-finite updates in a row that stop the run.")

    def rules_in_a_run(self, fewest_trajectories: int) -> list[Rule]:
        """What ranks ask of a run in which every step trains at least so many trajectories."""
        return [
            (
                self.num_ranks > fewest_trajectories,
                f"learner.num_ranks ({self.num_ranks}) is above the {fewest_trajectories} trajectories of a step "
                "(two of a group where a verifier may fail on the others): some ranks would have nothing to train on",
            ),
            (
                self.num_ranks > 1 and not (self.num_cpus or self.num_gpus),
                "learner.num_ranks above 1 needs learner.num_cpus or num_gpus above 0, by which Ray places the ranks",
            ),
        ]


class NonFiniteUpdates(RuntimeError):
    """Several updates in a row were not finite."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one update did.

    Attributes:
        metrics: Parts of metrics, to be reduced.
        num_loss_tokens: Tokens that carried loss.
        skipped: True if loss or gradient of an optimizer step was not finite, and it left everything as it was.
        advantages: [B, T] of the batch.
        policy_logprobs: [B, T] when the trajectory's first optimizer step began; NaN where no loss was.
    """

    metrics: list[Metric]
    num_loss_tokens: int
    skipped: bool
    advantages: Tensor
    policy_logprobs: Tensor


class Learner:
    """Holds the policy and Adam; `update` learns from one batch.

    Args:
        policy: The network being trained.
        algorithm: How rewards become a gradient.
        optimizer: Adam and its schedule.
        cfg: Memory and speed.
        num_steps: Length of the run, for the schedule.
        sampling: What the batches are sampled from; log-probabilities are those of this distribution.
        critic: What `baseline = "critic"` asks for, and nothing else.

    Raises:
        ValueError: If the algorithm needs a critic and there is none, or the other way round.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        cfg: LearnerConfig,
        num_steps: int,
        sampling: Sampling = PLAIN,
        critic: Critic | None = None,
    ) -> None:
        if (algorithm.baseline == "critic") != (critic is not None):
            raise ValueError(f"baseline = {algorithm.baseline!r} {'needs a' if critic is None else 'reads no'} critic")
        self.policy = policy
        self.critic = critic
        policy.max_logits_bytes = cfg.max_logits_bytes
        if cfg.activation_checkpointing:
            policy.trunk.checkpoint_activations()
        self.objective = Objective(algorithm)
        self.optimizer = Optimizer(policy.model, optimizer, num_steps)
        self.cfg = cfg
        self.sampling = sampling
        self.version = 0
        self.policy_is_version = True  # false between the first optimizer step of a batch and the last
        self.skipped_in_a_row = 0
        self.skipped_updates = 0

    def update(self, batch: Batch) -> UpdateStats:
        """Learn from one batch; afterwards `version` is one higher, however many optimizer steps that took.

        A batch has `num_epochs * num_minibatches` optimizer steps, each with the denominators of its own trajectories. Where
        loss or gradient of one (of the policy's or the critic's) is not finite, weights, both optimizers and the KL coefficient
        stay bitwise as they were, and it is counted.

        Raises:
            NonFiniteUpdates: After `max_skipped_updates` batches in a row with such a step.
            ValueError: If KL is asked for and the batch has no reference log-probabilities, or for too many minibatches.
        """
        started = time.perf_counter()
        batch = batch.to(self.policy.device)
        if self.critic is not None:
            batch = replace(batch, old_values=self.critic.values(batch))
        advantages, metrics = self.objective.advantages(batch)
        unmasked = batch
        batch, mask_metrics = self._with_old(batch)
        batch, guard_metrics = self.objective.with_guard(batch, advantages)
        metrics += [*mask_metrics, *guard_metrics]
        cfg, finite, trained = self.objective.cfg, [], torch.zeros_like(batch.overlong)
        policy_logprobs = torch.full_like(batch.behavior_logprobs, math.nan)
        for rows in minibatches(batch.num_trajectories, cfg.num_epochs, cfg.num_minibatches, self.version):
            part = batch.rows(rows)
            longest = part.token_ids.shape[1]
            step_metrics, is_finite, logprobs = self._inner_step(part, advantages[rows, :longest])
            seen = policy_logprobs[rows, :longest]
            policy_logprobs[rows, :longest] = logprobs.where(part.loss_mask & seen.isnan(), seen)
            metrics += step_metrics
            finite.append(is_finite)
            trained[rows] |= is_finite
        if len(finite) > 1:
            metrics.append(Metric("optimizer/inner_steps", sum(finite)))
        if all(finite):
            metrics += self.objective.adapt_kl(unmasked)
        lr = self._finish(all(finite))
        metrics += [
            Metric("optimizer/lr", lr),
            Metric("tokens/trained", int(batch.loss_mask[trained].sum())),
            Metric("optimizer/skipped_updates", self.skipped_updates),
            Metric("throughput/trained_tokens_per_s", int(batch.lengths.sum()) / (time.perf_counter() - started)),
        ]
        metrics = [m for m in metrics if math.isfinite(m.value)]
        return UpdateStats(metrics, batch.num_loss_tokens, not all(finite), advantages, policy_logprobs)

    def _with_old(self, batch: Batch) -> tuple[Batch, list[Metric]]:
        """The batch as the optimizer steps see it: its loss mask, and what critic and policy say before the first of them."""
        cfg, metrics = self.objective.cfg, []
        if self.critic is not None:
            batch = replace(batch, value_targets=self.objective.value_targets(batch))
            metrics = critic_metrics(batch)
        batch, mask_metrics = self.objective.with_loss(batch)
        if cfg.proximal == "recomputed" and cfg.num_epochs * cfg.num_minibatches > 1:
            old = old_logprobs(self.policy, batch, self.budget, self.sampling)
            batch = replace(batch, old_logprobs=old)
        return batch, [*metrics, *mask_metrics]

    def _inner_step(self, part: Batch, advantages: Tensor) -> tuple[list[Metric], bool, Tensor]:
        """One optimizer step of the policy, and of the critic; neither is applied unless both gradients are finite."""
        metrics, logprobs = self._accumulate(part, advantages)
        grad_norm = self.optimizer.clip()
        metrics.append(Metric("optimizer/grad_norm", grad_norm))
        if self.critic is not None:
            of_critic, critic_norm = self.critic.accumulate(part)
            metrics += of_critic
            grad_norm += critic_norm
        losses_finite = all(math.isfinite(m.value) for m in metrics if m.name in ("optimizer/loss", "critic/loss"))
        finite = math.isfinite(grad_norm) and losses_finite
        if finite:
            self._step()
        self.optimizer.zero_grad()
        if self.critic is not None:
            self.critic.optimizer.zero_grad()
        return metrics, finite, logprobs

    def _accumulate(self, batch: Batch, advantages: Tensor) -> tuple[list[Metric], Tensor]:
        """Forward and backward over the micro-batches; gradients add up under the global denominator.

        Returns:
            The metrics, and the policy's log-probabilities of the whole batch [B, T].
        """
        self.optimizer.zero_grad()
        budget, own_version = self.budget, self.version if self.policy_is_version else None
        gradient = Gradient(self.policy, self.objective, self.sampling, self.version, packs=budget.packs)
        weights = self.objective.weights(batch)
        policy_logprobs = torch.zeros_like(batch.behavior_logprobs)
        metrics: list[Metric] = []
        computed = torch.zeros((), dtype=torch.int64)
        for one in passes(self.policy.ranks, batch.lengths.tolist(), budget.cut):
            part = batch.rows(one.rows) if one.counts else batch.rows(one.rows).without_loss()
            longest = part.token_ids.shape[1]
            output, of_part = gradient.add(part, advantages[one.rows, :longest], weights[one.rows])
            computed += int(part.lengths.sum()) if budget.packs else part.token_ids.numel()
            if one.counts:
                policy_logprobs[one.rows, :longest] = output.logprobs
                metrics += [*of_part, *distances(part, output, own_version)]
        gathered = list(self.policy.ranks.gather_metrics(metrics))
        padding = 1 - int(batch.lengths.sum()) / int(self.policy.ranks.sum(computed))
        policy_logprobs = self.policy.ranks.sum(policy_logprobs)
        of_batch = [Metric("throughput/padding_fraction", padding), *off_policy_metrics(batch, policy_logprobs)]
        return [*gathered, *of_batch], policy_logprobs

    @property
    def budget(self) -> TokenBudget:
        """Of one forward pass."""
        return TokenBudget(self.cfg.max_tokens_per_micro_batch, self.cfg.packing and self.policy.trunk.packs)

    def _step(self) -> None:
        """Apply Adam to the policy, unless only the critic is to learn yet, and to the critic."""
        if not self._critic_only:
            self.optimizer.step(self.version + 1)
            self.policy_is_version = False
        if self.critic is not None:
            self.critic.optimizer.step(self.version + 1)

    @property
    def _critic_only(self) -> bool:
        return self.critic is not None and self.version < self.critic.cfg.warmup_steps

    def _finish(self, finite: bool) -> float:
        """Count the batch as a version, whether or not all of its steps were finite; returns the learning rate it had."""
        lr = 0.0 if self._critic_only else self.optimizer.lr(self.version + 1)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_updates += not finite
        self.version += 1
        self.policy_is_version = True
        if self.skipped_in_a_row >= self.cfg.max_skipped_updates:
            raise NonFiniteUpdates(
                f"{self.skipped_in_a_row} updates in a row were not finite (limit learner.max_skipped_updates); "
                "lower optimizer.lr, or look at the rewards of the last steps"
            )
        return lr

    def save_optimizer(self, path: Path) -> None:
        """Write the optimizer's state with the skipped updates and the KL coefficient, and the critic beside it.

        Of many ranks all take part and the first writes.
        """
        state = (self.skipped_updates, self.skipped_in_a_row, self.objective.kl_coefficient)
        first = self.policy.ranks.first
        self.optimizer.save(path, torch.tensor(state, dtype=torch.float64), write=first)
        if self.critic is not None and first:
            self.critic.save(path.parent)

    def load_optimizer(self, path: Path, version: int) -> None:
        """Take up what `save_optimizer` wrote, at policy version `version`.

        Raises:
            ValueError: If the file holds state of a parameter that the policy does not train, or there is no critic where one
                is needed.
        """
        skipped_updates, skipped_in_a_row, self.objective.kl_coefficient = self.optimizer.load(path).tolist()
        self.skipped_updates, self.skipped_in_a_row = int(skipped_updates), int(skipped_in_a_row)
        if self.critic is not None:
            self.critic.load(path.parent)
        self.version = version
