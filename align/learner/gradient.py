"""The gradient of a micro-batch: forward pass, loss, backward pass, and what the micro-batch says of the policy."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from align.algorithm import losses
from align.algorithm.objective import Objective, mean
from align.data.batching import Batch
from align.data.sampling import Sampling
from align.data.token_logprobs import TokenLogprobs
from align.metrics import Metric
from align.model.policy import Policy


class Gradient:
    """Adds gradients of micro-batches to the policy's parameters.

    Where a token's loss depends on its own log-probability alone, the gradient is formed chunk by chunk of tokens and the logits
    of the micro-batch are never there at once; else all its log-probabilities come first.

    Args:
        policy: The network being trained.
        objective: What is asked of it.
        sampling: What the batch was sampled from.
        version: The learner's policy version.
        packs: Whether the trajectories share one row; see `TokenBudget`.
    """

    def __init__(self, policy: Policy, objective: Objective, sampling: Sampling, version: int, *, packs: bool) -> None:
        self.policy = policy
        self.objective = objective
        self.sampling = sampling
        self.version = version
        self.packs = packs

    def add(self, part: Batch, advantages: Tensor, weights: Tensor) -> tuple[TokenLogprobs, list[Metric]]:
        """Add the gradient of one micro-batch.

        Args:
            part: The micro-batch.
            advantages: [B, T].
            weights: [B] what the token losses of each trajectory are multiplied by.

        Returns:
            Its log-probabilities and entropies, without gradient, and the metrics of its loss.
        """
        states = self.policy.states(part.token_ids, part.loss_mask, part.lengths if self.packs else None)
        by_token = self.objective.is_by_token and not self.sampling.truncates
        compute = self._loss_by_token if by_token else self._loss_by_trajectory
        loss, output, metrics = compute(states, part, advantages, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        return TokenLogprobs(output.logprobs.detach(), output.entropy.detach()), metrics

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
        total, logprobs, entropy = self.policy.head.token_loss(states, targets, loss, self.sampling)
        return total, TokenLogprobs.at(mask, logprobs, entropy), metrics

    def _loss_by_trajectory(
        self, states: Tensor, part: Batch, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, TokenLogprobs, list[Metric]]:
        """The loss that needs all log-probabilities of a trajectory, or other tokens', before its gradient is known."""
        output = self.policy.completed(
            states,
            part.loss_mask,
            part.token_ids,
            sampling=self.sampling,
            with_entropy=True,
            entropy_gradient=self.objective.cfg.entropy_coefficient > 0,
            others=part.ref_top_ids,
        )
        loss, metrics = self._loss(part, output, advantages, weights)
        if output.outside is not None:
            metrics.append(
                Metric("support/outside_fraction", mean(output.outside, part.loss_mask), part.num_loss_tokens)
            )
        return loss, output, metrics

    def _loss(
        self, part: Batch, output: TokenLogprobs, advantages: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Metric]]:
        mask = part.loss_mask
        token_losses, metrics = self.objective.token_losses(part, output, advantages, self.version)
        metrics.append(Metric("optimizer/loss", mean(token_losses.detach(), mask), part.num_loss_tokens))
        return losses.aggregate(token_losses, mask, weights), metrics


def distances(part: Batch, output: TokenLogprobs, version: int | None) -> Iterator[Metric]:
    """Entropy of the policy on a micro-batch, and how far policy, sampler and reference are from each other.

    Args:
        part: The micro-batch.
        output: What the policy says of it.
        version: The policy version that this is; None between two versions.
    """
    mask, behavior, logprobs = part.loss_mask, part.behavior_logprobs, output.logprobs
    tokens = int(mask.sum())
    yield Metric("policy/entropy", float(output.entropy[mask].mean()), tokens)
    kl = losses.kl_estimate(behavior, logprobs, "k3")
    yield Metric("kl/policy_behavior", float(kl[mask].mean()), tokens)
    referenced = mask & part.ref_logprobs.isfinite()
    if referenced.any():
        kl = losses.kl_estimate(behavior, part.ref_logprobs, "k1")
        yield Metric("kl/behavior_reference", float(kl[referenced].mean()), int(referenced.sum()))
    if version is None:
        return
    own = mask & (part.versions == version)
    if own.any():
        mismatch = (behavior - logprobs)[own].abs()
        yield Metric("mismatch/abs_mean", float(mismatch.mean()), int(own.sum()))
        yield Metric("mismatch/abs_max", float(mismatch.max()))
