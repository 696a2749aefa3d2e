"""The head without logits against log-softmax in float64: values, gradients, chunks, and what is held at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from align.data.sampling import Sampling
from align.model.head import Head

N, D, V = 23, 12, 700
Loss = Callable[[Tensor, Tensor], Tensor]
CONFIGS = [
    pytest.param({}, id="linear"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"scale": 0.25}, id="scale"),
    pytest.param({"cap": 3.0, "bias": True, "scale": 0.5}, id="cap"),
    pytest.param({"weight": False}, id="logits"),
]
CHUNKS = [1, 4 * V * 5, 10**9]
"""Bytes for 1, 5 and all tokens."""


def tensors(weight: bool = True, bias: bool = False, **_: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D if weight else V, generator=generator)
    matrix = torch.randn(V, D, generator=generator) if weight else None
    return hidden, matrix, torch.randn(V, generator=generator) if bias else None


TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
COEFFICIENTS = torch.randn(2, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def token_loss(tokens: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """Nonlinear in the log-probability, linear in the entropy, different for each token."""
    first, second = (c[tokens].to(logprobs.dtype) for c in COEFFICIENTS)
    return (first * (logprobs + logprobs.exp()) + second * entropy).sum()


def only_logprobs(tokens: slice, logprobs: Tensor, _: Tensor) -> Tensor:
    return (COEFFICIENTS[0, tokens].to(logprobs.dtype) * logprobs).sum()


Result = tuple[list[Tensor], list[Tensor]]
"""Loss, log-probabilities, entropies; and gradients of hidden states, weight, bias."""


def run(way: str, temperature: float, loss: Callable[..., Tensor], max_bytes: int = 10**9, **config: float) -> Result:
    dtype = torch.float64 if way == "oracle" else torch.float32
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors(**config)]  # type: ignore[arg-type]
    hidden, weight, bias = leaves
    assert hidden is not None
    scale, cap = config.get("scale", 1.0), config.get("cap")
    head = Head(weight, bias, scale, cap, max_bytes=max_bytes)
    if way == "oracle":
        z = hidden if weight is None else scale * (hidden @ weight.T + (0 if bias is None else bias))
        z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
        log_p = torch.log_softmax(z, dim=-1)
        logprobs, entropy = log_p[torch.arange(N), TARGETS], -(log_p.exp() * log_p).sum(dim=-1)
        total = loss(slice(None), logprobs, entropy)
    elif way == "formed":
        total, logprobs, entropy = head.token_loss(hidden, TARGETS, loss, Sampling(temperature))
    else:
        logprobs, entropy = head.logprobs(hidden, TARGETS, Sampling(temperature))
        total = loss(slice(None), logprobs, entropy)
    total.backward()  # type: ignore[no-untyped-call]
    gradients = [t.grad for t in leaves if t is not None]
    return [t.detach() for t in (total, logprobs, entropy)], gradients  # type: ignore[return-value]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("loss", [token_loss, only_logprobs])
def test_values_and_gradients_are_those_of_log_softmax_in_float64_for_every_chunk_size(
    config: dict[str, float], temperature: float, loss: Callable[..., Tensor]
) -> None:
    values, gradients = run("oracle", temperature, loss, **config)
    assert all(float(g.abs().max()) > 1e-2 for g in gradients)
    for way, max_bytes in itertools.product(("formed", "recomputed"), CHUNKS):
        ours, our_gradients = run(way, temperature, loss, max_bytes, **config)
        for mine, expected in zip([*ours, *our_gradients], [*values, *gradients], strict=True):
            assert relative_error(mine, expected) < 1e-5, (way, max_bytes)


def test_the_callback_sees_the_tokens_in_order_chunk_by_chunk() -> None:
    hidden, weight, _ = tensors()
    seen: list[tuple[int, int]] = []

    def loss(tokens: slice, logprobs: Tensor, _: Tensor) -> Tensor:
        seen.append((tokens.start, tokens.stop))
        assert len(logprobs) == tokens.stop - tokens.start
        return logprobs.sum()

    Head(weight, max_bytes=4 * V * 10).token_loss(hidden, TARGETS, loss)
    assert seen == [(0, 10), (10, 20), (20, 23)]


def test_what_the_loss_is_multiplied_by_multiplies_its_gradient() -> None:
    hidden, weight, _ = (None if t is None else t.requires_grad_() for t in tensors())
    assert hidden is not None and weight is not None
    gradients = []
    for factor in (1.0, -2.5):
        loss, _, _ = Head(weight).token_loss(hidden, TARGETS, only_logprobs)
        gradients.append(torch.autograd.grad(factor * loss, (hidden, weight)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, -2.5 * one)


@pytest.mark.parametrize("way", ["formed", "recomputed"])
def test_logits_a_thousand_apart_give_no_nan_and_the_right_certainty(way: str) -> None:
    logits = torch.tensor([[0.0, 1000.0, -1000.0], [1000.0, 0.0, -1000.0]], requires_grad=True)
    head, targets = Head(), torch.tensor([1, 1])
    if way == "formed":
        loss, logprobs, entropy = head.token_loss(logits, targets, lambda _, lp, h: lp.sum() + h.sum())
    else:
        logprobs, entropy = head.logprobs(logits, targets)
        loss = logprobs.sum() + entropy.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert logprobs.tolist() == [0.0, -1000.0]
    assert entropy.tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0, 0], [-1, 1, 0]]


def test_a_frozen_head_gets_no_gradient_and_passes_on_that_of_the_hidden_states() -> None:
    _, (expected, _) = run("oracle", 1.0, token_loss)
    hidden, weight, _ = tensors()
    hidden.requires_grad_()
    loss, _, _ = Head(weight).token_loss(hidden, TARGETS, token_loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight is not None and weight.grad is None
    assert relative_error(hidden.grad, expected) < 1e-5


def test_no_tokens_give_a_loss_of_0_and_gradients_of_0() -> None:
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    loss, logprobs, _ = Head(weight).token_loss(hidden, torch.zeros(0, dtype=torch.long), token_loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.item(), logprobs.shape) == (0.0, (0,))
    assert weight.grad is not None and not weight.grad.any()


def test_bfloat16_products_stay_near_float32_over_float32_gradients() -> None:
    hidden, weight, _ = (None if t is None else t.requires_grad_() for t in tensors())
    assert hidden is not None and weight is not None
    _, (exact, exact_weight) = run("oracle", 1.0, only_logprobs)
    loss, _, _ = Head(weight, dtype=torch.bfloat16).token_loss(hidden, TARGETS, only_logprobs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    assert {hidden.grad.dtype, weight.grad.dtype} == {torch.float32}
    assert 1e-4 < relative_error(hidden.grad, exact) < 0.05
    assert 1e-4 < relative_error(weight.grad, exact_weight) < 0.05


def test_a_distribution_that_truncates_is_refused_since_its_support_needs_whole_rows() -> None:
    hidden, targets = torch.zeros(2, 3), torch.tensor([0, 1])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.9)):
        with pytest.raises(ValueError, match="never has the row"):
            Head(torch.zeros(4, 3)).logprobs(hidden, targets, sampling)
