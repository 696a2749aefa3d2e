"""Surrogates: three tokens by hand, oracles, gradients by hand and by finite differences, and bounds that are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm import surrogates
from tests.oracles import formulas as oracle

ALL = torch.ones(1, 3, dtype=torch.bool)
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
RATIOED: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, float]]] = {
    "importance_weighted": (surrogates.importance_weighted, {}),
    "ppo_clip": (surrogates.ppo_clip, CLIPS),
    "dual": (surrogates.ppo_clip, {**CLIPS, "dual_clip": 1.5}),
    "gspo": (surrogates.gspo, CLIPS),
    "cispo": (surrogates.cispo, CLIPS),
    "soft_gate": (surrogates.soft_gate, {"gate_positive": 1.0, "gate_negative": 2.0}),
}


def of_ratios(ratios: list[float], old: float = -3.0) -> tuple[Tensor, Tensor]:
    """Policy log-probs (a leaf) and old log-probs that have these ratios. [1, T] float64."""
    old_logprobs = torch.full((1, len(ratios)), old, dtype=torch.float64)
    return (old_logprobs + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_(), old_logprobs


def case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy and old log-probs, token advantages, and a ragged mask with a hole and an empty row. [4, 5]."""
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    policy = old + 0.4 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    return policy, old, advantages, mask


# --- by hand -----------------------------------------------------------------------------------------------------


def test_reinforce_is_minus_the_advantage_times_the_logprob_and_so_is_its_gradient() -> None:
    logprobs = torch.tensor([[-0.5, -1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, -3.0, 0.5]], requires_grad=True)
    loss = surrogates.reinforce(logprobs, advantages)
    assert loss.tolist() == [[1.0, -3.0, 1.0]]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-2.0, 3.0, -0.5]]
    assert advantages.grad is None


@pytest.mark.parametrize(
    ("name", "ratios", "advantages", "losses", "gradient", "clipped"),
    [
        ("importance_weighted", [2, 0.5, 1], [1, -1, 3], [-2, 0.5, -3], [-2, 0.5, -3], [0, 0, 0]),
        # A > 0: only too high a ratio is clipped. A < 0: only too low a one.
        ("ppo_clip", [2, 0.5, 1.1], [1, 1, 1], [-1.3, -0.5, -1.1], [0, -0.5, -1.1], [1, 0, 0]),
        ("ppo_clip", [2, 0.5, 1.1], [-1, -1, -1], [2, 0.8, 1.1], [2, 0, 1.1], [0, 1, 0]),
        ("dual", [2, 1.4, 0.5], [-2, -2, -2], [3, 2.8, 1.6], [0, 2.8, 0], [1, 0, 1]),
        ("dual", [2, 1.4, 1.1], [2, 0, 2], [-2.6, 0, -2.2], [0, 0, -2.2], [1, 0, 0]),
        # The geometric mean of 2, 1/4 and 2 is 1: no clip, and each token gets a third of the row's gradient.
        ("gspo", [2, 0.25, 2], [3, 3, 3], [-3, -3, -3], [-3, -3, -3], [0, 0, 0]),
        ("gspo", [2, 2, 2], [1, 1, 1], [-1.3, -1.3, -1.3], [0, 0, 0], [1, 1, 1]),
        ("gspo", [2, 2, 2], [-1, -1, -1], [2, 2, 2], [2, 2, 2], [0, 0, 0]),
        # The weight is clipped on both sides whatever the advantage, and every token keeps a gradient.
        ("cispo", [2, 0.5, 1], [1, -1, 2], None, [-1.3, 0.8, -2], [1, 1, 0]),
    ],
)
def test_three_tokens_by_hand(
    name: str, ratios: list[float], advantages: list[float], losses: Any, gradient: list[float], clipped: list[int]
) -> None:
    function, settings = RATIOED[name]
    policy, old = of_ratios(ratios)
    values, hit = function(policy, old, torch.tensor([advantages], dtype=torch.float64), ALL, **settings)
    if losses is None:
        losses = [g * p for g, p in zip(gradient, policy[0].tolist(), strict=True)]
    torch.testing.assert_close(values.detach(), torch.tensor([losses], dtype=torch.float64))
    values.sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([gradient], dtype=torch.float64))
    assert hit.tolist() == [[bool(c) for c in clipped]]


