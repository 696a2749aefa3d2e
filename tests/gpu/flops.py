"""Floating-point operations of a learner step, and what a GPU could do in the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Qwen3Config

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bfloat16 per second of the SXM boards, by a part of the device's name; from NVIDIA's data sheets."""


def matrix_parameters(config: Any) -> int:
    """Weights that every token is multiplied with: attention, MLP and head; neither the embedding nor norms."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention = config.hidden_size * (2 * query + 2 * key)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def step_flops(config: Any, lengths: Sequence[int]) -> float:
    """Forward and backward over sequences of these lengths; what is recomputed to save memory does not count.

    `6 * parameters` per token; and per layer and sequence `3 * 2 * 2 * heads * head_dim * T^2 / 2` for scores and values under
    causal attention.

    Source: Chowdhery et al. (2022), PaLM, appendix B (departs: the half that a causal mask hides is not counted).
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = sum(length**2 for length in lengths) / 2
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * attended
    return 6.0 * matrix_parameters(config) * sum(lengths) + attention


def peak_flops(device_name: str) -> float | None:
    """Of the device with this name, None if it is not in the table."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)


QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
"""What all sizes of the family share."""
CONFIGS = {
    "0.6B": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, **QWEN3
    ),
    "4B": Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **QWEN3),
}
