"""From rewards to advantages: pure functions of tensors.

All take padded `[B, T]` tensors and a boolean `mask` [B, T] of the tokens that are actions; values outside the mask are
ignored on input and 0 on output. Time is counted in actions: tokens outside the mask take no time, so a discount is not
applied across them. An *outcome* is one number per trajectory, [B]; a row without actions has none and counts nowhere.

Means are taken in float64: the mean of equal numbers is then exactly that number, and their advantages exactly 0, where
float32 would leave a rounding that whitening blows up to size 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align.algorithm.spread import ROUNDING


def reward_to_go(rewards: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """Monte Carlo return of every action: `G_t = R_t + discount * G_{t+1}`, with t+1 the next action of the row.

    Args:
        rewards: [B, T].
        mask: [B, T] bool.
        discount: In [0, 1]; 0 keeps only the immediate reward.

    Returns:
        [B, T], 0 outside the mask.

    Raises:
        ValueError: If the discount is outside [0, 1] or the shapes differ.

    Source: Sutton and Barto, Reinforcement Learning, 2nd ed., equation 3.9; as reward-to-go in Williams (1992).
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must be between 0 and 1")
    if rewards.shape != mask.shape:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, mask has {tuple(mask.shape)}")
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = torch.where(mask[:, t], rewards[:, t] + discount * running, running)
        returns[:, t] = running
    return returns.masked_fill(~mask, 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: a mixture of k-step returns, each less the critic's value of where it starts.

    `delta_t = R_t + discount * V_{t+1} - V_t` and `A_t = delta_t + discount * lambda * A_{t+1}`, with t+1 the next action of
    the row. The episode ends with the last action, also where the completion was cut off by length: the value after it is 0.
    With lambda = 1 and V = 0 this is `reward_to_go`, bit for bit; with lambda = 0 it is the one-step error `delta_t`.

    Args:
        rewards: [B, T].
        values: [B, T] value of the state that each action was taken in; constants.
        mask: [B, T] bool.
        discount: In [0, 1].
        gae_lambda: In [0, 1].

    Returns:
        Advantages [B, T] and the critic's targets `A + V` [B, T] (the lambda-return), both 0 outside the mask.

    Raises:
        ValueError: If the discount or lambda is outside [0, 1], or the shapes differ.

    Source: Schulman et al. (2016), High-dimensional continuous control using generalized advantage estimation, equation 16; the
    target as in Schulman et al. (2017). Tokens outside the mask take no time here, where some implementations decay over them.
    """
    for name, number in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} is {number}; it must be between 0 and 1")
    if not rewards.shape == values.shape == mask.shape:
        shapes = [tuple(t.shape) for t in (rewards, values, mask)]
        raise ValueError(f"rewards, values and mask have shapes {shapes}; they must be equal")
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + discount * gae_lambda * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = running
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, targets: Tensor, mask: Tensor) -> float:
    """`1 - Var(target - V) / Var(target)` over the mask: 1 for a perfect critic, 0 for a constant one, negative for a worse one.

    0 where the targets do not vary, up to rounding, or the mask is empty: there is nothing to explain.

    Source: the coefficient of determination without its bias term, as PPO implementations log it.
    """
    target, error = targets[mask].double(), (targets - values)[mask].double()
    if target.numel() == 0 or float(target.std(correction=0)) <= ROUNDING * float(target.abs().max()):
        return 0.0
    return 1.0 - float(error.var(correction=0) / target.var(correction=0))


def outcomes(rewards: Tensor, mask: Tensor) -> Tensor:
    """The outcome of every trajectory, `R_b = sum_t mask_bt * R_bt`. [B], 0 for a row without actions."""
    return rewards.masked_fill(~mask, 0.0).double().sum(dim=1).to(rewards.dtype)


def on_last_action(outcome: Tensor, mask: Tensor) -> Tensor:
    """Token rewards that pay a trajectory's outcome [B] at its last action and nothing before. [B, T].

    Source: the usual reading of a sequence-level reward as a token-level one (Ouyang et al. 2022: the score is given at
    the end of the episode).
    """
    is_last = mask & (mask.long().cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    return torch.where(is_last, outcome[:, None], torch.zeros_like(outcome)[:, None])


def batch_mean(returns: Tensor, mask: Tensor) -> Tensor:
    """Baseline: one number for all actions, `b = sum(mask * G) / sum(mask)`. Returns [B, T], 0 outside the mask."""
    mean = returns.masked_fill(~mask, 0.0).double().sum() / mask.sum().clamp(min=1)
    return mean.to(returns.dtype).expand_as(returns).masked_fill(~mask, 0.0)


def position_mean(returns: Tensor, mask: Tensor) -> Tensor:
    """Baseline: the mean return of all k-th actions, `b_k = mean over rows that have a k-th action of G_k`.

    It takes away what a return owes to the number of actions that are left. A row's own return is part of the mean, which
    scales the expected gradient of position k by `1 - 1/n_k` (n_k rows reach it) and leaves its direction.

    Returns:
        [B, T], 0 outside the mask.
    """
    kth_action = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    total = torch.zeros(mask.shape[1], dtype=torch.float64, device=returns.device)
    count = torch.zeros_like(total)
    values = returns[mask].double()
    total.index_add_(0, kth_action[mask], values)
    count.index_add_(0, kth_action[mask], torch.ones_like(values))
    return (total / count.clamp(min=1))[kth_action].to(returns.dtype).masked_fill(~mask, 0.0)


def group_mean(returns: Tensor, mask: Tensor, group_index: Tensor) -> Tensor:
    """Baseline: the mean over all actions of the row's group (the trajectories of one prompt).

    Args:
        returns: [B, T].
        mask: [B, T] bool.
        group_index: [B] integer, equal for the rows of one group.

    Returns:
        [B, T], 0 outside the mask.
    """
    num_groups = int(group_index.max()) + 1
    total = torch.zeros(num_groups, dtype=torch.float64, device=returns.device)
    count = torch.zeros_like(total)
    total.index_add_(0, group_index, returns.masked_fill(~mask, 0.0).double().sum(dim=1))
    count.index_add_(0, group_index, mask.sum(dim=1).double())
    mean = (total / count.clamp(min=1))[group_index].to(returns.dtype)
    return mean[:, None].expand_as(returns).masked_fill(~mask, 0.0)


def group_outcome_mean(outcome: Tensor, mask: Tensor, group_index: Tensor) -> Tensor:
    """Baseline: the mean outcome of the row's group, each trajectory counted once whatever its length.

    `b_i = (1/n) sum_j R_j`. The row's own outcome is part of it, which scales the expected gradient by `1 - 1/n`. A row
    that is alone in its group has advantage 0.

    Args:
        outcome: [B].
        mask: [B, T] bool; says which rows have actions at all.
        group_index: [B] integer, equal for the rows of one group.

    Returns:
        [B, T], 0 outside the mask.

    Source: Shao et al. (2024), DeepSeekMath, section 4.1.2, the numerator of the group-relative advantage; Liu et al. (2025),
    Understanding R1-Zero-Like Training (Dr. GRPO), where nothing else is done to it.
    """
    total, count = _group_sums(outcome.double(), mask, group_index)
    return _spread((total / count.clamp(min=1)), outcome, mask, group_index)


def leave_one_out(outcome: Tensor, mask: Tensor, group_index: Tensor) -> Tensor:
    """Baseline: the mean outcome of the *other* trajectories of the group, `b_i = sum_{j != i} R_j / (n - 1)`.

    Independent of the row itself, so the gradient stays unbiased. A row that is alone in its group has advantage 0.

    Args:
        outcome: [B].
        mask: [B, T] bool; says which rows have actions at all.
        group_index: [B] integer.

    Returns:
        [B, T], 0 outside the mask.

    Source: Kool et al. (2019), Buy 4 REINFORCE samples; Ahmadian et al. (2024), Back to Basics (RLOO).
    """
    total, count = _group_sums(outcome.double(), mask, group_index)
    others = torch.where(count > 1, (total - outcome.double()) / (count - 1).clamp(min=1), outcome.double())
    return _spread(others, outcome, mask, group_index)


def divide_by_group_std(
    advantages: Tensor, outcome: Tensor, mask: Tensor, group_index: Tensor, epsilon: float = 0.0
) -> Tensor:
    """`A_bt / (std_g + epsilon)` with the unbiased standard deviation of the outcomes of the row's group.

    A group whose spread is only rounding (`std <= ROUNDING * max|R|`), or that has one row, gives exactly 0. With that guard no
    epsilon is needed; it is there to meet implementations that add one.

    Args:
        advantages: [B, T].
        outcome: [B].
        mask: [B, T] bool.
        group_index: [B] integer.
        epsilon: Added to the standard deviation, at least 0.

    Returns:
        [B, T], 0 outside the mask.

    Source: Shao et al. (2024), DeepSeekMath, section 4.1.2 (no epsilon there; whether `n` or `n - 1` is not said).
    """
    values = outcome.double()
    total, count = _group_sums(values, mask, group_index)
    squares, _ = _group_sums((values - total / count.clamp(min=1)).square(), mask, group_index)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    _, largest = _group_extremes(values.abs(), mask, group_index)
    no_signal = (count < 2) | (std <= ROUNDING * largest)
    scaled = advantages.double() / torch.where(no_signal, 1.0, std + epsilon)[:, None]
    return scaled.to(advantages.dtype).masked_fill(~mask | no_signal[:, None], 0.0)


def divide_by_batch_std(advantages: Tensor, mask: Tensor) -> Tensor:
    """`A_bt / std`, with the unbiased standard deviation over the trajectories of the batch of their first action's advantage.

    For advantages that are constant along a trajectory that is the spread of the trajectories' advantages, each counted once
    whatever its length (`whiten` counts tokens, and centres). A spread that is only rounding (`std <= ROUNDING * max|A|`) gives
    exactly 0.

    Returns:
        [B, T], 0 outside the mask.

    Source: Khatri et al. (2025), The art of scaling reinforcement learning compute for LLMs, section 4 (ScaleRL): the standard
    deviation of all advantages of the batch (`n - 1` is our choice).
    """
    is_first = mask & (mask.long().cumsum(dim=1) == 1)
    values = advantages[is_first].double()
    if values.numel() < 2 or values.std() <= ROUNDING * values.abs().max():
        return torch.zeros_like(advantages)
    return (advantages.double() / values.std()).to(advantages.dtype).masked_fill(~mask, 0.0)


def group_relative_steps(
    rewards: Tensor, step_ends: Tensor, group_index: Tensor, divide: bool, epsilon: float = 0.0
) -> Tensor:
    """Process rewards against those of the group: `(R_bt - mean_g) / (std_g + epsilon)` at step ends, 0 elsewhere.

    Mean and unbiased standard deviation run over the rewards of all steps of all trajectories of the row's group. A group whose
    spread is only rounding (`std <= ROUNDING * max|R|`), or that has one step, gives exactly 0. A token's advantage is the sum
    of what comes at and after it (`reward_to_go`).

    Args:
        rewards: [B, T].
        step_ends: [B, T] bool, true for the last token of each step.
        group_index: [B] integer.
        divide: Divide by the standard deviation; without it the mean is taken off alone.
        epsilon: Added to the standard deviation, at least 0.

    Returns:
        [B, T].

    Source: Shao et al. (2024), DeepSeekMath, section 4.1.3, process supervision (no epsilon there; `n - 1` is our choice).
    """
    relative = torch.zeros_like(rewards)
    if not step_ends.any():
        return relative
    groups = group_index[:, None].expand(step_ends.shape)[step_ends]
    values = rewards[step_ends].double()
    every = torch.ones_like(values, dtype=torch.bool)[:, None]
    total, count = _group_sums(values, every, groups)
    least, largest = _group_extremes(values, every, groups)
    centred = values - (total / count).clamp(least, largest)
    if divide:
        squares, _ = _group_sums(centred.square(), every, groups)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        no_signal = (count < 2) | (std <= ROUNDING * torch.maximum(least.abs(), largest.abs()))
        centred = (centred / torch.where(no_signal, 1.0, std + epsilon)).masked_fill(no_signal, 0.0)
    relative[step_ends] = centred.to(rewards.dtype)
    return relative


def _group_sums(values: Tensor, mask: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values [B] of the row's group, over rows with actions; written at every row. [B], [B]."""
    counted = mask.any(dim=1)
    total = torch.zeros(int(group_index.max()) + 1, dtype=torch.float64, device=values.device)
    count = torch.zeros_like(total)
    total.index_add_(0, group_index, values.masked_fill(~counted, 0.0))
    count.index_add_(0, group_index, counted.double())
    return total[group_index], count[group_index]


def _group_extremes(values: Tensor, mask: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value [B] of the row's group, over rows with actions; written at every row."""
    counted = mask.any(dim=1)
    least = torch.full((int(group_index.max()) + 1,), math.inf, dtype=values.dtype, device=values.device)
    largest = torch.full_like(least, -math.inf)
    least.scatter_reduce_(0, group_index, values.masked_fill(~counted, math.inf), "amin")
    largest.scatter_reduce_(0, group_index, values.masked_fill(~counted, -math.inf), "amax")
    return least[group_index], largest[group_index]


def _spread(mean: Tensor, outcome: Tensor, mask: Tensor, group_index: Tensor) -> Tensor:
    """A mean of outcomes [B] at all actions of its row, kept within them: equal outcomes then have exactly themselves."""
    least, largest = _group_extremes(outcome.double(), mask, group_index)
    return mean.clamp(least, largest).to(outcome.dtype)[:, None].expand(mask.shape).masked_fill(~mask, 0.0)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over all actions of the batch.

    `A' = (A - mean) / std` with the unbiased variance. A constant input gives exactly 0: a spread that is only rounding
    (`std <= ROUNDING * max|A|`) counts as none, since dividing by it would blow the rounding up.

    Returns:
        [B, T], 0 outside the mask.

    Source: Hu (2025), REINFORCE++, the normalisation over the global batch (epsilon left out, see above).
    """
    values = advantages[mask].double()
    if values.numel() < 2:
        return torch.zeros_like(advantages)
    std = values.std()
    if std <= ROUNDING * values.abs().max():
        return torch.zeros_like(advantages)
    whitened = (advantages.double() - values.mean()) / std
    return whitened.to(advantages.dtype).masked_fill(~mask, 0.0)