# --- oracles -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.floats(1.1, 3))
def test_losses_equal_the_loops(seed: int, low: float, high: float, dual: float) -> None:
    policy, old, advantages, mask = case(seed)
    results = {
        "importance_weighted": surrogates.importance_weighted(policy, old, advantages, mask)[0],
        "ppo_clip": surrogates.ppo_clip(policy, old, advantages, mask, low, high, dual)[0],
        "gspo": surrogates.gspo(policy, old, advantages, mask, low, high)[0],
        "cispo": surrogates.cispo(policy, old, advantages, mask, low, high)[0],
        "soft_gate": surrogates.soft_gate(policy, old, advantages, mask, dual, 10 * high)[0],
    }
    p, o, a = policy.tolist(), old.tolist(), advantages.tolist()
    for b, mask_row in enumerate(mask.tolist()):
        for t in oracle.actions(mask_row):
            ratio = math.exp(p[b][t] - o[b][t])
            sequence = oracle.sequence_ratio(p[b], o[b], oracle.actions(mask_row), geometric=True)
            expected = {
                "importance_weighted": -ratio * a[b][t],
                "ppo_clip": oracle.clipped_loss(ratio, a[b][t], low, high, dual),
                "gspo": oracle.clipped_loss(sequence, a[b][t], low, high),
                "cispo": -min(max(ratio, 1 - low), 1 + high) * a[b][t] * p[b][t],
                "soft_gate": oracle.soft_gate_loss(ratio, a[b][t], dual, 10 * high),
            }
            for name, value in expected.items():
                assert float(results[name][b, t]) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("name", ["importance_weighted", "ppo_clip", "dual", "gspo", "soft_gate"])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences(name: str, seed: int) -> None:
    function, settings = RATIOED[name]
    policy, old, advantages, mask = case(seed)

    def total(logprobs: Tensor) -> Tensor:
        return function(logprobs, old, advantages, mask, **settings)[0].masked_fill(~mask, 0.0).sum()

    assert torch.autograd.gradcheck(total, policy.requires_grad_(), eps=1e-7, atol=1e-5)


def test_the_gradient_of_cispo_is_that_of_reinforce_times_the_clipped_ratio() -> None:
    policy, old, advantages, mask = case(0)
    policy.requires_grad_()
    losses, _ = surrogates.cispo(policy, old, advantages, mask, 0.2, 0.3)
    losses.masked_fill(~mask, 0.0).sum().backward()
    weights = (policy.detach() - old).exp().clamp(0.8, 1.3)
    torch.testing.assert_close(policy.grad, (-weights * advantages).masked_fill(~mask, 0.0))


# --- properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIOED)
def test_on_policy_every_gradient_is_that_of_reinforce_for_row_advantages(name: str) -> None:
    function, settings = RATIOED[name]
    policy, _, _, mask = case(1)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)[:, None].expand(4, 5)
    gradients = []
    for losses in (
        lambda leaf: function(leaf, policy, advantages, mask, **settings)[0],
        lambda leaf: surrogates.reinforce(leaf, advantages),
    ):
        leaf = policy.clone().requires_grad_()
        losses(leaf).masked_fill(~mask, 0.0).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert not function(policy, policy, advantages, mask, **settings)[1].any()


