"""KL estimators and aggregation: closed forms, enumeration, gradients and oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithm import losses
from tests.oracles import formulas as oracle

LOGITS = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", math.log(2)), ("k2", 0.5 * math.log(2) ** 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_kl_estimators_of_one_token_twice_as_likely_as_under_the_reference(kind: str, expected: float) -> None:
    value = losses.kl_estimate(torch.tensor([0.4]).log(), torch.tensor([0.2]).log(), kind)
    assert float(value) == pytest.approx(expected, rel=1e-6)


@given(LOGITS, LOGITS)
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(logits: list[float], ref_logits: list[float]) -> None:
    p, q = oracle.softmax(logits), oracle.softmax(ref_logits)
    log_p, log_q = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()
    for kind in ("k1", "k3"):
        expectation = float((log_p.exp() * losses.kl_estimate(log_p, log_q, kind)).sum())
        assert expectation == pytest.approx(oracle.kl(p, q), abs=1e-12)
    assert (losses.kl_estimate(log_p, log_q, "k3") >= 0).all()


def test_k2_is_biased_and_k1_is_negative_for_some_tokens() -> None:
    p, q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
    log_p, log_q = torch.tensor(p).log(), torch.tensor(q).log()
    k2 = float((torch.tensor(p) * losses.kl_estimate(log_p, log_q, "k2")).sum())
    assert abs(k2 - oracle.kl(p, q)) > 0.05
    assert (losses.kl_estimate(log_p, log_q, "k1") < 0).tolist() == [False, True, True]


def test_all_kl_estimators_are_0_where_both_agree() -> None:
    logprobs = torch.tensor([-0.1, -3.0])
    for kind in ("k1", "k2", "k3", "k3_grad_k2"):
        assert losses.kl_estimate(logprobs, logprobs, kind).tolist() == [0, 0]


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="'k4'; choose k1, k2, k3 or k3_grad_k2"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@given(LOGITS, LOGITS)
def test_exact_kl_equals_the_loop_over_the_vocabulary(logits: list[float], ref_logits: list[float]) -> None:
    value = losses.exact_kl(torch.tensor([[logits]]), torch.tensor([[ref_logits]]))
    assert value.shape == (1, 1)
    assert float(value) == pytest.approx(oracle.kl(oracle.softmax(logits), oracle.softmax(ref_logits)), abs=2e-6)


def test_exact_kl_ignores_a_shift_of_the_logits_and_has_a_direction() -> None:
    logits, ref_logits = torch.tensor([3.0, 0.0, 0.0]), torch.zeros(3)
    forward, backward = losses.exact_kl(logits, ref_logits), losses.exact_kl(ref_logits, logits)
    torch.testing.assert_close(losses.exact_kl(logits + 7, ref_logits - 3), forward)
    assert abs(float(forward - backward)) > 0.1


@given(LOGITS, LOGITS)
def test_the_expected_gradients_are_0_for_k1_of_the_kl_for_k2_and_of_the_reversed_kl_for_k3(
    logits: list[float], ref_logits: list[float]
) -> None:
    ref = torch.tensor(ref_logits, dtype=torch.float64).log_softmax(-1)
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_pi = leaf.log_softmax(-1)
    exact = {
        "forward": (log_pi.exp() * (log_pi - ref)).sum(),
        "reversed": (ref.exp() * (ref - log_pi)).sum(),
        "zero": 0 * log_pi.sum(),
    }
    for kind, truth in {"k1": "zero", "k2": "forward", "k3": "reversed", "k3_grad_k2": "forward"}.items():
        estimate = (log_pi.exp().detach() * losses.kl_estimate(log_pi, ref, kind)).sum()
        (actual,) = torch.autograd.grad(estimate, leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(exact[truth], leaf, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_k3_with_the_gradient_of_k2_has_the_value_of_k3() -> None:
    logprobs, ref = torch.tensor([-0.5, -2.0], requires_grad=True), torch.tensor([-1.5, -0.2])
    value = losses.kl_estimate(logprobs, ref, "k3_grad_k2")
    torch.testing.assert_close(value, losses.kl_estimate(logprobs, ref, "k3"))
    value.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.0, -1.8]))


AGGREGATIONS = ("sum", "token_mean", "trajectory_mean", "trajectory_token_mean", "prompt_mean", "constant_length")


def test_aggregate_sums_what_the_mask_keeps_by_the_weight_of_its_row() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert float(losses.aggregate(values, mask, torch.tensor([2.0, 0.5]))) == 2 * 3 + 0.5 * 12


def test_what_the_mask_leaves_out_gets_no_gradient() -> None:
    values = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    losses.aggregate(values, torch.tensor([[True, False, True]]), torch.tensor([0.25])).backward()
    assert values.grad.tolist() == [[0.25, 0, 0.25]]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sum", [1, 1, 1, 1]),
        ("token_mean", [1 / 6] * 4),
        ("trajectory_mean", [1 / 3] * 4),
        ("trajectory_token_mean", [1 / 9, 1 / 6, 1 / 3, 1 / 3]),
        ("prompt_mean", [1 / 10, 1 / 10, 1 / 2, 1 / 2]),
        ("constant_length", [1 / 30] * 4),
    ],
)
def test_weights_of_trajectories_of_3_2_1_and_no_tokens_in_two_groups(aggregation: str, expected: list[float]) -> None:
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    weights = losses.trajectory_weights(aggregation, mask, torch.tensor([0, 0, 1, 1]), loss_length=10)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@given(st.data())
def test_every_aggregation_equals_its_oracle(data: st.DataObject) -> None:
    num_rows, num_tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    cells = st.lists(st.floats(-8, 8), min_size=num_tokens, max_size=num_tokens)
    flags = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    values = [data.draw(cells) for _ in range(num_rows)]
    mask = [data.draw(flags) for _ in range(num_rows)]
    groups = data.draw(st.lists(st.integers(0, 2), min_size=num_rows, max_size=num_rows))
    for how in AGGREGATIONS:
        weights = losses.trajectory_weights(how, torch.tensor(mask), torch.tensor(groups), loss_length=7)
        actual = losses.aggregate(torch.tensor(values, dtype=torch.float64), torch.tensor(mask), weights)
        assert float(actual) == pytest.approx(oracle.aggregated(values, mask, groups, how, 7), abs=1e-9), how


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_is_divided_by_0_in_a_batch_without_loss_tokens(aggregation: str) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    weights = losses.trajectory_weights(aggregation, mask, torch.tensor([0, 1]), loss_length=5)
    assert weights.isfinite().all()
    assert float(losses.aggregate(torch.ones(2, 3), mask, weights)) == 0


def test_an_unknown_aggregation_and_a_constant_of_no_length_are_refused() -> None:
    mask, index = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0])
    with pytest.raises(ValueError, match="'mean'; choose sum, token_mean, trajectory_mean"):
        losses.trajectory_weights("mean", mask, index)
    with pytest.raises(ValueError, match="needs a positive loss_length, got 0"):
        losses.trajectory_weights("constant_length", mask, index)
