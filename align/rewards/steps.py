"""Rewards of whole steps: what the tokens of a step earn is paid at its last token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.data.types import BoolArray, FloatArray


def step_ends(pieces: Sequence[str], mask: BoolArray, separator: str) -> BoolArray:
    """The last token of each step of a completion.

    A step ends with the token that completes an occurrence of the separator in the sampled text. A step has text of its own:
    separators in a row end one step, and what follows the last of them without text, such as the end token, still belongs to it.

    Args:
        pieces: The text of each token, T of them; empty for special ones.
        mask: [T] bool, sampled tokens.
        separator: Not empty.

    Returns:
        [T] bool; the last sampled token is always one, without a sampled token there is none.
    """
    ends: list[int] = []
    text = ""  # of the step so far
    for token in np.flatnonzero(mask).tolist():
        text += pieces[token]
        head, found, rest = text.rpartition(separator)
        if found:
            ends += [token] if head.replace(separator, "").strip() else []
            text = rest
    if mask.any():
        last = int(np.flatnonzero(mask)[-1])
        ends = [*(ends if text.strip() else ends[:-1]), last]
    result = np.zeros(len(mask), np.bool_)
    result[ends] = True
    return result


def paid_by_step(rewards: FloatArray, mask: BoolArray, ends: BoolArray) -> FloatArray:
    """`R_b = sum of R_t over the tokens of the step that ends at b`, 0 elsewhere; the sum over a trajectory stays.

    Args:
        rewards: [T].
        mask: [T] bool, sampled tokens.
        ends: [T] bool, among them the last sampled one.
    """
    total = np.cumsum(np.where(mask, rewards, 0), dtype=np.float64)[ends]
    paid = np.zeros_like(rewards)
    paid[ends] = np.diff(total, prepend=0.0)
    return paid
