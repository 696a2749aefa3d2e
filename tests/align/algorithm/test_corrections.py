"""Importance weights: closed forms, bounds that are counted, oracles, and what they do to an expectation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithm import corrections, surrogates
from tests.oracles import formulas as oracle

ALL = torch.ones(1, 3, dtype=torch.bool)
LOGITS = st.lists(st.floats(-3, 3), min_size=4, max_size=4)
LEVELS = ("token", "sequence_mean", "sequence_sum")


def test_importance_weights_are_the_ratio_up_to_the_limit_and_the_truncated_are_marked() -> None:
    policy = torch.tensor([[0.5, 0.3, 0.9]]).log()
    behavior = torch.tensor([[0.25, 0.6, 0.1]]).log()
    weights, truncated = corrections.importance_weights(policy, behavior, ALL, max_weight=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0]]))
    assert truncated.tolist() == [[False, False, True]]


def test_on_policy_the_importance_weights_are_exactly_1_and_none_is_truncated_even_at_limit_1() -> None:
    logprobs = -torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) * 20
    weights, truncated = corrections.importance_weights(
        logprobs, logprobs, torch.ones(2, 5, dtype=torch.bool), max_weight=1.0
    )
    assert torch.equal(weights, torch.ones(2, 5))
    assert not truncated.any()


def test_no_gradient_flows_through_importance_weights() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    weights, _ = corrections.importance_weights(logprobs, torch.tensor([[-1.5, -1.5, -1.5]]), ALL, max_weight=10.0)
    assert not weights.requires_grad
    (weights * surrogates.reinforce(logprobs, torch.ones(1, 3))).sum().backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([[0.5, -0.5, -1.5]]).exp())


def test_outside_the_mask_weights_are_1_whatever_stands_there() -> None:
    policy = torch.tensor([[100.0, float("nan"), -1.0]])
    weights, truncated = corrections.importance_weights(
        policy, torch.tensor([[-100.0, 0.0, -1.0]]), torch.tensor([[False, False, True]]), max_weight=2.0
    )
    assert weights.tolist() == [[1, 1, 1]]
    assert not truncated.any()


def test_an_overflowing_ratio_is_truncated_and_stays_finite() -> None:
    weights, truncated = corrections.importance_weights(
        torch.zeros(1, 3), torch.full((1, 3), -500.0), ALL, max_weight=2.0
    )
    assert weights.tolist() == [[2, 2, 2]]
    assert truncated.all()


def test_a_limit_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_weight is 0\.5"):
        corrections.importance_weights(torch.zeros(1, 3), torch.zeros(1, 3), ALL, max_weight=0.5)


@given(LOGITS, LOGITS)
def test_untruncated_importance_weights_turn_a_behavior_expectation_into_a_policy_expectation(
    policy_logits: list[float], behavior_logits: list[float]
) -> None:
    pi = torch.tensor([policy_logits], dtype=torch.float64).softmax(-1)
    mu = torch.tensor([behavior_logits], dtype=torch.float64).softmax(-1)
    score = torch.tensor([[1.0, -2.0, 5.0, 0.3]], dtype=torch.float64)
    weights, _ = corrections.importance_weights(
        pi.log(), mu.log(), torch.ones(1, 4, dtype=torch.bool), max_weight=math.inf
    )
    torch.testing.assert_close((mu * weights * score).sum(), (pi * score).sum())


@pytest.mark.parametrize(
    ("level", "bound", "expected", "outside"),
    [
        ("token", "truncated", [2.0, 0.5, 3.0], [False, True, True]),
        ("token", "masked", [2.0, 0.0, 0.0], [False, True, True]),
        ("token", "rejected", [1.0, 0.0, 0.0], [False, True, True]),
        ("sequence_sum", "rejected", [1.0] * 3, [False] * 3),
        ("sequence_mean", "truncated", [2 ** (1 / 3)] * 3, [False] * 3),
        ("sequence_sum", "truncated", [2.0] * 3, [False] * 3),
        ("sequence_sum", "masked", [2.0] * 3, [False] * 3),
    ],
)
def test_ratios_2_a_quarter_and_4_by_level_and_bound(
    level: str, bound: str, expected: list[float], outside: list[bool]
) -> None:
    ratios = torch.tensor([[2.0, 0.25, 4.0]])
    weights, hit = corrections.importance_weights(
        ratios.log(), torch.zeros(1, 3), ALL, level=level, bound=bound, min_weight=0.5, max_weight=3.0
    )
    torch.testing.assert_close(weights, torch.tensor([expected]))
    assert hit.tolist() == [outside]


@pytest.mark.parametrize("level", ["sequence_mean", "sequence_sum"])
@pytest.mark.parametrize(
    ("bound", "expected", "other"), [("truncated", 2, 1.5), ("masked", 0, 1.5), ("rejected", 0, 1)]
)
def test_a_trajectory_out_of_bounds_counts_all_its_tokens(
    level: str, bound: str, expected: float, other: float
) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    policy = torch.tensor([[4.0, 3.0, 99.0], [1.5, 99.0, 99.0]]).log()
    weights, hit = corrections.importance_weights(
        policy, torch.zeros(2, 3), mask, level=level, bound=bound, max_weight=2.0
    )
    torch.testing.assert_close(weights, torch.tensor([[expected, expected, 1.0], [other, 1.0, 1.0]]))
    assert hit.tolist() == [[True, True, False], [False, False, False]]


@given(st.data())
def test_weights_equal_the_oracle_over_ragged_rows(data: st.DataObject) -> None:
    cells = st.lists(st.floats(-2, 0), min_size=4, max_size=4)
    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    policy, behavior = [data.draw(cells) for _ in range(3)], [data.draw(cells) for _ in range(3)]
    mask = [data.draw(flags) for _ in range(3)]
    tensors = torch.tensor(policy, dtype=torch.float64), torch.tensor(behavior, dtype=torch.float64)
    for level in LEVELS:
        for bound in ("truncated", "masked", "rejected"):
            actual, hit = corrections.importance_weights(
                *tensors, torch.tensor(mask), level=level, bound=bound, min_weight=0.61, max_weight=1.37
            )
            expected = oracle.importance_weights(policy, behavior, mask, level, bound, 0.61, 1.37)
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
            free = oracle.importance_weights(policy, behavior, mask, level, "truncated", 0.0, math.inf)
            moved = [[not 0.61 <= w <= 1.37 for w in row] for row in free]
            assert hit.tolist() == [
                [a and b for a, b in zip(m, k, strict=True)] for m, k in zip(moved, mask, strict=True)
            ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_weight": 1.5}, r"min_weight is 1\.5"),
        ({"min_weight": -0.1}, r"min_weight is -0\.1"),
        ({"level": "batch"}, "unknown level 'batch'"),
        ({"bound": "cut"}, "unknown bound 'cut'"),
    ],
)
def test_bounds_that_would_cut_on_policy_tokens_and_unknown_names_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        corrections.importance_weights(torch.zeros(1, 3), torch.zeros(1, 3), ALL, max_weight=2.0, **settings)


def test_the_effective_sample_fraction_of_weights_1_1_2() -> None:
    weights = torch.tensor([[1.0, 1.0, 2.0, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert corrections.effective_sample_fraction(weights, mask) == pytest.approx(16 / (3 * 6))
    assert corrections.effective_sample_fraction(3 * weights, mask) == pytest.approx(16 / (3 * 6))


def test_equal_weights_are_fully_effective_one_alone_is_one_of_n_and_none_is_0() -> None:
    assert corrections.effective_sample_fraction(torch.full((1, 3), 0.7), ALL) == pytest.approx(1)
    assert corrections.effective_sample_fraction(torch.tensor([[0.0, 5.0, 0.0]]), ALL) == pytest.approx(1 / 3)
    assert corrections.effective_sample_fraction(torch.zeros(1, 3), ALL) == 0
    assert corrections.effective_sample_fraction(torch.ones(1, 3), ~ALL) == 0


@given(LOGITS, LOGITS)
def test_the_mean_of_the_chi_square_estimate_is_the_divergence(logits: list[float], other: list[float]) -> None:
    pi, mu = oracle.softmax(logits), oracle.softmax(other)
    log_pi, log_mu = torch.tensor([pi]).double().log(), torch.tensor([mu]).double().log()
    one = torch.ones(1, 1, dtype=torch.bool)
    each = [corrections.chi_square(log_pi[:, v : v + 1], log_mu[:, v : v + 1], one) for v in range(4)]
    exact = sum(p * p / m for p, m in zip(pi, mu, strict=True)) - 1
    assert sum(m * e for m, e in zip(mu, each, strict=True)) == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_chi_square_is_0_on_policy_finite_at_any_distance_and_0_without_tokens() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]])
    assert corrections.chi_square(logprobs, logprobs, ALL) == 0
    assert math.isfinite(corrections.chi_square(logprobs + 500, logprobs, ALL))
    assert corrections.chi_square(logprobs + 5, logprobs, ~ALL) == 0
