"""Oracles of the critic's mathematics: slow and obvious loops over Python floats (float64). Imports neither `align` nor torch."""

from __future__ import annotations

from tests.oracles.formulas import Mask, Row, Rows, actions


def gae(rewards: Rows, values: Rows, mask: Mask, discount: float, gae_lambda: float) -> list[list[float]]:
    """`A_k = sum_j (discount * lambda)^j * delta_{k+j}` over the actions of the row, each power and each sum from scratch."""
    result = [[0.0] * len(row) for row in rewards]
    for b, mask_row in enumerate(mask):
        positions = actions(mask_row)
        for k, t in enumerate(positions):
            for j in range(len(positions) - k):
                here = positions[k + j]
                after = values[b][positions[k + j + 1]] if k + j + 1 < len(positions) else 0.0
                delta = rewards[b][here] + discount * after - values[b][here]
                result[b][t] += (discount * gae_lambda) ** j * delta
    return result


def k_step_mixture(rewards: Row, values: Row, discount: float, gae_lambda: float) -> list[float]:
    """The same for a row of actions, as the paper defines it: `(1 - lambda) * sum_k lambda^(k-1) * A^(k)`, the rest at the end.

    `A^(k)_t = R_t + ... + discount^(k-1) R_{t+k-1} + discount^k V_{t+k} - V_t`, and V is 0 from the end of the row on.
    """
    result = []
    for t in range(len(rewards)):
        left, total = len(rewards) - t, 0.0
        for k in range(1, left + 1):
            gained = sum(discount**j * rewards[t + j] for j in range(k))
            gained += discount**k * values[t + k] if k < left else 0.0
            share = (1 - gae_lambda) * gae_lambda ** (k - 1) if k < left else gae_lambda ** (k - 1)
            total += share * (gained - values[t])
        result.append(total)
    return result


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    """Half the larger of the squared errors of the value and of the value kept within `clip` of the old one."""
    kept = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (kept - target) ** 2)


def explained_variance(values: Rows, targets: Rows, mask: Mask) -> float:
    """`1 - Var(target - V) / Var(target)` with the variance over n."""
    cells = [(b, t) for b, row in enumerate(mask) for t in actions(row)]

    def variance(numbers: list[float]) -> float:
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    return 1 - variance([targets[b][t] - values[b][t] for b, t in cells]) / variance([targets[b][t] for b, t in cells])
