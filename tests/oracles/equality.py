"""When two sets of tensors are equal: bit for bit, up to rounding, and to an oracle's lists of numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor | np.ndarray]
TOLERANCE = 2e-6
"""What the order of float32 sums may change in five steps, relative to the largest entry of a tensor."""


def assert_bitwise(actual: Tensors, expected: Tensors) -> None:
    """The same names, types and bits."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        ours, theirs = torch.as_tensor(value), torch.as_tensor(expected[name])
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Equal up to float32 rounding, which is measured against the largest entry of each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        atol = rtol * float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)


def assert_near(actual: Tensors, expected: Tensors, tolerance: float = TOLERANCE) -> None:
    """No entry differs by more than `tolerance` of the largest of its tensor."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        atol = tolerance * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)


def assert_equal(actual: Tensor, expected: list[list[float]]) -> None:
    """An oracle's numbers, in float64."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=1e-9)
