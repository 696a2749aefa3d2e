"""Completions by transformers, from the model's plain distribution, for policies that no engine serves."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from align.model.ranks import is_sharded


@torch.no_grad()
def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    ends: Collection[int],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Sample one completion per prompt from `softmax(logits / temperature)`; the process's RNGs stay as they were.

    Args:
        model: Any `AutoModelForCausalLM`; of a sharded one every rank has to ask.
        prompts: Token ids.
        pad: What stands before shorter prompts and after shorter completions.
        ends: Tokens that end a completion.
        max_tokens: Most tokens of a completion.
        temperature: Above 0.
        seed: Of all completions together.

    Returns:
        Token ids up to and including the end token.
    """
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.random.fork_rng(), _plain_generation(model, pad, ends):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=attention,
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            synced_gpus=is_sharded(model),  # no rank stops before the others
        )
    return [_until_end(row.tolist(), ends) for row in output[:, longest:]]


@contextlib.contextmanager
def _plain_generation(model: Any, pad: int, ends: Collection[int]) -> Iterator[None]:
    """The model without its folder's generation settings; `generate` falls back on them for all it is not told."""
    from transformers import GenerationConfig

    configured = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = configured


def _until_end(completion: list[int], ends: Collection[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(completion) if token in ends), len(completion))
    return completion[:stop]
