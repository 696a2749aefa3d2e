"""The size of a model from its config alone: parameters, layers, keys and values. No weights are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.model.adapters import Adapter, AdapterConfig
from align.model.folder import read_config, without_weights
from cluster.faults import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the arithmetic of memory and traffic needs to know of a model.

    Attributes:
        num_parameters: All of them, a tied head once.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Number of logits.
        num_kv_heads: Heads of keys and values of one layer.
        head_dim: Width of one head.
        num_adapter_parameters: Of an adapter, which are trained instead; 0 without one.
        has_experts: Whether some layers are mixtures of experts.
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    num_adapter_parameters: int = 0
    has_experts: bool = False

    @property
    def num_trained(self) -> int:
        """Parameters with a gradient and Adam's two moments."""
        return self.num_adapter_parameters or self.num_parameters

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Keys and values of one token in all layers: 2 x layers x heads x width x bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def model_shape(folder: Path, adapter: AdapterConfig | None = None) -> ModelShape:
    """The shape of the model whose `config.json` is in `folder`, counted on a model without memory.

    Raises:
        ConfigError: If there is no config.json of a causal language model, or the adapter does not fit it.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model folder {folder} has no config.json",
            "download the model's config.json there (a plan needs no weights), or correct the path",
        )
    with _named(folder):
        config = read_config(folder)
    return shape_of(folder, config, adapter)


def shape_of(folder: Path, config: Any, adapter: AdapterConfig | None = None) -> ModelShape:
    """The same of a model whose config was read from `folder` already.

    Raises:
        ConfigError: If there is no causal language model of that config, or the adapter does not fit it.
    """
    with _named(folder):
        model = without_weights(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    text = model.config.get_text_config()
    num_heads = text.num_attention_heads
    return ModelShape(
        num_parameters=num_parameters,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        num_adapter_parameters=0 if adapter is None else _num_trained(model, adapter),
        has_experts=any(".experts." in name for name, _ in model.named_parameters()),
    )


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of transformers about a config, with the folder that it came from."""
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"model folder {folder}: config.json cannot be used: {error}", "see the message") from None


def _num_trained(model: Any, adapter: AdapterConfig) -> int:
    try:
        Adapter(model, adapter)
    except ValueError as error:
        raise ConfigError(
            f"[policy.adapter]: {error}", "name layers of the policy in policy.adapter.target_modules"
        ) from None
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
