"""One choice between packed and padded passes."""

from __future__ import annotations

from align.data.token_budget import TokenBudget

LENGTHS = [5, 7, 10, 3]


def test_packed_passes_count_real_tokens_and_padded_ones_the_padding_too() -> None:
    assert TokenBudget(15, packs=True).cut(LENGTHS) == [[2, 0], [1, 3]]
    assert TokenBudget(15, packs=False).cut(LENGTHS) == [[2], [1, 0], [3]]
