"""Divergences from a reference: oracles over the whole vocabulary and the likeliest tokens, and their gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.algorithm.distillation import KINDS, divergence, with_rest
from tests.oracles import formulas as oracle

V = 7


def case(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of policy and reference. [3, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 3, V, generator=generator, dtype=torch.float64)
    return logits[0], logits[1]


def of_logits(logits: Tensor, ref: Tensor, kind: str, num_top: int, mixture: float = 0.3) -> Tensor:
    top = ref.log_softmax(-1).topk(num_top, dim=-1)
    return divergence(logits.log_softmax(-1).gather(-1, top.indices), top.values, kind, mixture)


@given(st.integers(0, 1000), st.integers(1, V), st.floats(0.01, 0.99))
def test_divergences_equal_the_loops_with_all_other_tokens_as_one(seed: int, num_top: int, mixture: float) -> None:
    logits, ref = case(seed)
    for kind in KINDS:
        actual = of_logits(logits, ref, kind, num_top, mixture)
        for value, own, other in zip(actual.tolist(), logits.tolist(), ref.tolist(), strict=True):
            p, q = oracle.softmax(own), oracle.softmax(other)
            kept = sorted(range(V), key=lambda v: -q[v])[:num_top]
            both = oracle.merged(p, kept), oracle.merged(q, kept)
            assert value == pytest.approx(oracle.divergence(*both, kind, mixture), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_whole_vocabulary_it_is_the_exact_divergence_and_with_less_it_is_at_most_that(kind: str) -> None:
    logits, ref = case(5)
    p, q = logits.softmax(-1), ref.softmax(-1)
    mean = 0.3 * q + 0.7 * p

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    exact = {
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "jensen_shannon": 0.3 * kl(q, mean) + 0.7 * kl(p, mean),
    }[kind]
    by_size = [of_logits(logits, ref, kind, k) for k in range(1, V + 1)]
    torch.testing.assert_close(by_size[-1], exact, rtol=1e-12, atol=1e-12)
    for smaller, larger in itertools.pairwise(by_size):
        assert (smaller <= larger + 1e-12).all()
    assert (by_size[0] >= 0).all()
    assert (by_size[0] < 0.99 * exact).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_top", [1, 3, V])
def test_gradients_are_those_of_finite_differences(kind: str, num_top: int) -> None:
    logits, ref = case(2)
    assert torch.autograd.gradcheck(
        lambda leaf: of_logits(leaf, ref, kind, num_top).sum(), logits.requires_grad_(), eps=1e-6, atol=1e-6
    )


def test_the_gradient_of_the_reverse_kl_by_hand() -> None:
    """`d KL / d logit_v = p_v (log p_v - log q_v - KL)`."""
    logits, ref = case(3)
    logits.requires_grad_()
    value = of_logits(logits, ref, "reverse_kl", V)
    value.sum().backward()
    difference = logits.log_softmax(-1) - ref.log_softmax(-1)
    expected = logits.softmax(-1) * (difference - value[:, None])
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_it_is_0_and_so_is_its_gradient(kind: str) -> None:
    _, ref = case(4)
    logits = ref.clone().requires_grad_()
    value = of_logits(logits, ref, kind, 3)
    value.sum().backward()
    assert float(value.detach().abs().max()) < 1e-12
    assert float(logits.grad.abs().max()) < 1e-12


@pytest.mark.parametrize(("mixture", "like"), [(1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")])
def test_at_its_ends_the_mixture_gives_the_two_kls(mixture: float, like: str) -> None:
    logits, ref = case(1)
    value = of_logits(logits, ref, "jensen_shannon", V, mixture) / 1e-4
    torch.testing.assert_close(value, of_logits(logits, ref, like, V), rtol=0.02, atol=0)


def test_the_rest_is_what_is_left_to_1_and_never_0() -> None:
    logprobs = torch.tensor([[0.5, 0.25], [0.5, 0.5]]).log()
    torch.testing.assert_close(with_rest(logprobs)[:, -1].exp(), torch.tensor([0.25, torch.finfo(torch.float32).eps]))


@pytest.mark.parametrize(
    ("kind", "mixture", "message"), [("kl", 0.5, "unknown divergence"), ("reverse_kl", 1.0, "mixture is 1.0")]
)
def test_unknown_names_and_mixtures_out_of_range_are_refused(kind: str, mixture: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), kind, mixture)
