"""The types in which matrix products may run, over float32 master weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(
    device: torch.device, compute_dtype: str, *, cached: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """A block in which matrix products run in `compute_dtype`, a key of `DTYPES`.

    Args:
        device: Where they run.
        compute_dtype: Nothing happens for "float32".
        cached: Whether the weights' copies in that type are kept until the end of the block.
    """
    if compute_dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[compute_dtype], cache_enabled=cached)
