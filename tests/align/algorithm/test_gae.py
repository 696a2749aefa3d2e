"""GAE, the value loss, explained variance: closed forms of three tokens, oracles over ragged rows, properties, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm import losses, returns
from tests.fakes.ragged import NUMBERS, Ragged, ragged
from tests.oracles import critic as oracle
from tests.oracles.equality import assert_equal

SHARE = st.floats(0, 1)
ROW = torch.ones(1, 3, dtype=torch.bool)


def test_three_tokens_computed_by_hand() -> None:
    """R = 1, 2, 4, V = 8, 6, 2, discount 1/2, lambda 1/2: delta = 1 + 3 - 8, 2 + 1 - 6, 4 - 2."""
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[8.0, 6.0, 2.0]])
    advantages, targets = returns.gae(rewards, values, ROW, 0.5, 0.5)
    last, middle = 2.0, -3.0 + 0.25 * 2.0
    assert advantages.tolist() == [[-4.0 + 0.25 * middle, middle, last]]
    assert targets.tolist() == [[8 - 4.0 + 0.25 * middle, 6 + middle, 2 + last]]


def test_lambda_0_is_the_one_step_error_and_lambda_1_the_return_less_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[8.0, 6.0, 2.0]])
    assert returns.gae(rewards, values, ROW, 0.5, 0.0)[0].tolist() == [[-4, -3, 2]]
    advantages, targets = returns.gae(rewards, values, ROW, 0.5, 1.0)
    assert targets.tolist() == [[1 + 1 + 1, 2 + 2, 4]]
    assert torch.equal(advantages, targets - values)


@given(ragged(), SHARE, SHARE)
def test_gae_equals_the_oracle_over_ragged_rows(case: Ragged, discount: float, gae_lambda: float) -> None:
    rewards, mask = case
    values = rewards.flip(0).cos() * 3
    advantages, targets = returns.gae(rewards, values, mask, discount, gae_lambda)
    expected = oracle.gae(rewards.tolist(), values.tolist(), mask.tolist(), discount, gae_lambda)
    assert_equal(advantages, expected)
    assert_equal((targets - values).masked_fill(~mask, 0.0), expected)
    assert not targets[~mask].any()


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), SHARE, SHARE)
def test_gae_is_the_mixture_of_k_step_advantages(
    row: list[tuple[float, float]], discount: float, gae_lambda: float
) -> None:
    rewards, values = ([pair[i] for pair in row] for i in (0, 1))
    mask = torch.ones(1, len(row), dtype=torch.bool)
    tensors = (torch.tensor([numbers], dtype=torch.float64) for numbers in (rewards, values))
    advantages, _ = returns.gae(*tensors, mask, discount, gae_lambda)
    assert_equal(advantages, [oracle.k_step_mixture(rewards, values, discount, gae_lambda)])


@given(ragged(), SHARE)
def test_with_lambda_1_and_no_values_gae_is_the_reward_to_go_bit_for_bit(case: Ragged, discount: float) -> None:
    rewards, mask = case[0].float(), case[1]
    advantages, targets = returns.gae(rewards, torch.zeros_like(rewards), mask, discount, 1.0)
    togo = returns.reward_to_go(rewards, mask, discount)
    assert torch.equal(advantages, togo)
    assert torch.equal(targets, togo)


@given(ragged(), SHARE, SHARE)
def test_the_true_values_leave_no_advantage_whatever_lambda(case: Ragged, discount: float, gae_lambda: float) -> None:
    rewards, mask = case
    values = returns.reward_to_go(rewards, mask, discount)
    advantages, targets = returns.gae(rewards, values, mask, discount, gae_lambda)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)
    torch.testing.assert_close(targets, values, rtol=1e-12, atol=1e-12)


def test_what_stands_outside_the_mask_is_not_read() -> None:
    mask = torch.tensor([[False, True, False, True]])
    rewards, values = torch.tensor([[math.nan, 1.0, math.nan, 2.0]]), torch.tensor([[math.inf, 3.0, math.nan, 5.0]])
    advantages, targets = returns.gae(rewards, values, mask, 0.5, 1.0)
    assert advantages.tolist() == [[0, 1 + 0.5 * 2 - 3, 0, -3]]
    assert targets.tolist() == [[0, 2, 0, 2]]


def test_gae_refuses_numbers_out_of_range_and_shapes_that_differ() -> None:
    tensor = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"gae_lambda is 1\.5"):
        returns.gae(tensor, tensor, ROW, 1.0, 1.5)
    with pytest.raises(ValueError, match=r"discount is -0\.1"):
        returns.gae(tensor, tensor, ROW, -0.1, 1.0)
    with pytest.raises(ValueError, match=r"\(1, 3\), \(1, 2\), \(1, 3\)"):
        returns.gae(tensor, tensor[:, :2], ROW)


# --- value loss --------------------------------------------------------------------------------------------------


def test_the_value_loss_of_three_tokens_by_hand_and_the_clipped_ones_are_marked() -> None:
    """Old values 0, clip 1, target 3: 0.5 is not cut; 2 counts as 1; -2 counts as itself, whose error is the larger one."""
    values, targets = torch.tensor([[0.5, 2.0, -2.0]]), torch.full((1, 3), 3.0)
    result, clipped = losses.value_loss(values, torch.zeros(1, 3), targets, ROW, 1.0)
    assert result.tolist() == [[0.5 * 2.5**2, 0.5 * 2.0**2, 0.5 * 5.0**2]]
    assert clipped.tolist() == [[False, True, False]]
    free, none = losses.value_loss(values, torch.zeros(1, 3), targets, ROW)
    assert free.tolist() == [[0.5 * 2.5**2, 0.5, 0.5 * 5.0**2]]
    assert not none.any()


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(0.01, 4))
def test_the_value_loss_equals_its_oracle(value: float, old: float, target: float, clip: float) -> None:
    tensors = (torch.tensor([[x]], dtype=torch.float64) for x in (value, old, target))
    result, _ = losses.value_loss(*tensors, torch.ones(1, 1, dtype=torch.bool), clip)
    assert float(result) == pytest.approx(oracle.value_loss(value, old, target, clip), rel=1e-12)


def test_the_gradient_of_the_value_loss_is_its_finite_difference_and_0_where_it_is_clipped() -> None:
    leaf = torch.tensor([[0.5, 2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    rest = (torch.zeros(1, 3).double(), torch.full((1, 3), 3.0).double(), ROW, 1.0)

    def loss(values: Tensor) -> Tensor:
        return losses.value_loss(values, *rest)[0].sum()

    loss(leaf).backward()
    assert leaf.grad is not None
    for t in range(3):
        step = torch.zeros_like(leaf)
        step[0, t] = 1e-6
        slope = float(loss(leaf.detach() + step) - loss(leaf.detach() - step)) / 2e-6
        assert float(leaf.grad[0, t]) == pytest.approx(slope, abs=1e-6)
    assert leaf.grad.tolist() == [[-2.5, 0, -5]]


def test_a_clip_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="clip is 0"):
        losses.value_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), ROW, 0.0)


# --- explained variance ------------------------------------------------------------------------------------------


def test_explained_variance_is_1_for_a_perfect_critic_0_for_a_constant_one_and_negative_for_a_worse_one() -> None:
    targets = torch.tensor([[1.0, 2.0, 3.0]])
    assert returns.explained_variance(targets + 7, targets, ROW) == 1  # a shift is not error: only the variance counts
    assert returns.explained_variance(torch.full((1, 3), 5.0), targets, ROW) == 0
    assert returns.explained_variance(-targets, targets, ROW) == -3


@given(ragged())
def test_explained_variance_equals_the_oracle(case: Ragged) -> None:
    targets, mask = case
    values = targets.sin()
    actual = returns.explained_variance(values, targets, mask)
    numbers = targets[mask]
    if numbers.numel() == 0 or float(numbers.std(correction=0)) <= 1e-6 * float(numbers.abs().max()):
        assert actual == 0
    else:
        expected = oracle.explained_variance(values.tolist(), targets.tolist(), mask.tolist())
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9)


# --- adaptive KL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1 + 0.1 * 0.5), (60.0, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5), (-3.0, 0.9)]
)
def test_the_kl_coefficient_follows_the_error_up_to_a_fifth_of_its_share_of_the_horizon(
    kl: float, factor: float
) -> None:
    assert losses.adapted_kl_coefficient(0.25, kl, 6.0, 50, 100) == pytest.approx(0.25 * factor)


def test_a_controlled_kl_settles_at_the_target() -> None:
    """A policy whose KL is 1 / coefficient: the coefficient goes to 1 / target from either side."""
    for start in (0.01, 5.0):
        coefficient = start
        for _ in range(400):
            coefficient = losses.adapted_kl_coefficient(coefficient, 1 / coefficient, 4.0, 100, 1000)
        assert coefficient == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize(
    ("coefficient", "target", "num", "horizon"), [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 2, 1)]
)
def test_a_controller_that_could_change_the_sign_is_refused(
    coefficient: float, target: float, num: int, horizon: int
) -> None:
    with pytest.raises(ValueError, match="must be above 0, and the horizon"):
        losses.adapted_kl_coefficient(coefficient, 1.0, target, num, horizon)
