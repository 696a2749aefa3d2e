"""How Adam's two moments are kept between optimizer steps: in float32 or in 8 bits, on the device or in host memory.

The arithmetic of a step does not know: it is given both moments of a parameter in float32, on the parameter's device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from align.extras import extra

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = (256, 128, 64)
"""Numbers that share a scale, the longest that divides a row. Blocks end with the rows, so that ranks cut none."""


class Moments:
    """Takes the moments of a parameter out of the form in which they are kept, and puts them back into it.

    In 8 bits a moment is one byte per number, the nearest of 256 values between -1 and 1 (0 and 1 for the second moment) that lie
    closer together towards 0, and a float32 scale per block of a row: its largest magnitude. Parameters with fewer than two
    dimensions, or rows that no block divides, stay in float32.

    Args:
        eight_bits: Whether to keep them so.
        offload: Whether to keep them in host memory.

    Source: Dettmers et al. (2022), 8-bit Optimizers via Block-wise Quantization, section 2, by the kernels of bitsandbytes. Here
    the **root** of the second moment is quantised: it spans half the orders of magnitude, so that it is not rounded to 0 where
    the first moment is not (their quotient would be `exp_avg / eps`). Blocks lie within rows, of at most 256 numbers where the
    paper has 2,048 across rows.
    """

    def __init__(self, eight_bits: bool, offload: bool) -> None:
        self.eight_bits = eight_bits
        self.offload = offload
        if eight_bits:
            self._kernels = eight_bit_kernels()
            self._values = {name: self._kernels.create_dynamic_map(signed=name == "exp_avg") for name in MOMENTS}

    @property
    def as_adam_has_them(self) -> bool:
        """Whether there is nothing to convert."""
        return not self.eight_bits and not self.offload

    def keys(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of what is kept for a parameter, beside its count of steps."""
        return MOMENTS if self._block(parameter) is None else tuple(k for m in MOMENTS for k in _keys(m))

    def for_step(self, stored: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
        """Step count and moments as a step needs them: in float32 on the parameter's device; zeros before the first.

        Args:
            stored: From `to_store`, or empty.
            parameter: The parameter, or this rank's rows of it.
        """
        if not stored:
            return {"step": torch.tensor(0.0), **{name: torch.zeros_like(parameter) for name in MOMENTS}}
        on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in stored.items()}
        if (block := self._block(parameter)) is None:
            return on_device
        first, root = (self._dequantised(on_device, name, block) for name in MOMENTS)
        return {"step": on_device["step"], "exp_avg": first, "exp_avg_sq": root.square_()}

    def to_store(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state after a step in the form in which it is kept, where it is kept."""
        moments = {name: state[name] for name in MOMENTS}
        if (block := self._block(moments["exp_avg"])) is not None:
            root = moments["exp_avg_sq"].sqrt()
            moments = self._quantised("exp_avg", moments["exp_avg"], block) | self._quantised("exp_avg_sq", root, block)
        return {"step": state["step"], **{key: self.moved_to_store(value) for key, value in moments.items()}}

    def moved_to_store(self, value: Tensor) -> Tensor:
        """A tensor where it is to be kept. Pinned host memory is twice as fast to copy to and from."""
        if not self.offload or value.device.type == "cpu":
            return value
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value)

    def _block(self, parameter: Tensor) -> int | None:
        """Numbers that share a scale; None if the moments of the parameter stay in float32."""
        if not self.eight_bits or parameter.dim() < 2:
            return None
        return next((block for block in BLOCKS if parameter.shape[-1] % block == 0), None)

    def _quantised(self, name: str, value: Tensor, block: int) -> dict[str, Tensor]:
        codes, found = self._kernels.quantize_blockwise(value, code=self._values[name], blocksize=block)
        scales = found.absmax.view(*value.shape[:-1], value.shape[-1] // block)
        return dict(zip(_keys(name), (codes, scales), strict=True))

    def _dequantised(self, stored: Mapping[str, Tensor], name: str, block: int) -> Tensor:
        codes, scales = (stored[key] for key in _keys(name))
        values = self._values[name].to(codes.device)
        found: Tensor = self._kernels.dequantize_blockwise(codes, absmax=scales.flatten(), code=values, blocksize=block)
        return found


def _keys(name: str) -> tuple[str, str]:
    return f"{name}_codes", f"{name}_scales"


def eight_bit_kernels() -> Any:
    """The functions of bitsandbytes, for CPUs and GPUs.

    Raises:
        ValueError: If it is not installed.
    """
    return extra(
        "bitsandbytes.functional",
        "optimizer.moments = '8bit' needs the package bitsandbytes, which cannot be imported ({error}); "
        "pip install 'align[optim8bit]', or leave it at 'float32'",
    )