@pytest.mark.parametrize("name", RATIOED)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_what_stands_outside_the_mask_changes_nothing_and_gets_no_gradient(name: str, garbage: float) -> None:
    function, settings = RATIOED[name]
    policy, old, advantages, mask = case(2)
    results = []
    for value in (0.0, garbage):
        leaf = policy.masked_fill(~mask, value).requires_grad_()
        losses, hit = function(leaf, old.masked_fill(~mask, value), advantages, mask, **settings)
        losses.masked_fill(~mask, 0.0).sum().backward()
        assert not hit[~mask].any()
        results.append((losses[mask], leaf.grad[mask], hit))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", RATIOED)
def test_the_loss_is_proportional_to_positive_scales_of_the_advantages(name: str) -> None:
    function, settings = RATIOED[name]
    policy, old, advantages, mask = case(3)
    one, hits = function(policy, old, advantages, mask, **settings)
    three, same_hits = function(policy, old, 3 * advantages, mask, **settings)
    torch.testing.assert_close(three[mask], 3 * one[mask])
    assert torch.equal(hits, same_hits)


@pytest.mark.parametrize("name", RATIOED)
def test_advantages_and_old_logprobs_are_constants(name: str) -> None:
    function, settings = RATIOED[name]
    policy, old, advantages, mask = (tensor.clone() for tensor in case(5))
    leaves = [tensor.requires_grad_() for tensor in (policy, old, advantages)]
    function(*leaves, mask, **settings)[0].masked_fill(~mask, 0.0).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [False, True, True]


@pytest.mark.parametrize("name", RATIOED)
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    function, settings = RATIOED[name]
    policy, old, advantages, mask = case(4)
    order = torch.tensor([2, 0, 3, 1])
    losses, hits = function(policy, old, advantages, mask, **settings)
    moved, moved_hits = function(policy[order], old[order], advantages[order], mask[order], **settings)
    torch.testing.assert_close(moved, losses[order])
    assert torch.equal(moved_hits, hits[order])


@pytest.mark.parametrize("name", ["importance_weighted", "ppo_clip"])
def test_a_log_ratio_beyond_20_is_bounded_counted_and_without_gradient(name: str) -> None:
    function, settings = RATIOED[name]
    policy = torch.tensor([[0.0, -500.0, -1.0]], requires_grad=True)
    losses, hit = function(policy, torch.tensor([[-500.0, 0.0, -1.0]]), -torch.ones(1, 3), ALL, **settings)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert float(losses[0, 0].detach()) == pytest.approx(math.exp(20), rel=1e-5)
    assert hit.tolist() == [[True, True, False]]
    assert policy.grad[0].tolist() == pytest.approx([0, 0, 1])


@pytest.mark.parametrize("function", [surrogates.ppo_clip, surrogates.gspo, surrogates.cispo])
@pytest.mark.parametrize(
    ("low", "high", "message"), [(-0.1, 0.2, "clip_low"), (1.1, 0.2, "clip_low"), (0.2, -1, "clip_high")]
)
def test_clips_out_of_range_are_refused(function: Callable[..., Any], low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), ALL, low, high)


def test_the_gradient_of_the_soft_gate_is_that_of_the_ratio_faded_by_how_far_it_is_from_1() -> None:
    """`4 p (1 - p)` with `p = sigmoid(tau (r - 1))`: at ratio 1 + log(3) / tau it is 3/4."""
    tau = math.log(3)
    policy, old = of_ratios([1.0, 2.0, 2.0])
    advantages = torch.tensor([[2.0, 2.0, -2.0]], dtype=torch.float64)
    losses, _ = surrogates.soft_gate(policy, old, advantages, ALL, tau, 1e-6)
    losses.sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[-2.0, -2 * 2 * 0.75, 2 * 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("gates", [(0.0, 1.0), (1.0, -1.0)])
def test_a_soft_gate_that_is_not_above_0_is_refused(gates: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="both must be above 0"):
        surrogates.soft_gate(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), ALL, *gates)


def test_a_dual_clip_of_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dual_clip is 1\.0; it must be above 1"):
        surrogates.ppo_clip(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 3), ALL, 0.2, 0.2, 1.0)
