"""Which computing type a processor is good at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NativeDtype:
    """The type and the reason, for the console."""

    dtype: str
    reason: str


def native_dtype(*, on_gpu: bool) -> NativeDtype:
    """bfloat16 where the hardware multiplies it, float32 where it would be emulated."""
    if on_gpu:
        return NativeDtype("bfloat16", "the engines run on GPUs")
    import torch

    if torch.cpu._is_amx_tile_supported():
        return NativeDtype("bfloat16", "the processor has AMX tiles")
    if torch.cpu._is_avx512_bf16_supported():
        return NativeDtype("bfloat16", "the processor has AVX-512 bfloat16 instructions")
    return NativeDtype("float32", "the processor has no bfloat16 instructions and would emulate them")
