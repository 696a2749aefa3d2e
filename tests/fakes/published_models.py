"""The models of the run files for clusters, in their published sizes, and the cluster that each run names."""

from __future__ import annotations

from typing import Any

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}


def sizes(layers: int, width: int, inner: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }


# From the config.json that each model is published with; and its number of parameters, in billions.
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-1.7B": (QWEN | sizes(28, 2048, 6144, 16) | {"tie_word_embeddings": True}, 1.7),
    "Llama-3.1-8B-Instruct": (LLAMA | sizes(32, 4096, 14336, 32), 8.0),
    "Qwen3-32B": (QWEN | sizes(64, 5120, 25600, 64) | {"tie_word_embeddings": False}, 32.8),
    "Llama-3.1-70B-Instruct": (LLAMA | sizes(80, 8192, 28672, 64), 70.6),
}
CLUSTERS = {
    "qwen3_1.7b_one_gpu": "one_gpu",
    "llama_8b_eight_gpus": "eight_gpus",
    "qwen3_32b_two_nodes": "sixteen_gpus",
    "llama_70b_eight_nodes": "sixty_four_gpus",
}
GPUS = {"one_gpu": 1, "eight_gpus": 8, "sixteen_gpus": 16, "sixty_four_gpus": 64}
