"""The arithmetic behind the utilisation that the GPU benchmarks report."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.gpu.flops import CONFIGS, matrix_parameters, peak_flops, step_flops


def test_the_parameters_are_those_of_the_models_linear_layers() -> None:
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert matrix_parameters(config) == linear


@pytest.mark.parametrize(("name", "without_head"), [("0.6B", 440_401_920), ("4B", 3_633_315_840)])
def test_the_benchmarks_models_have_the_published_sizes(name: str, without_head: int) -> None:
    """0.44B and 3.6B parameters without embedding, as the cards of Qwen3-0.6B and Qwen3-4B say."""
    config = CONFIGS[name]
    assert matrix_parameters(config) - config.hidden_size * config.vocab_size == without_head


def test_three_tokens_of_one_layer_by_hand() -> None:
    """Parameters: attention 8 * (2 * 8 + 2 * 4), MLP 3 * 8 * 16, head 8 * 10; scores and values: 12 * 8 * 9 / 2."""
    config = Qwen3Config(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    assert matrix_parameters(config) == 192 + 384 + 80
    assert step_flops(config, [3]) == 6 * 656 * 3 + 12 * 8 * 9 / 2


def test_two_short_sequences_attend_less_than_a_long_one() -> None:
    config = CONFIGS["0.6B"]
    long, short = step_flops(config, [2048]), step_flops(config, [1024, 1024])
    assert long - short == 12 * 28 * 16 * 128 * (2048**2 - 2 * 1024**2) / 2


def test_the_peak_is_found_by_the_devices_name_and_unknown_devices_have_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
