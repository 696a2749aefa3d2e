"""Weights on their way: what the fingerprint notices, what travels, and when a canary gap counts."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.actors.weights import WeightsConfig, export_weights, fingerprint
from cluster.faults import TrainingDiverged

Weights = dict[str, Tensor]
SIZES = (1, 5, 1023, 1024, 1025, 2048, 3 * 1024 + 7)  # words: below, at and above whole rows of the checksum


def some_weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (40, 64), "square": (64, 64), "other_square": (64, 64), "wide": (4, 1024), "norm": (7,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def of(weights: Weights) -> str:
    return fingerprint(weights.items())


def swap_rows(weights: Weights, name: str, first: int, second: int) -> Weights:
    order = list(range(len(weights[name])))
    order[first], order[second] = second, first
    return {**weights, name: weights[name][order]}


DIFFERENCES: dict[str, Callable[[Weights], Weights]] = {
    "two tensors swapped": lambda w: {**w, "square": w["other_square"], "other_square": w["square"]},
    "a tensor renamed": lambda w: {("new" if name == "norm" else name): tensor for name, tensor in w.items()},
    "a tensor missing": lambda w: {name: tensor for name, tensor in w.items() if name != "norm"},
    "a tensor too many": lambda w: {**w, "copy": w["norm"]},
    "a tensor transposed": lambda w: {**w, "square": w["square"].T},
    "a tensor of another shape": lambda w: {**w, "embed": w["embed"].reshape(64, 40)},
    "the same bits of another type": lambda w: {**w, "norm": w["norm"].view(torch.int32)},
    "rounded to another type": lambda w: {name: tensor.to(torch.bfloat16) for name, tensor in w.items()},
    "neighbouring rows swapped": lambda w: swap_rows(w, "square", 0, 1),
    "far rows swapped": lambda w: swap_rows(w, "embed", 0, 39),
    "whole rows of the checksum swapped": lambda w: swap_rows(w, "wide", 1, 3),
    "columns swapped": lambda w: {**w, "wide": w["wide"][:, [1, 0, *range(2, 1024)]]},
    "a zero of another sign": lambda w: {**w, "norm": w["norm"] * torch.tensor([-1.0] + [1.0] * 6)},
    "what was added here taken away there": lambda w: {**w, "wide": _move(w["wide"])},
    "all zero": lambda w: {name: torch.zeros_like(tensor) for name, tensor in w.items()},
}


def _move(wide: Tensor) -> Tensor:
    words = wide.clone().view(torch.int32)
    words[0, 0] += 5
    words[2, 9] -= 5
    return words.view(torch.float32)


@pytest.mark.parametrize("change", DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_a_difference_shows(change: Callable[[Weights], Weights]) -> None:
    weights = some_weights()
    weights["norm"][0] = 0.0
    assert of(change(weights)) != of(weights)


@given(
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_one_flipped_bit_shows_wherever_it_is(size: int, dtype: torch.dtype, place: float, bit: int) -> None:
    weight = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    flipped = weight.clone()
    flipped.view(torch.uint8)[int(place * size * dtype.itemsize)] ^= 1 << bit
    assert of({"w": flipped}) != of({"w": weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_weights_and_their_layout_in_memory_do_not_matter(dtype: torch.dtype) -> None:
    weights = some_weights(dtype)
    assert of(dict(reversed(weights.items()))) == of(weights)
    strided = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    assert not strided["wide"].is_contiguous()
    assert of(strided) == of(weights)


def test_values_that_are_not_finite_have_a_fingerprint_too() -> None:
    assert of({"w": torch.tensor([torch.nan])}) != of({"w": torch.tensor([torch.inf])})


def test_no_weights_have_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="no weights"):
        fingerprint([])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_arrive_as_they_were_exported(dtype: str) -> None:
    weights = some_weights()
    exported = pickle.loads(pickle.dumps(export_weights(weights.items(), 7, dtype)))
    arrived = exported.tensors()
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    assert arrived.keys() == expected.keys()
    for name, tensor in arrived.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert of(arrived) == exported.fingerprint == of(expected)
    assert exported.version == 7
    assert exported.num_bytes == sum(tensor.numel() for tensor in weights.values()) * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_never_exported(bad: float) -> None:
    weights = some_weights()
    weights["square"][3, 3] = bad
    with pytest.raises(TrainingDiverged, match="weight square of version 4 is not finite"):
        export_weights(weights.items(), 4, "float32")


def test_a_weight_that_overflows_the_wire_type_is_never_exported() -> None:
    with pytest.raises(TrainingDiverged, match="not finite"):
        export_weights([("w", torch.tensor([3.4e38]))], 4, "bfloat16")


def test_a_canary_gap_counts_earlier_for_an_exact_engine_than_for_a_rounding_one() -> None:
    exact, rounding = (WeightsConfig().canary_limits(dtype) for dtype in ("float32", "bfloat16"))
    assert (exact, rounding) == ((1e-4, 1e-3), (0.15, 0.5))


def test_a_limit_that_is_set_holds_for_every_type() -> None:
    cfg = WeightsConfig(canary_warn=0.2, canary_stop=0.4)
    assert cfg.canary_limits("float32") == cfg.canary_limits("bfloat16") == (0.2, 0.4)
    assert WeightsConfig(canary_stop=0.4).canary_limits("float32") == (1e-4, 0.4)
