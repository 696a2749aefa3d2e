"""Oracles: the formulas of `align`, written as slow and obvious loops over Python floats (float64).

Rows are lists of numbers; `mask` is a list of lists of bools. Nothing here imports `align` or torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]
Rows = Sequence[Row]
Mask = Sequence[Sequence[bool]]


def actions(mask_row: Sequence[bool]) -> list[int]:
    """Positions of the actions of one row, in order."""
    return [t for t, is_action in enumerate(mask_row) if is_action]


def reward_to_go(rewards: Rows, mask: Mask, discount: float) -> list[list[float]]:
    """`G_k = sum_{j >= k} discount^(j - k) * R_j` over the actions of the row."""
    result = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(rewards):
        positions = actions(mask[b])
        for k, t in enumerate(positions):
            for j in range(k, len(positions)):
                result[b][t] += discount ** (j - k) * row[positions[j]]
    return result


def batch_mean(values: Rows, mask: Mask) -> list[list[float]]:
    """The mean of all actions, written at every action."""
    everything = [row[t] for row, m in zip(values, mask, strict=True) for t in actions(m)]
    mean = sum(everything) / len(everything) if everything else 0.0
    return [[mean if m else 0.0 for m in mask_row] for mask_row in mask]


def position_mean(values: Rows, mask: Mask) -> list[list[float]]:
    """At the k-th action of a row, the mean of all k-th actions."""
    result = [[0.0] * len(row) for row in values]
    for b, mask_row in enumerate(mask):
        for k, t in enumerate(actions(mask_row)):
            same = [row[actions(m)[k]] for row, m in zip(values, mask, strict=True) if len(actions(m)) > k]
            result[b][t] = sum(same) / len(same)
    return result


def group_mean(values: Rows, mask: Mask, group_index: Sequence[int]) -> list[list[float]]:
    """At every action, the mean of all actions of the row's group."""
    result = [[0.0] * len(row) for row in values]
    for b, mask_row in enumerate(mask):
        same = [
            values[other][t]
            for other in range(len(values))
            if group_index[other] == group_index[b]
            for t in actions(mask[other])
        ]
        for t in actions(mask_row):
            result[b][t] = sum(same) / len(same)
    return result


def whiten(values: Rows, mask: Mask) -> list[list[float]]:
    """Mean 0 and unbiased standard deviation 1 over all actions."""
    everything = [row[t] for row, m in zip(values, mask, strict=True) for t in actions(m)]
    mean = sum(everything) / len(everything)
    std = math.sqrt(sum((v - mean) ** 2 for v in everything) / (len(everything) - 1))
    return [
        [(v - mean) / std if m else 0.0 for v, m in zip(row, mask_row, strict=True)]
        for row, mask_row in zip(values, mask, strict=True)
    ]


def outcomes(rewards: Rows, mask: Mask) -> list[float]:
    """The sum of each row's action rewards."""
    return [sum(row[t] for t in actions(m)) for row, m in zip(rewards, mask, strict=True)]


def on_last_action(outcome: Row, mask: Mask) -> list[list[float]]:
    """The outcome at the last action of each row, 0 elsewhere."""
    result = [[0.0] * len(row) for row in mask]
    for b, mask_row in enumerate(mask):
        if actions(mask_row):
            result[b][actions(mask_row)[-1]] = outcome[b]
    return result


def group_outcomes(outcome: Row, mask: Mask, group_index: Sequence[int], row: int, leave_out: bool) -> list[float]:
    """Outcomes of the rows with actions in the group of `row`, with or without its own."""
    rows = range(len(outcome))
    same = [b for b in rows if group_index[b] == group_index[row] and actions(mask[b])]
    return [outcome[b] for b in same if b != row or not leave_out]


def everywhere(per_row: Row, mask: Mask) -> list[list[float]]:
    """A row's number at each of its actions, 0 elsewhere."""
    return [[value if m else 0.0 for m in mask_row] for value, mask_row in zip(per_row, mask, strict=True)]


def group_outcome_baseline(outcome: Row, mask: Mask, group_index: Sequence[int], leave_out: bool) -> list[list[float]]:
    """The mean outcome of the row's group, or of its other rows; its own outcome if there is nobody else."""
    means = []
    for row, own in enumerate(outcome):
        values = group_outcomes(outcome, mask, group_index, row, leave_out) if actions(mask[row]) else []
        means.append(sum(values) / len(values) if values else own)
    return everywhere(means, mask)


def group_std(outcome: Row, mask: Mask, group_index: Sequence[int]) -> list[float]:
    """Unbiased standard deviation of the outcomes of the row's group; 0 for fewer than two rows."""
    result = []
    for row in range(len(outcome)):
        values = group_outcomes(outcome, mask, group_index, row, leave_out=False)
        mean = sum(values) / max(len(values), 1)
        squares = sum((v - mean) ** 2 for v in values)
        result.append(math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0)
    return result


def clipped_loss(ratio: float, advantage: float, low: float, high: float, dual: float = math.inf) -> float:
    """`-min(r A, clip(r) A)`, at most `-dual * A` for a negative advantage."""
    value = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return min(value, -dual * advantage) if advantage < 0 else value


