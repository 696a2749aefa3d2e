"""Small random models of many families, as Hugging Face folders that transformers and vLLM both read.

Each is made so that what its family does differently is seen: attention windows are shorter than the sequences of the tests,
soft caps are low enough to bend the logits, weights wide enough that distributions differ clearly from uniform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

WINDOW = 16
"""Tokens that sliding-window attention sees; less than the sequences of the tests."""

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "output_router_logits": False}


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the matrix.

    Attributes:
        model_type: Name of the family in transformers.
        tied: Whether the output head is the embedding.
        kv_heads: Heads of keys and values, for 4 heads of queries.
        more: Further settings of its config.
    """

    model_type: str
    tied: bool
    kv_heads: int
    more: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "qwen3": Family("qwen3", tied=True, kv_heads=2),
    "llama": Family("llama", tied=False, kv_heads=2),
    "mistral": Family("mistral", tied=False, kv_heads=2, more={"sliding_window": WINDOW}),
    "gemma2": Family(
        "gemma2",
        tied=True,
        kv_heads=2,
        more={
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 32,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        tied=True,
        kv_heads=1,
        more={"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "sliding_window_pattern": 2},
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        tied=False,
        kv_heads=2,
        more={**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    ),
    # vLLM never normalises the weights of OLMoE's experts, whatever norm_topk_prob says; its default is false.
    "olmoe": Family(
        "olmoe",
        tied=False,
        kv_heads=4,
        more={**_EXPERTS, "num_experts": 4, "hidden_size": 128, "norm_topk_prob": False},
    ),
    "mixtral": Family("mixtral", tied=False, kv_heads=2, more={"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def random_model(name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Any:
    """The model of a family, in float32."""
    family = FAMILIES[name]
    special_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(
        family.model_type,
        vocab_size=len(tokenizer),
        num_key_value_heads=family.kv_heads,
        tie_word_embeddings=family.tied,
        dtype="float32",
        **(_COMMON | dict(family.more) | special_ids),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(**special_ids)
    return model


def write(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Save the family's model with its tokenizer."""
    random_model(name, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
