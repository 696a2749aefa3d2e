"""Small models and tokenizers: a character tokenizer, a random Qwen3, folders of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:<>我今天去了公园玩吃睡"
VOCAB_SIZE = 64


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: i for i, token in enumerate(["<|end|>", "<|pad|>", "<|unk|>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )


def random_qwen3(seed: int, tied: bool = True, width: int = 32) -> Qwen3ForCausalLM:
    """Two layers of Qwen3 with weights wide enough that its distributions differ clearly from uniform."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    return model


WIDTH = 128
"""Of the models here: every matrix has rows of 64, 128 or 192 numbers."""


def config_folder(path: Path, **sizes: Any) -> Path:
    """A model config_folder with a config alone."""
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    LlamaConfig(**small | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes).save_pretrained(path)
    return path


def write_small_model(folder: Path) -> Path:
    """A random Qwen3 with a tied head, and words for its 64 tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    return folder