def soft_gate_loss(ratio: float, advantage: float, positive: float, negative: float) -> float:
    """`-(4 / tau) sigmoid(tau (r - 1)) A`."""
    tau = positive if advantage > 0 else negative
    return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def group_relative_steps(
    rewards: Rows, step_ends: Mask, group_index: Sequence[int], divide: bool, epsilon: float
) -> list[list[float]]:
    """Each step's reward less the mean of all steps of its group, over their unbiased standard deviation."""
    result = [[0.0] * len(row) for row in rewards]
    for b, ends in enumerate(step_ends):
        same = [
            rewards[other][t]
            for other in range(len(rewards))
            if group_index[other] == group_index[b]
            for t in actions(step_ends[other])
        ]
        for t in actions(ends):
            mean = sum(same) / len(same)
            squares = sum((value - mean) ** 2 for value in same)
            std = math.sqrt(squares / (len(same) - 1)) if len(same) > 1 else 0.0
            if not divide:
                result[b][t] = rewards[b][t] - mean
            elif std > 1e-6 * max(map(abs, same)):
                result[b][t] = (rewards[b][t] - mean) / (std + epsilon)
    return result


def covariances(logprobs: Rows, advantages: Rows, mask: Mask) -> list[list[float]]:
    """`(log mu - mean) (A - mean)` at every action."""
    cells = [(b, t) for b, row in enumerate(mask) for t in actions(row)]
    means = [sum(rows[b][t] for b, t in cells) / len(cells) for rows in (logprobs, advantages)]
    return [
        [
            (logprobs[b][t] - means[0]) * (advantages[b][t] - means[1]) if (b, t) in cells else 0.0
            for t in range(len(row))
        ]
        for b, row in enumerate(mask)
    ]


def merged(probabilities: Row, kept: Sequence[int]) -> list[float]:
    """The probabilities of the kept tokens, and of all others together."""
    rest = sum(p for v, p in enumerate(probabilities) if v not in kept)
    return [*(probabilities[v] for v in kept), rest]


def divergence(p: Row, q: Row, kind: str, mixture: float) -> float:
    """KL(p || q), KL(q || p), or `b KL(q || m) + (1 - b) KL(p || m)` with `m = b q + (1 - b) p`."""
    mean = [mixture * b + (1 - mixture) * a for a, b in zip(p, q, strict=True)]
    return {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jensen_shannon": mixture * kl(q, mean) + (1 - mixture) * kl(p, mean),
    }[kind]


def kept_tokens(logits: Row, top_k: int, top_p: float) -> set[int]:
    """Top-k, then the smallest set of the likeliest that reaches top_p of what is left."""
    by_rank = sorted(range(len(logits)), key=lambda v: -logits[v])
    left = by_rank[:top_k] if top_k else by_rank
    weights = [math.exp(logits[v] - logits[by_rank[0]]) for v in left]
    kept, reached = set(), 0.0
    for token, weight in zip(left, weights, strict=True):
        if kept and reached >= top_p:
            break
        kept.add(token)
        reached += weight / sum(weights)
    return kept


def sequence_ratio(policy: Row, old: Row, positions: Sequence[int], geometric: bool) -> float:
    """Product of the token ratios of a row, or its n-th root."""
    product = 1.0
    for t in positions:
        product *= math.exp(policy[t] - old[t])
    return product ** (1 / len(positions)) if geometric else product


def bounded(ratio: float, bound: str, low: float, high: float) -> float:
    """Moved to the nearest bound, or 0 outside; rejected: 1 inside."""
    inside = low <= ratio <= high
    if bound == "rejected":
        return float(inside)
    return ratio if inside else 0.0 if bound == "masked" else min(max(ratio, low), high)


def importance_weights(
    policy: Rows, behavior: Rows, mask: Mask, level: str, bound: str, low: float, high: float
) -> list[list[float]]:
    """Bounded ratios by token or by row; 1 outside the mask."""
    result = [[1.0] * len(row) for row in policy]
    for b, mask_row in enumerate(mask):
        positions = actions(mask_row)
        for t in positions:
            over = [t] if level == "token" else positions
            ratio = sequence_ratio(policy[b], behavior[b], over, geometric=level == "sequence_mean")
            result[b][t] = bounded(ratio, bound, low, high)
    return result


def aggregated(losses: Rows, mask: Mask, group_index: Sequence[int], how: str, length: int = 0) -> float:
    """The scalar loss of a batch, each aggregation written out."""
    rows = [[row[t] for t in actions(m)] for row, m in zip(losses, mask, strict=True)]
    carrying = [row for row in rows if row]
    everything = [value for row in rows for value in row]
    groups: dict[int, list[float]] = {}
    for index, row in zip(group_index, rows, strict=True):
        groups.setdefault(index, []).extend(row)
    values = {
        "sum": [sum(everything)],
        "token_mean": [sum(everything) / max(len(everything), 1)],
        "trajectory_mean": [sum(row) for row in carrying],
        "trajectory_token_mean": [sum(row) / len(row) for row in carrying],
        "prompt_mean": [sum(group) / len(group) for group in groups.values() if group],
        "constant_length": [sum(row) / max(length, 1) for row in carrying],
    }[how]
    return sum(values) / max(len(values), 1)


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    """`exp(l_v / temperature) / sum_u exp(l_u / temperature)`."""
    largest = max(logits)
    weights = [math.exp((value - largest) / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def entropy(probabilities: Row) -> float:
    """`-sum_v p_v log p_v` in nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def kl(p: Row, q: Row) -> float:
    """`sum_v p_v log(p_v / q_v)` in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
