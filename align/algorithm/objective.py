"""The objective of an algorithm: how its parts turn a batch into advantages, token losses and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from align.algorithm import corrections, distillation, guards, losses, returns, surrogates
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch
from align.data.token_logprobs import TokenLogprobs
from align.metrics import Metric


class Objective:
    """Reads an `AlgorithmConfig` and calls the mathematics with its numbers.

    Args:
        cfg: The parts.
    """

    def __init__(self, cfg: AlgorithmConfig) -> None:
        self.cfg = cfg
        self.kl_coefficient = cfg.kl_coefficient

    @property
    def is_by_token(self) -> bool:
        """Whether `token_losses` of a token depends on nothing of the other tokens but its advantage and weight."""
        cfg = self.cfg
        by_trajectory = cfg.surrogate == "gspo" or (cfg.importance != "none" and cfg.importance_level != "token")
        return not by_trajectory and cfg.distillation == "none" and cfg.supervised_min_outcome is None

    def advantages(self, batch: Batch) -> tuple[Tensor, list[Metric]]:
        """`A = G - baseline`, scaled and cut as configured. [B, T], 0 outside the loss mask.

        Raises:
            ValueError: If KL is asked for and a token has no reference log-probability.
        """
        mask = batch.loss_mask
        paid, metrics = self._paid_rewards(batch)
        if self.cfg.baseline == "critic":
            advantages, togo = self._gae(paid, batch)
        else:
            togo = returns.reward_to_go(paid, mask, self.cfg.discount)
            advantages = togo - self._baseline(togo, paid, batch)
        if self.cfg.group_std and self.cfg.rewards != "process":
            outcome = returns.outcomes(paid, mask)
            advantages = returns.divide_by_group_std(
                advantages, outcome, mask, batch.group_index, self.cfg.group_std_epsilon
            )
        if self.cfg.batch_std:
            advantages = returns.divide_by_batch_std(advantages, mask)
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
        given = {"outcome": outcome, "none": torch.zeros_like(batch.rewards)}.get(cfg.rewards, batch.rewards)
        paid = given
        if cfg.reward_range is not None:
            paid = given.clamp(*cfg.reward_range)
            counted = {"outcome": mask.any(dim=1), "process": _steps(batch)}.get(cfg.rewards, mask)
            metrics.append(Metric("reward/clipped_fraction", mean(paid != given, counted)))
        if cfg.rewards == "outcome":
            paid = returns.on_last_action(paid, mask)
        if cfg.rewards == "process":
            groups, epsilon = batch.group_index, cfg.group_std_epsilon
            paid = returns.group_relative_steps(paid, _steps(batch), groups, cfg.group_std, epsilon)
        if cfg.kl == "reward":
            paid = paid - self.kl_coefficient * self._kl(batch.behavior_logprobs, batch)
            if cfg.rewards == "outcome":
                paid = returns.on_last_action(returns.outcomes(paid, mask), mask)
        return paid, metrics

    def value_targets(self, batch: Batch) -> Tensor:
        """What the critic learns: GAE's advantage, neither whitened nor cut, plus the old value. [B, T]."""
        return self._gae(self._paid_rewards(batch)[0], batch)[1]

    def _gae(self, paid: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.old_values is None or self.cfg.gae_lambda is None:
            raise ValueError(
                "baseline = 'critic' needs the critic's values of the batch; a learner with a critic has them"
            )
        return returns.gae(paid, batch.old_values, batch.loss_mask, self.cfg.discount, self.cfg.gae_lambda)

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
        raise ValueError(f"baseline {self.cfg.baseline!r} is no function of the returns")

    def with_loss(self, batch: Batch) -> tuple[Batch, list[Metric]]:
        """The batch with its loss mask cut to the trajectories that carry loss."""
        if not self.cfg.mask_overlong:
            return batch, []
        masked = replace(batch, loss_mask=batch.loss_mask & ~batch.overlong[:, None])
        return masked, [
            Metric("trajectory/overlong_masked_fraction", float(batch.overlong.float().mean())),
            Metric("tokens/masked", batch.num_loss_tokens - masked.num_loss_tokens),
        ]

    def with_guard(self, batch: Batch, advantages: Tensor) -> tuple[Batch, list[Metric]]:
        """The batch with the tokens that the entropy guard holds, chosen from all of it."""
        cfg, mask = self.cfg, batch.loss_mask
        if cfg.entropy_guard == "none" or not mask.any():
            return batch, []
        covariance = guards.token_covariance(batch.behavior_logprobs, advantages, mask)
        band = cfg.guard_band if cfg.entropy_guard == "clip_cov" else (-math.inf, math.inf)
        guarded = guards.highest(covariance, mask, cfg.guard_fraction, *band)
        return replace(batch, guarded=guarded), [
            Metric("guard/covariance", mean(covariance, mask)),
            Metric("guard/token_fraction", mean(guarded, mask)),
        ]

    def weights(self, batch: Batch) -> Tensor:
        """What each trajectory's token losses are multiplied by, from the whole batch. [B]."""
        return losses.trajectory_weights(self.cfg.aggregation, batch.loss_mask, batch.group_index, self.cfg.loss_length)

    def token_losses(
        self, part: Batch, output: TokenLogprobs, advantages: Tensor, version: int = 0
    ) -> tuple[Tensor, list[Metric]]:
        """Surrogate, KL and entropy of the trajectories of a micro-batch. [B, T], not yet masked or aggregated.

        With a proximal policy of its own the loss is `w * surrogate(pi / prox)`, with `w` the bounded `prox / mu` if `importance`
        asks for it: decoupled PPO of Hilton et al. (2021), Batch size-invariance for policy optimization, section 3.

        Args:
            part: The micro-batch.
            output: The policy's log-probabilities and entropies of it.
            advantages: [B, T].
            version: The learner's policy version; `proximal = "interpolated"` reads it.
        """
        cfg, mask, tokens = self.cfg, part.loss_mask, part.num_loss_tokens
        old = self._proximal(part, output.logprobs, version)
        token_losses, clipped = self._surrogate(part, output.logprobs, advantages, old)
        metrics = [] if clipped is None else [Metric("surrogate/clipped_fraction", mean(clipped, mask), tokens)]
        if part.guarded is not None:
            token_losses = self._guarded(part, part.guarded, token_losses, output.logprobs)
        if cfg.importance != "none":
            weights, outside = corrections.importance_weights(
                output.logprobs if cfg.proximal == "behavior" else old,
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
            token_losses = token_losses + self.kl_coefficient * kl
            metrics.append(Metric("kl/policy_reference", mean(kl.detach(), mask), tokens))
        if cfg.entropy_coefficient > 0:
            token_losses = token_losses - cfg.entropy_coefficient * output.entropy
        if cfg.supervised_min_outcome is not None:
            imitated = mask & (returns.outcomes(part.rewards, mask) >= cfg.supervised_min_outcome)[:, None]
            token_losses = token_losses - cfg.supervised_coefficient * output.logprobs.where(imitated, 0.0)
            metrics.append(Metric("supervised/token_fraction", mean(imitated, mask), tokens))
        if cfg.distillation != "none":
            away, rest = self._divergence(part, output)
            token_losses = token_losses + cfg.distillation_coefficient * away
            metrics.append(Metric("distillation/divergence", mean(away.detach(), mask), tokens))
            metrics.append(Metric("distillation/rest_fraction", mean(rest, mask), tokens))
        return token_losses, metrics

    def _proximal(self, part: Batch, logprobs: Tensor, version: int) -> Tensor:
        """Log-probabilities that the surrogate's ratio starts from. [B, T]."""
        match self.cfg.proximal:
            case "behavior":
                return part.behavior_logprobs
            case "recomputed":  # with one optimizer step per batch, the policy still is the one of the start
                return logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            case "interpolated":
                return corrections.interpolated_logprobs(logprobs, part.behavior_logprobs, version - part.versions)

    def _guarded(self, part: Batch, guarded: Tensor, token_losses: Tensor, logprobs: Tensor) -> Tensor:
        """The losses with the guard's: guarded tokens lose theirs, or pay for KL(mu || pi)."""
        if self.cfg.entropy_guard == "clip_cov":
            return token_losses.masked_fill(guarded, 0.0)
        away = losses.kl_estimate(part.behavior_logprobs, logprobs, "k3")
        return token_losses + self.cfg.guard_coefficient * away.where(guarded, 0.0)

    def _divergence(self, part: Batch, output: TokenLogprobs) -> tuple[Tensor, Tensor]:
        """Distance of policy and reference at each token, and the reference's probability of what it ranks lower. [B, T]."""
        cfg = self.cfg
        if part.ref_top_logprobs is None or output.of_others is None:
            raise ValueError(
                f"algorithm.distillation = {cfg.distillation!r} needs the reference's likeliest tokens, which the reward did not "
                "give; use a reward that asks the reference, or set algorithm.distillation = 'none'"
            )
        ref = part.ref_top_logprobs
        away = distillation.divergence(output.of_others, ref, cfg.distillation, cfg.distillation_mixture)
        return away, (1 - ref.exp().sum(dim=-1)).clamp(min=0.0)

    def _surrogate(
        self, part: Batch, logprobs: Tensor, advantages: Tensor, old: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        cfg, mask = self.cfg, part.loss_mask
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
            case "soft_gate":
                return surrogates.soft_gate(logprobs, old, advantages, mask, cfg.gate_positive, cfg.gate_negative)

    def adapt_kl(self, batch: Batch) -> list[Metric]:
        """Move the KL coefficient towards `kl_target` after a batch; returns what this batch was charged, and its KL.

        The KL is that of whole trajectories under the behaviour, `mean_b sum_t (log mu - log P_ref)` (k1), as in Ziegler et al.
        """
        cfg, mask = self.cfg, batch.loss_mask
        if cfg.kl_target is None or not mask.any():
            return []
        by_token = losses.kl_estimate(batch.behavior_logprobs, self._reference(batch.behavior_logprobs, batch), "k1")
        outcome = returns.outcomes(by_token, mask)[mask.any(dim=1)]
        kl, charged = float(outcome.mean()), self.kl_coefficient
        self.kl_coefficient = losses.adapted_kl_coefficient(
            charged, kl, cfg.kl_target, batch.num_trajectories, cfg.kl_horizon
        )
        return [Metric("kl/coefficient", charged), Metric("kl/trajectory_behavior_reference", kl, len(outcome))]

    def _kl(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return losses.kl_estimate(logprobs, self._reference(logprobs, batch), self.cfg.kl_estimator)

    def _reference(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """The reference's log-probabilities, where there is loss. [B, T]."""
        if not batch.ref_logprobs[batch.loss_mask].isfinite().all():
            raise ValueError(
                f"algorithm.kl = {self.cfg.kl!r} needs the reference's log-probabilities, which the reward did not give; "
                "use a reward that asks the reference, or set algorithm.kl = 'none'"
            )
        return batch.ref_logprobs.where(batch.loss_mask, logprobs.detach())


def _steps(batch: Batch) -> Tensor:
    """The sampled tokens that end a step. [B, T]."""
    return batch.loss_mask if batch.step_ends is None else batch.loss_mask & batch.step_ends


def off_policy_metrics(batch: Batch, policy_logprobs: Tensor) -> Iterator[Metric]:
    """How far the policy is from what sampled the batch, over all its loss tokens at once."""
    mask, behavior = batch.loss_mask, batch.behavior_logprobs
    log_ratio = (policy_logprobs - behavior).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    yield Metric("importance/chi_square", corrections.chi_square(policy_logprobs, behavior, mask))
    yield Metric("importance/effective_sample_fraction", corrections.effective_sample_fraction(log_ratio.exp(), mask))


def mean(values: Tensor, mask: Tensor) -> float:
    """Mean over the mask; 0 if it is empty."""
    return float(values[mask].float().mean()) if mask.any() else 0.0
