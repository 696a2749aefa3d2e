"""Entropy guards: covariances by hand and by loops, and which tokens they single out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm import guards
from tests.oracles import formulas as oracle

RAGGED = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
EVERYTHING = (-math.inf, math.inf)


def case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    return logprobs, torch.randn(4, 5, generator=generator, dtype=torch.float64)


def test_the_covariance_of_three_tokens_by_hand() -> None:
    """Log-probabilities -1, -2, -3 and advantages 3, 0, 0: centred 1, 0, -1 and 2, -1, -1."""
    logprobs, advantages = torch.tensor([[-1.0, -2.0, -3.0, 9.0]]), torch.tensor([[3.0, 0.0, 0.0, 9.0]])
    covariance = guards.token_covariance(logprobs, advantages, torch.tensor([[True, True, True, False]]))
    assert covariance.tolist() == [[2.0, 0.0, 1.0, 0.0]]


@given(st.integers(0, 1000))
def test_covariances_equal_the_loops_and_their_mean_is_the_covariance(seed: int) -> None:
    logprobs, advantages = case(seed)
    actual = guards.token_covariance(logprobs, advantages, RAGGED)
    expected = torch.tensor(oracle.covariances(logprobs.tolist(), advantages.tolist(), RAGGED.tolist()))
    torch.testing.assert_close(actual, expected.double())
    both = torch.stack([logprobs[RAGGED], advantages[RAGGED]])
    torch.testing.assert_close(actual[RAGGED].mean(), torch.cov(both, correction=0)[0, 1])


def test_without_signal_in_the_advantages_every_covariance_is_exactly_0() -> None:
    logprobs, _ = case(0)
    assert not guards.token_covariance(logprobs, torch.full((4, 5), 0.9), RAGGED).any()


@pytest.mark.parametrize(
    ("fraction", "band", "expected"),
    [
        (0.5, EVERYTHING, [5, 3]),
        (0.3, EVERYTHING, [5]),
        (1e-9, EVERYTHING, [5]),
        (1.0, EVERYTHING, [5, 3, 2, 1]),
        (0.5, (0.0, 5.0), [3, 2]),
        (1.0, (1.0, 5.0), [3, 2]),
        (1.0, (7.0, 8.0), []),
    ],
)
def test_the_highest_covariances_within_the_bounds_are_taken(
    fraction: float, band: tuple[float, float], expected: list[float]
) -> None:
    covariance = torch.tensor([[1.0, 5.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    chosen = guards.highest(covariance, mask, fraction, *band)
    assert sorted(covariance[chosen].tolist()) == sorted(expected)


def test_of_equal_covariances_the_earlier_token_is_taken() -> None:
    chosen = guards.highest(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.67, *EVERYTHING)
    assert chosen.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="it must be above 0 and at most 1"):
        guards.highest(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), fraction, *EVERYTHING)
