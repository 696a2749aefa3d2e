"""Returns and baselines against the oracles of `reference.py`, and by their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm import returns
from tests.fakes.ragged import NUMBERS, Ragged, ragged
from tests.oracles import formulas as oracle
from tests.oracles.equality import assert_equal


def test_reward_to_go_of_a_row_computed_by_hand() -> None:
    rewards = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    mask = torch.tensor([[False, True, True, True]])
    assert returns.reward_to_go(rewards, mask).tolist() == [[0, 6, 5, 3]]
    assert returns.reward_to_go(rewards, mask, 0.5).tolist() == [[0, 1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3]]


def test_a_hole_in_the_mask_takes_no_time() -> None:
    rewards = torch.tensor([[1.0, 99.0, 99.0, 4.0]])
    mask = torch.tensor([[True, False, False, True]])
    assert returns.reward_to_go(rewards, mask, 0.5).tolist() == [[1 + 0.5 * 4, 0, 0, 4]]


@given(ragged(), st.floats(0, 1))
def test_reward_to_go_equals_the_oracle(case: Ragged, discount: float) -> None:
    rewards, mask = case
    expected = oracle.reward_to_go(rewards.tolist(), mask.tolist(), discount)
    assert_equal(returns.reward_to_go(rewards, mask, discount), expected)


@given(ragged(), NUMBERS, NUMBERS, st.floats(0, 1))
def test_reward_to_go_is_linear_in_the_rewards(case: Ragged, a: float, b: float, discount: float) -> None:
    first, mask = case
    second = first.flip(0).cos()
    together = returns.reward_to_go(a * first + b * second, mask, discount)
    apart = a * returns.reward_to_go(first, mask, discount) + b * returns.reward_to_go(second, mask, discount)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@given(ragged())
def test_discount_0_keeps_the_immediate_reward(case: Ragged) -> None:
    rewards, mask = case
    assert torch.equal(returns.reward_to_go(rewards, mask, 0.0), rewards.where(mask, 0.0))


@given(ragged())
def test_discount_1_is_the_suffix_sum(case: Ragged) -> None:
    rewards, mask = case
    suffix_sum = rewards.where(mask, 0.0).flip(1).cumsum(1).flip(1).where(mask, 0.0)
    torch.testing.assert_close(returns.reward_to_go(rewards, mask, 1.0), suffix_sum, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("discount", [-0.01, 1.01, float("nan")])
def test_a_discount_outside_0_to_1_is_refused(discount: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        returns.reward_to_go(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), discount)


def test_rewards_and_mask_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), mask has \(2, 4\)"):
        returns.reward_to_go(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))


@given(ragged())
def test_batch_mean_equals_the_oracle(case: Ragged) -> None:
    values, mask = case
    assert_equal(returns.batch_mean(values, mask), oracle.batch_mean(values.tolist(), mask.tolist()))


@given(ragged())
def test_position_mean_equals_the_oracle(case: Ragged) -> None:
    values, mask = case
    assert_equal(returns.position_mean(values, mask), oracle.position_mean(values.tolist(), mask.tolist()))


@given(ragged(), st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_group_mean_equals_the_oracle(case: Ragged, groups: list[int]) -> None:
    values, mask = case
    index = groups[: len(values)]
    actual = returns.group_mean(values, mask, torch.tensor(index))
    assert_equal(actual, oracle.group_mean(values.tolist(), mask.tolist(), index))


def test_position_mean_counts_actions_and_not_columns() -> None:
    values = torch.tensor([[0.0, 10.0, 20.0, 0.0], [0.0, 0.0, 40.0, 60.0]])
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    assert returns.position_mean(values, mask).tolist() == [[0, 25, 40, 0], [0, 0, 25, 40]]


def test_group_mean_keeps_groups_apart() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 0.0], [100.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    index = torch.tensor([0, 0, 1])
    assert returns.group_mean(values, mask, index).tolist() == [[3, 3], [3, 0], [100, 0]]


GROUPS = st.lists(st.integers(0, 2), min_size=4, max_size=4)


@given(ragged())
def test_outcomes_and_their_place_equal_the_oracle(case: Ragged) -> None:
    rewards, mask = case
    outcome = returns.outcomes(rewards, mask)
    expected = oracle.outcomes(rewards.tolist(), mask.tolist())
    torch.testing.assert_close(outcome, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_equal(returns.on_last_action(outcome, mask), oracle.on_last_action(expected, mask.tolist()))


def test_an_outcome_is_paid_at_the_last_action_and_is_the_return_of_every_action() -> None:
    rewards = torch.tensor([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    paid = returns.on_last_action(returns.outcomes(rewards, mask), mask)
    assert paid.tolist() == [[0, 0, 3, 0], [0, 0, 0, 0]]
    assert returns.reward_to_go(paid, mask).tolist() == [[0, 3, 3, 0], [0, 0, 0, 0]]


@given(ragged(), GROUPS)
def test_baselines_of_outcomes_equal_the_oracle(case: Ragged, groups: list[int]) -> None:
    rewards, mask = case
    index = groups[: len(rewards)]
    outcome = returns.outcomes(rewards, mask)
    for function, leave_out in ((returns.group_outcome_mean, False), (returns.leave_one_out, True)):
        expected = oracle.group_outcome_baseline(outcome.tolist(), mask.tolist(), index, leave_out)
        assert_equal(function(outcome, mask, torch.tensor(index)), expected)


@given(ragged(), GROUPS, st.sampled_from([0.0, 1e-6, 0.1]))
def test_division_by_the_group_std_equals_the_oracle(case: Ragged, groups: list[int], epsilon: float) -> None:
    rewards, mask = case
    index = groups[: len(rewards)]
    outcome = returns.outcomes(rewards, mask)
    stds = oracle.group_std(outcome.tolist(), mask.tolist(), index)
    if any(0 < std < 1e-3 for std in stds):
        return
    actual = returns.divide_by_group_std(rewards, outcome, mask, torch.tensor(index), epsilon)
    expected = [
        [r / (std + epsilon) if m and std else 0.0 for r, m in zip(row, mask_row, strict=True)]
        for row, mask_row, std in zip(rewards.tolist(), mask.tolist(), stds, strict=True)
    ]
    assert_equal(actual, expected)


def test_a_group_of_1_2_and_6_by_hand_each_trajectory_counted_once() -> None:
    outcome, index = torch.tensor([1.0, 2.0, 6.0, 50.0]), torch.tensor([0, 0, 0, 0])  # the last has no actions
    mask = torch.tensor([[True, True, True], [True, False, False], [False, True, True], [False, False, False]])
    assert returns.group_outcome_mean(outcome, mask, index)[:3].tolist() == [[3, 3, 3], [3, 0, 0], [0, 3, 3]]
    assert returns.leave_one_out(outcome, mask, index)[:3].tolist() == [[4, 4, 4], [3.5, 0, 0], [0, 1.5, 1.5]]
    advantages = (outcome - 3)[:, None].expand(4, 3)
    scaled = returns.divide_by_group_std(advantages, outcome, mask, index)
    expected = torch.tensor([[-2.0, -2, -2], [-1, 0, 0], [0, 3, 3], [0, 0, 0]]) / 7**0.5
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("constant", [0.9, 0.1, -1.7, 1e-7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 48])
def test_a_constant_group_has_advantage_exactly_0_beside_one_that_differs(
    constant: float, dtype: torch.dtype, num_rows: int
) -> None:
    outcome = torch.cat([torch.full((num_rows,), constant, dtype=dtype), torch.tensor([1.0, 0.0, 0.3], dtype=dtype)])
    index = torch.tensor([0] * num_rows + [1] * 3)
    mask = torch.ones(num_rows + 3, 2, dtype=torch.bool)
    for baseline in (returns.group_outcome_mean, returns.leave_one_out):
        advantages = outcome[:, None] - baseline(outcome, mask, index)
        scaled = returns.divide_by_group_std(advantages, outcome, mask, index)
        for values in (advantages, scaled):
            assert torch.equal(values[:num_rows], torch.zeros(num_rows, 2, dtype=dtype))
            assert values[num_rows:].abs().min() > 0.01


def test_a_spread_that_is_only_rounding_is_none_and_a_small_real_one_is_one() -> None:
    index, mask = torch.zeros(3, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool)

    def relative(values: list[float]) -> Tensor:
        outcome = torch.tensor(values, dtype=torch.float64)
        advantages = outcome[:, None] - returns.group_outcome_mean(outcome, mask, index)
        return returns.divide_by_group_std(advantages, outcome, mask, index)[:, 0]

    assert 0.1 + 0.2 != 0.3
    assert relative([0.1 + 0.2, 0.3, 0.3]).tolist() == [0, 0, 0]
    torch.testing.assert_close(relative([0.3, 0.3001, 0.3002]), torch.tensor([-1.0, 0, 1]).double(), atol=1e-6, rtol=0)


def test_six_rewards_of_nine_tenths_in_float32_have_group_relative_advantages_of_exactly_0() -> None:
    outcome, index, mask = torch.full((6,), 0.9), torch.zeros(6, dtype=torch.long), torch.ones(6, 4, dtype=torch.bool)
    advantages = outcome[:, None] - returns.group_outcome_mean(outcome, mask, index)
    assert torch.equal(returns.divide_by_group_std(advantages, outcome, mask, index), torch.zeros(6, 4))


@given(st.lists(NUMBERS, min_size=4, max_size=4), st.floats(0.1, 10), NUMBERS)
def test_group_relative_advantages_ignore_shift_and_scale_and_leave_one_out_scales(
    values: list[float], scale: float, shift: float
) -> None:
    outcome, index = torch.tensor(values, dtype=torch.float64), torch.tensor([0, 0, 0, 0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    if outcome.std() < 1e-2:
        return

    def relative(x: Tensor) -> Tensor:
        return returns.divide_by_group_std(x[:, None] - returns.group_outcome_mean(x, mask, index), x, mask, index)

    def left_out(x: Tensor) -> Tensor:
        return x[:, None] - returns.leave_one_out(x, mask, index)

    moved = scale * outcome + shift
    torch.testing.assert_close(relative(moved), relative(outcome), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(left_out(moved), scale * left_out(outcome), rtol=1e-6, atol=1e-6)
    # Leaving oneself out and subtracting the mean differ by the factor n / (n - 1).
    centred = outcome[:, None] - returns.group_outcome_mean(outcome, mask, index)
    torch.testing.assert_close(left_out(outcome), centred * 4 / 3, rtol=1e-9, atol=1e-9)


def test_the_order_of_rows_and_the_numbers_of_groups_do_not_matter() -> None:
    outcome = torch.tensor([1.0, 5.0, 2.0, 4.0, 4.5])
    index, mask = torch.tensor([0, 0, 1, 1, 1]), torch.ones(5, 2, dtype=torch.bool)
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.tensor([7, 7, 2, 2, 2])
    for function in (returns.group_outcome_mean, returns.leave_one_out):
        moved = function(outcome[order], mask, renamed[order])
        torch.testing.assert_close(moved, function(outcome, mask, index)[order])
    scaled = returns.divide_by_group_std(outcome[:, None].expand(5, 2), outcome, mask, index)
    moved = returns.divide_by_group_std(outcome[order][:, None].expand(5, 2), outcome[order], mask, renamed[order])
    torch.testing.assert_close(moved, scaled[order])


@given(ragged())
def test_whiten_equals_the_oracle_where_there_is_a_spread(case: Ragged) -> None:
    values, mask = case
    if mask.sum() < 2 or values[mask].std() < 1e-3:
        return
    assert_equal(returns.whiten(values, mask), oracle.whiten(values.tolist(), mask.tolist()))


@given(ragged(), st.floats(0.1, 10), NUMBERS)
def test_whiten_ignores_shift_and_scale(case: Ragged, scale: float, shift: float) -> None:
    values, mask = case
    if mask.sum() < 2 or values[mask].std() < 1e-3:
        return
    moved = returns.whiten(scale * values + shift, mask)
    torch.testing.assert_close(moved, returns.whiten(values, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constant", [0.9, 0.1, -1e6, 1e-7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rewards_whiten_to_exactly_0(constant: float, dtype: torch.dtype) -> None:
    for num_tokens in (1, 2, 6, 1000):
        values = torch.full((1, num_tokens), constant, dtype=dtype)
        assert torch.equal(returns.whiten(values, torch.ones_like(values, dtype=torch.bool)), torch.zeros_like(values))


def test_six_rewards_of_nine_tenths_in_float32_whiten_to_exactly_0() -> None:
    values = torch.full((2, 4), 0.9)
    mask = torch.tensor([[False, True, True, True], [False, True, True, True]])
    assert torch.equal(returns.whiten(values, mask), torch.zeros(2, 4))


@pytest.mark.parametrize("baseline", ["batch_mean", "position_mean", "group_mean"])
@pytest.mark.parametrize("constant", [0.9, 0.1, -1.7])
@pytest.mark.parametrize("num_rows", [3, 6, 7])
def test_equal_rewards_leave_no_advantage_whose_rounding_whitening_could_blow_up(
    baseline: str, constant: float, num_rows: int
) -> None:
    rewards = torch.full((num_rows, 5), constant)
    mask = torch.ones(num_rows, 5, dtype=torch.bool)
    discount = 1.0 if baseline == "position_mean" else 0.0  # else returns differ by position, and rightly so
    togo = returns.reward_to_go(rewards, mask, discount)
    index = (torch.zeros(num_rows, dtype=torch.long),) if baseline == "group_mean" else ()
    advantages = togo - getattr(returns, baseline)(togo, mask, *index)
    assert torch.equal(advantages, torch.zeros_like(advantages))
    assert torch.equal(returns.whiten(advantages, mask), torch.zeros_like(advantages))


def test_a_small_but_real_spread_is_whitened() -> None:
    values = torch.tensor([[0.9, 0.9001, 0.9002]])
    whitened = returns.whiten(values, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 0.0, 1.0]]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_values_outside_the_mask_change_nothing(garbage: float) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 6, generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    dirty = values.masked_fill(~mask, garbage)
    index = torch.tensor([0, 1, 0])
    outcome = returns.outcomes(values, mask)
    assert torch.equal(returns.outcomes(dirty, mask), outcome)
    for function in (
        lambda v: returns.divide_by_group_std(v, outcome, mask, index),
        lambda v: returns.reward_to_go(v, mask, 0.9),
        lambda v: returns.batch_mean(v, mask),
        lambda v: returns.position_mean(v, mask),
        lambda v: returns.group_mean(v, mask, index),
        lambda v: returns.whiten(v, mask),
    ):
        result = function(dirty)
        assert torch.equal(result, function(values.masked_fill(~mask, 0.0)))
        assert not result[~mask].any()


# --- over the batch, and over the steps of a group ---------------------------------------------------------------


@given(ragged(), st.lists(st.integers(0, 2), min_size=4, max_size=4), st.booleans(), st.sampled_from([0.0, 1e-4]))
def test_rewards_of_steps_against_their_group_equal_the_oracle(
    case: Ragged, groups: list[int], divide: bool, epsilon: float
) -> None:
    rewards, ends = case
    index = groups[: len(rewards)]
    actual = returns.group_relative_steps(rewards, ends, torch.tensor(index), divide, epsilon)
    assert_equal(actual, oracle.group_relative_steps(rewards.tolist(), ends.tolist(), index, divide, epsilon))


def test_steps_of_1_2_and_6_by_hand_each_counted_once_and_their_advantages_are_sums_of_what_follows() -> None:
    """The mean is 3, the variance (4 + 1 + 9) / 2 = 7."""
    rewards = torch.tensor([[0.0, 1.0, 0.0, 2.0], [6.0, 0.0, 0.0, 0.0]])
    ends, mask = rewards > 0, torch.tensor([[True] * 4, [True, True, False, False]])
    index = torch.tensor([0, 0])
    centred = returns.group_relative_steps(rewards, ends, index, divide=False)
    assert centred.tolist() == [[0, -2, 0, -1], [3, 0, 0, 0]]
    assert returns.reward_to_go(centred, mask).tolist() == [[-3, -3, -1, -1], [3, 0, 0, 0]]
    torch.testing.assert_close(returns.group_relative_steps(rewards, ends, index, divide=True), centred / 7**0.5)


def test_a_step_of_reward_0_counts_in_the_mean_and_a_token_that_ends_none_does_not() -> None:
    rewards, ends = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[True, False, True]])
    assert returns.group_relative_steps(rewards, ends, torch.tensor([0]), divide=False).tolist() == [[-0.5, 0, 0.5]]


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_of_all_steps_give_exactly_0(divide: bool, dtype: torch.dtype) -> None:
    rewards, ends = torch.full((6, 1), 0.9, dtype=dtype), torch.ones(6, 1, dtype=torch.bool)
    assert not returns.group_relative_steps(rewards, ends, torch.zeros(6, dtype=torch.long), divide).any()


def test_advantages_over_their_std_in_the_batch_count_each_trajectory_once() -> None:
    """Trajectories of 1, 1 and 3 tokens with advantages 1, -3 and 2: the mean is 0, the variance 14 / 2."""
    mask = torch.tensor([[True, False, False], [False, True, False], [True, True, True], [False, False, False]])
    advantages = torch.tensor([[1.0], [-3.0], [2.0], [99.0]]).expand(4, 3).masked_fill(~mask, 0.0)
    torch.testing.assert_close(returns.divide_by_batch_std(advantages, mask), advantages.masked_fill(~mask, 0) / 7**0.5)
    torch.testing.assert_close(
        returns.divide_by_batch_std(5 * advantages, mask), returns.divide_by_batch_std(advantages, mask)
    )


@pytest.mark.parametrize("rows", [1, 6])
def test_advantages_without_a_spread_in_the_batch_are_0(rows: int) -> None:
    mask = torch.ones(rows, 2, dtype=torch.bool)
    assert not returns.divide_by_batch_std(torch.full((rows, 2), 0.9), mask).any()
