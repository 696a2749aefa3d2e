"""KL estimators, the value loss and the aggregation of token losses: pure functions of tensors.

Tensors are `[B, T]`, padded, with a boolean `mask` [B, T] of the tokens that carry loss. Surrogates are in `surrogates.py`,
importance weights in `corrections.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of `KL(pi || ref)` from tokens sampled by pi, with `d = log pi - log ref`.

    `k1 = d` (unbiased), `k2 = d^2 / 2` (biased), `k3 = exp(-d) - 1 + d` (unbiased, never negative). As losses they differ: the
    expected gradient of k1 is 0, that of k2 is the gradient of `KL(pi || ref)`, that of k3 the gradient of `KL(ref || pi)`.
    `k3_grad_k2` has the value of k3 and the gradient of k2. Nothing is clamped.

    Args:
        logprobs: [...] of the policy.
        ref_logprobs: [...] of the reference.
        kind: `k1`, `k2`, `k3` or `k3_grad_k2`.

    Returns:
        [...] nats.

    Raises:
        ValueError: If the kind is unknown.

    Source: Schulman, Approximating KL divergence (2020); the gradients: Tang and Munos (2025), On a few pitfalls in KL divergence
    gradient estimation for RL.
    """
    difference = logprobs - ref_logprobs
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return torch.expm1(-difference) + difference
        case "k3_grad_k2":
            constant = difference.detach()
            without_value = 0.5 * difference.square() - 0.5 * constant.square()
            return torch.expm1(-constant) + constant + without_value
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2, k3 or k3_grad_k2")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Full-vocabulary `KL(pi || ref) = sum_v pi(v) * (log pi(v) - log ref(v))`, in float32.

    Args:
        logits: [..., V] of the policy.
        ref_logits: [..., V] of the reference.

    Returns:
        [...] nats.
    """
    log_pi = torch.log_softmax(logits.float(), dim=-1)
    log_ref = torch.log_softmax(ref_logits.float(), dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, num_trajectories: int, horizon: int) -> float:
    """The KL coefficient of the next batch: `coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * num_trajectories / horizon)`.

    Args:
        coefficient: Of this batch, above 0.
        kl: Measured on this batch, in nats per trajectory.
        target: Above 0, in nats per trajectory.
        num_trajectories: Of this batch.
        horizon: Trajectories over which a coefficient that is far off grows or shrinks by 20 percent; at least that of a batch.

    Raises:
        ValueError: If a number is out of range: the coefficient could change its sign.

    Source: Ziegler et al. (2019), Fine-tuning language models from human preferences, section 2.2. Their gain is 0.1 per step;
    a gain of batch over horizon is that of their published code.
    """
    if not (coefficient > 0 and target > 0 and 0 < num_trajectories <= horizon):
        raise ValueError(
            f"coefficient {coefficient} and target {target} must be above 0, and the horizon of {horizon} trajectories at "
            f"least that of a batch ({num_trajectories})"
        )
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_trajectories / horizon)


def value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor, clip: float = math.inf
) -> tuple[Tensor, Tensor]:
    """`0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`: no reward for moving a value by more than the clip.

    Args:
        values: [B, T] with gradient.
        old_values: [B, T] at the start of the update.
        targets: [B, T] `R`, constants.
        mask: [B, T] bool.
        clip: Above 0, in units of the value; inf is `0.5 * (V - R)^2`.

    Returns:
        Losses [B, T], not yet masked or aggregated, and a bool [B, T] of the tokens that the clip left without gradient.

    Raises:
        ValueError: If the clip is not above 0.

    Source: Schulman et al. (2017), equation 9 (the squared error); the clip is not in the paper but in its authors' code
    (the larger of the two errors), as Ziegler et al. (2019) publish it for language models.
    """
    if not clip > 0:
        raise ValueError(f"clip is {clip}; it must be above 0, or no value could change")
    plain = (values - targets).square()
    if math.isinf(clip):
        return 0.5 * plain, torch.zeros_like(mask)
    clipped = (values.clamp(old_values - clip, old_values + clip) - targets).square()
    return 0.5 * torch.maximum(plain, clipped), (clipped > plain) & mask


def aggregate(losses: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """`sum_bt mask_bt * weights_b * losses_bt`, a scalar.

    Args:
        losses: [B, T] of some or all trajectories of a batch.
        mask: [B, T] bool.
        weights: [B] their `trajectory_weights`, counted over the **whole batch**, never over a micro-batch, so that how a batch
            is cut into micro-batches changes nothing.
    """
    return (losses.masked_fill(~mask, 0.0) * weights.to(losses.dtype)[:, None]).sum()


def trajectory_weights(aggregation: str, mask: Tensor, group_index: Tensor, loss_length: int = 0) -> Tensor:
    """What every token loss of a trajectory is multiplied by, from the whole batch.

    With N tokens in M trajectories that carry loss, n_b of them in trajectory b, N_g in its group, and Q groups:

    * `sum`: 1, the gradient as written in Williams (1992);
    * `token_mean`: `1 / N`;
    * `trajectory_mean`: `1 / M`, the mean over trajectories of the sum of their tokens;
    * `trajectory_token_mean`: `1 / (M n_b)`, the mean over trajectories of the mean of their tokens;
    * `prompt_mean`: `1 / (Q N_g)`, the mean over prompts of the mean of all tokens of their group;
    * `constant_length`: `1 / (M * loss_length)`.

    A trajectory without loss tokens counts nowhere.

    Args:
        aggregation: One of the names.
        mask: [B, T] bool of the tokens that carry loss.
        group_index: [B] integer.
        loss_length: Tokens, for `constant_length`.

    Returns:
        [B] float64.

    Raises:
        ValueError: If the name is unknown, or the constant length is not positive.

    Source: `token_mean`: Yu et al. (2025), DAPO, equation 8; `trajectory_token_mean`: Shao et al. (2024), equation 3;
    `constant_length`: Liu et al. (2025), Understanding R1-Zero-Like Training (Dr. GRPO); `prompt_mean`: Khatri et al. (2025),
    The art of scaling reinforcement learning compute for LLMs.
    """
    tokens = mask.sum(dim=1).double()
    carries = (tokens > 0).double()
    num_trajectories = carries.sum().clamp(min=1)
    match aggregation:
        case "sum":
            return torch.ones_like(tokens)
        case "token_mean":
            return torch.ones_like(tokens) / tokens.sum().clamp(min=1)
        case "trajectory_mean":
            return torch.ones_like(tokens) / num_trajectories
        case "trajectory_token_mean":
            return 1 / (num_trajectories * tokens.clamp(min=1))
        case "prompt_mean":
            group_tokens = torch.zeros(int(group_index.max()) + 1, dtype=torch.float64, device=mask.device)
            group_tokens.index_add_(0, group_index, tokens)
            return 1 / ((group_tokens > 0).sum().clamp(min=1) * group_tokens.clamp(min=1))[group_index]
        case "constant_length":
            if loss_length < 1:
                raise ValueError(f"constant_length needs a positive loss_length, got {loss_length}")
            return torch.ones_like(tokens) / (num_trajectories * loss_length)
    names = "sum, token_mean, trajectory_mean, trajectory_token_mean, prompt_mean or constant_length"
    raise ValueError(f"unknown aggregation {aggregation!r}; choose {names}")
