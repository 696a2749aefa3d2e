"""Attention inside each of several sequences that stand in one row, at the cost of each alone.

A mask of blocks over a row of N tokens costs N * N wherever attention is computed from a dense mask. Here the row is cut
into its sequences, and each attends to itself. Used through transformers' own interface, by every model that asks it for its
attention; what masks a model wants (causal, sliding window, chunks) stays its own affair, see `_mask`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

NAME = "align_sequences"
_LONGEST: ContextVar[int] = ContextVar("longest", default=0)  # tokens of the row's first sequence; 0 outside `packed`


def enable(model: Any) -> None:
    """Make a transformers model use this attention; without `packed` it is transformers' own `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


@contextlib.contextmanager
def packed(lengths: Sequence[int], device: torch.device) -> Iterator[dict[str, Any]]:
    """Arguments for the forward pass of a model over one row of sequences, the longest first.

    They travel to every attention layer by name, so that activation checkpointing repeats the forward pass with them.
    The names of the bounds are transformers' own, which flash attention and linear-attention layers read.
    """
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    token = _LONGEST.set(max(lengths))
    try:
        yield {
            "position_ids": positions,
            "sequence_lengths": tuple(lengths),
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    finally:
        _LONGEST.reset(token)


def _mask(q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **settings: Any) -> Tensor | None:
    """The mask of the longest sequence, whose upper left corners are those of the others; None if it is only causal.

    The row starts with the longest sequence, so the mask that the model wants for the row starts with its mask.
    """
    from transformers.masking_utils import sdpa_mask

    if longest := _LONGEST.get():
        # Sequences in a row alone forbid the skip; what else a model may forbid it for, the trial of `Policy` would show.
        q_length = kv_length = longest
        allow_is_causal_skip = True
    mask: Tensor | None = sdpa_mask(
        q_length=q_length, kv_length=kv_length, allow_is_causal_skip=allow_is_causal_skip, **settings
    )
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: tuple[int, ...] = (),
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """[1, heads, N, D] -> [1, N, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    settings["scaling"] = scaling
    if not sequence_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]
    if query.is_cuda and query.dtype != torch.float32 and attention_mask is None and cu_seq_lens_q is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _flash(q, k, v, cu_seq_lens_q, max(sequence_lengths), scaling)[None], None
    cut = zip(*(torch.split(x, list(sequence_lengths), dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for n, (q, k, v) in zip(sequence_lengths, cut, strict=True):
        mask = None if attention_mask is None else attention_mask[:, :, :n, :n]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
    return torch.cat(outputs, dim=1), None


def _flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
    """torch's flash attention for sequences of several lengths, causal. [N, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.shape[1] != k.shape[1]
    causal = (-1, 0)
    result = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=causal, enable_gqa=grouped)
    assert isinstance(result, Tensor)
    return result
