"""The support of a truncated sampler: by hand, by a loop, and what a token at its edge does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.data.sampling import Sampling
from align.model.support import kept_tokens, restricted
from tests.oracles import formulas as oracle

P = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [0, 1]),
        (4, 1.0, [0, 1, 2, 3]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.65, [0, 1]),
        (0, 0.75, [0, 1, 2]),
        (0, 1e-6, [0]),
        # Of the first three, top-p sees 4/9, 3/9, 2/9: the first two make 7/9.
        (3, 0.75, [0, 1]),
        (3, 0.8, [0, 1, 2]),
    ],
)
def test_four_tokens_by_hand(top_k: int, top_p: float, kept: list[int]) -> None:
    assert kept_tokens(P.log(), Sampling(1.0, top_k, top_p))[0].nonzero().flatten().tolist() == kept


def test_tokens_as_likely_as_the_kth_stay_too() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert kept_tokens(logits, Sampling(top_k=2)).tolist() == [[True, True, True, False]]


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3, 7, 20]), st.sampled_from([0.05, 0.3, 0.9, 0.999, 1.0]))
def test_the_support_equals_the_loop(seed: int, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, kept in zip(logits.tolist(), kept_tokens(logits, Sampling(1.0, top_k, top_p)), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == oracle.kept_tokens(row, top_k, top_p)


def test_what_is_left_is_renormalised_and_the_dropped_get_no_gradient() -> None:
    logits = P.log().requires_grad_()
    limited, outside = restricted(logits, torch.tensor([1]), Sampling(top_k=2))
    logprobs = limited.log_softmax(-1)
    torch.testing.assert_close(logprobs[0, :2].exp(), torch.tensor([4 / 7, 3 / 7]))
    logprobs[0, 1].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-4 / 7, 4 / 7, 0.0, 0.0]]))
    assert outside.tolist() == [False]


def test_a_sampled_token_outside_the_support_stays_and_is_marked() -> None:
    limited, outside = restricted(P.log(), torch.tensor([3]), Sampling(top_k=2))
    assert outside.tolist() == [True]
    torch.testing.assert_close(limited.softmax(-1), torch.tensor([[4 / 8, 3 / 8, 0.0, 1 / 8]]))


def test_the_importance_weight_of_an_on_policy_token_is_1_under_the_same_support() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    behavior = logits.masked_fill(~kept_tokens(logits, Sampling(1.0, 5, 0.8)), -math.inf).log_softmax(-1)
    tokens = torch.multinomial(behavior.exp(), 1, generator=torch.Generator().manual_seed(1)).flatten()
    limited, outside = restricted(logits, tokens, Sampling(1.0, 5, 0.8))
    mine = limited.log_softmax(-1).gather(-1, tokens[:, None])
    torch.testing.assert_close(mine, behavior.gather(-1, tokens[:, None]))
    assert not outside.any()
