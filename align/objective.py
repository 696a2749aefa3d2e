"""The objective of an algorithm: how its parts turn a batch into advantages, token losses and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from align import corrections, losses, returns, surrogates
from align.algorithms import AlgorithmConfig
from align.batching import Batch
from align.metrics import Metric
from align.policy import TokenLogprobs


class Objective:
    """Reads an `AlgorithmConfig` and calls the mathematics with its numbers.

    Args:
        cfg: The parts.
    """

    def __init__(self, cfg: AlgorithmConfig) -> None:
        self.cfg = cfg

    @property
    def is_by_token(self) -> bool:
        """Whether `token_losses` of a token depends on nothing of the other tokens but its advantage and weight."""
        cfg = self.cfg
        return cfg.surrogate != "gspo" and (cfg.importance == "none" or cfg.importance_level == "token")

    def advantages(self, batch: Batch) -> tuple[Tensor, list[Metric]]:
        """`A = G - baseline`, scaled and cut as configured. [B, T], 0 outside the loss mask.

        Raises:
            ValueError: If KL is asked for and a token has no reference log-probability.
        """
        mask = batch.loss_mask
        paid, metrics = self._paid_rewards(batch)
        togo = returns.reward_to_go(paid, mask, self.cfg.discount)
        advantages = togo - self._baseline(togo, paid, batch)
        if self.cfg.group_std:
            outcome = returns.outcomes(paid, mask)
            advantages = returns.divide_by_group_std(
                advantages, outcome, mask, batch.group_index, self.cfg.group_std_epsilon
            )
        if self.cfg.whiten:
            advantages = returns.whiten(advantages, mask)
        limit, tokens = self.cfg.max_advantage, batch.num_loss_tokens
        if limit is not None:
            metrics.append(Metric("advantage/clipped_fraction", mean(advantages.abs() > limit, mask), tokens))
            advantages = advantages.clamp(-limit, limit)
        return advantages, [
            *metrics,
            Metric("return/mean", float(togo[mask].mean()), tokens),
            Metric("advantage/std", float(advantages[mask].std(correction=0)), tokens),
        ]

    def _paid_rewards(self, batch: Batch) -> tuple[Tensor, list[Metric]]:
        """The rewards the returns are made of: placed, clipped, less KL. [B, T]."""
        cfg, mask = self.cfg, batch.loss_mask
        outcome = returns.outcomes(batch.rewards, mask)
        metrics = [
            Metric("reward/token_mean", float(batch.rewards[mask].mean()), batch.num_loss_tokens),
            Metric("reward/trajectory_mean", float(outcome.mean()), batch.num_trajectories),
        ]
        given = outcome if cfg.rewards == "outcome" else batch.rewards
        paid = given
        if cfg.reward_range is not None:
            paid = given.clamp(*cfg.reward_range)
            counted = mask.any(dim=1) if cfg.rewards == "outcome" else mask
            metrics.append(Metric("reward/clipped_fraction", mean(paid != given, counted)))
        if cfg.rewards == "outcome":
            paid = returns.on_last_action(paid, mask)
        if cfg.kl == "reward":
            paid = paid - cfg.kl_coefficient * self._kl(batch.behavior_logprobs, batch)
            if cfg.rewards == "outcome":
                paid = returns.on_last_action(returns.outcomes(paid, mask), mask)
        return paid, metrics

    def _baseline(self, togo: Tensor, paid: Tensor, batch: Batch) -> Tensor | float:
        mask, groups = batch.loss_mask, batch.group_index
        match self.cfg.baseline:
            case "none":
                return 0.0
            case "batch_mean":
                return returns.batch_mean(togo, mask)
            case "position_mean":
                return returns.position_mean(togo, mask)
            case "group_mean":
                return returns.group_mean(togo, mask, groups)
            case "group_outcome_mean":
                return returns.group_outcome_mean(returns.outcomes(paid, mask), mask, groups)
            case "leave_one_out":
                return returns.leave_one_out(returns.outcomes(paid, mask), mask, groups)

    def with_loss(self, batch: Batch) -> tuple[Batch, list[Metric]]:
        """The batch with its loss mask cut to the trajectories that carry loss."""
        if not self.cfg.mask_overlong:
            return batch, []
        masked = replace(batch, loss_mask=batch.loss_mask & ~batch.overlong[:, None])
        return masked, [Metric("trajectory/overlong_masked_fraction", float(batch.overlong.float().mean()))]

    def weights(self, batch: Batch) -> Tensor:
        """What each trajectory's token losses are multiplied by, from the whole batch. [B]."""
        return losses.trajectory_weights(self.cfg.aggregation, batch.loss_mask, batch.group_index, self.cfg.loss_length)

    def token_losses(self, part: Batch, output: TokenLogprobs, advantages: Tensor) -> tuple[Tensor, list[Metric]]:
        """Surrogate, KL and entropy of the trajectories of a micro-batch. [B, T], not yet masked or aggregated."""
        cfg, mask, tokens = self.cfg, part.loss_mask, part.num_loss_tokens
        token_losses, clipped = self._surrogate(part, output.logprobs, advantages)
        metrics = [] if clipped is None else [Metric("surrogate/clipped_fraction", mean(clipped, mask), tokens)]
        if cfg.importance != "none":
            weights, outside = corrections.importance_weights(
                output.logprobs,
                part.behavior_logprobs,
                mask,
                level=cfg.importance_level,
                bound=cfg.importance,
                min_weight=cfg.min_importance_weight,
                max_weight=cfg.max_importance_weight,
            )
            token_losses = weights * token_losses
            metrics.append(Metric("importance/weight_mean", mean(weights, mask), tokens))
            metrics.append(Metric("importance/truncated_fraction", mean(outside, mask), tokens))
        if cfg.kl == "loss":
            kl = self._kl(output.logprobs, part)
            token_losses = token_losses + cfg.kl_coefficient * kl
            metrics.append(Metric("kl/policy_reference", mean(kl.detach(), mask), tokens))
        if cfg.entropy_coefficient > 0:
            token_losses = token_losses - cfg.entropy_coefficient * output.entropy
        return token_losses, metrics

    def _surrogate(self, part: Batch, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor | None]:
        cfg, old, mask = self.cfg, part.behavior_logprobs, part.loss_mask
        match cfg.surrogate:
            case "reinforce":
                return surrogates.reinforce(logprobs, advantages), None
            case "importance_weighted":
                return surrogates.importance_weighted(logprobs, old, advantages, mask)
            case "ppo_clip":
                clips = (cfg.clip_low, cfg.clip_high, math.inf if cfg.dual_clip is None else cfg.dual_clip)
                return surrogates.ppo_clip(logprobs, old, advantages, mask, *clips)
            case "gspo":
                return surrogates.gspo(logprobs, old, advantages, mask, cfg.clip_low, cfg.clip_high)
            case "cispo":
                return surrogates.cispo(logprobs, old, advantages, mask, cfg.clip_low, cfg.clip_high)

    def _kl(self, logprobs: Tensor, batch: Batch) -> Tensor:
        if not batch.ref_logprobs[batch.loss_mask].isfinite().all():
            raise ValueError(
                f"algorithm.kl = {self.cfg.kl!r} needs the reference's log-probabilities, which the reward did not give; "
                "use a reward that asks the reference, or set algorithm.kl = 'none'"
            )
        ref = batch.ref_logprobs.where(batch.loss_mask, logprobs.detach())
        return losses.kl_estimate(logprobs, ref, self.cfg.kl_estimator)


def off_policy_metrics(batch: Batch, policy_logprobs: Tensor) -> Iterator[Metric]:
    """How far the policy is from what sampled the batch, over all its loss tokens at once."""
    mask, behavior = batch.loss_mask, batch.behavior_logprobs
    log_ratio = (policy_logprobs - behavior).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    yield Metric("importance/chi_square", corrections.chi_square(policy_logprobs, behavior, mask))
    yield Metric("importance/effective_sample_fraction", corrections.effective_sample_fraction(log_ratio.exp(), mask))


def mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the mask; 0 if it is empty."""
    return float(values[mask].float().mean()) if mask.any() else 0.0
