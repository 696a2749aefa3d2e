"""What several test files need: a character tokenizer and a small random Qwen3, as an object and as a folder."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from align.model.policy import Policy

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:<>我今天去了公园玩吃睡"
VOCAB_SIZE = 64

hypothesis.settings.register_profile("align", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("align")
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer; treat it as read-only."""
    return character_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder with a random Qwen3 and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    random_qwen3(seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A fresh random Qwen3 policy; equal in every test."""
    return Policy(random_qwen3(seed=0), tokenizer)
