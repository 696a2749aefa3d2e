"""Adapters: a frozen model and a small trained update of its matrices (LoRA, DoRA), by `peft`.

The policy is the sum of both. Whoever takes its weights (engines, folders, fingerprints, a reference that is refreshed) gets
the merged ones, under the names of the plain model, and needs to know nothing of adapters.

    LoRA:  W' = W + s B A                      with W [out, in] frozen, A [rank, in], B [out, rank] trained
    DoRA:  W' = m * V / ||V||, V = W + s B A   with m [out] trained, too; ||.|| of each row of V
    s = alpha / rank, or alpha / sqrt(rank) if rank-stabilised

A starts random and B at 0, so the policy starts as the frozen model. DoRA's gradient takes ||V|| for a constant, as its paper
has it (section 4.3): it is not quite the gradient of W'.

In float32 the merged weights and the learner's own sum agree to rounding. In bfloat16 an engine rounds W' where the learner
rounds W and the update, each by itself, so the mismatch is somewhat larger than with full weights.

The frozen model is at hand in the learner and could stand for a reference that is the first policy; here a scorer has its own
copy, as it has of any other reference.

Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA). Section 4.3 of the latter as peft cites it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors.torch import load_file
from torch import Tensor

_NAME = "default"  # peft's own for the adapter of a model that has one
_WEIGHTS = "adapter_model.safetensors"


class AdapterConfig(BaseModel):
    """What is trained instead of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lora", "dora"] = Field(
        "lora", description="lora, or dora, which also trains the length of each row."
    )
    rank: int = Field(16, ge=1, description="Of the update of a matrix.")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(False, description="Rank-stabilised: the update is scaled by alpha / sqrt(rank) instead.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="Ends of the names of the linear layers that are adapted, such as ['q_proj', 'v_proj']; all-linear: all but "
        "the head. The experts of a mixture are no linear layers here and stay frozen.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="0; see the error that another value gives.")
    publish: Literal["merged", "adapter"] = Field("merged", description="merged; see the error that the other gives.")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"dropout is {dropout}, which no engine does: the learner's log-probabilities would be of another policy than "
                "the one that sampled; it has to be 0"
            )
        return dropout

    @field_validator("publish")
    @classmethod
    def _only_merged(cls, publish: str) -> str:
        if publish != "merged":
            raise ValueError(
                "publish = 'adapter' is not offered: vLLM would have to be told of a new adapter for every version and has no "
                "DoRA; the merged weights go the verified way of all others. The run folder has policy_adapter/ too"
            )
        return publish

    @property
    def scale(self) -> float:
        """The s of W + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter:
    """Puts an adapter into a model, in place: from then on its parameters alone are trained, and every forward pass has it.

    Args:
        model: A causal language model of transformers with float32 weights.
        cfg: Kind, size and place.
        seed: Of A's first values, so that equal runs start equally.

    Raises:
        ValueError: If there is nothing to adapt, or what is to be adapted is no linear layer, shared, or quantised.
    """

    def __init__(self, model: Any, cfg: AdapterConfig, seed: int = 0) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.cfg = cfg
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=cfg.rank,
            lora_alpha=cfg.alpha,
            use_dora=cfg.kind == "dora",
            use_rslora=cfg.rslora,
            target_modules=_places(model, cfg.target_modules),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wrapped = get_peft_model(model, settings)
        model.eval()
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def merged(self, held: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What the model without an adapter would hold, had it learned the same: one merged matrix at a time, in float32.

        Args:
            held: Tensors of the model by their names there; some, or all.
        """
        for name, tensor in held:
            if name in self._trained:
                continue
            layer_name, inner, rest = name.partition(".base_layer.")
            if not inner:
                yield name, tensor
            else:
                yield f"{layer_name}.{rest}", self._merge(layer_name, tensor) if rest == "weight" else tensor

    @torch.no_grad()
    def _merge(self, layer_name: str, weight: Tensor) -> Tensor:
        layer = self._layers[layer_name]
        a, b = (part[_NAME].weight.to(weight.device) for part in (layer.lora_A, layer.lora_B))
        merged = torch.addmm(weight, b, a, alpha=self.cfg.scale)
        if self.cfg.kind == "dora":
            magnitude = layer.lora_magnitude_vector[_NAME].weight.to(weight.device)
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged

    def save(self, directory: Path) -> None:
        """Write the adapter alone, as a folder that peft and vLLM load onto the model it was made for."""
        self.wrapped.save_pretrained(directory, save_embedding_layers=False)  # "auto" would look for a model in a hub

    def load(self, directory: Path) -> None:
        """Take up what `save` wrote, bit for bit.

        Raises:
            ValueError: If the folder holds no adapter, or another one.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if not (directory / _WEIGHTS).is_file():
            raise ValueError(f"{directory} holds no adapter; a checkpoint has one if its run trained one")
        tensors = load_file(directory / _WEIGHTS)
        own = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError(f"the adapter in {directory} is not of this run's kind, rank, places and model")
        set_peft_model_state_dict(self.wrapped, tensors)


def _places(model: Any, ends: Literal["all-linear"] | tuple[str, ...]) -> list[str]:
    """Names of the layers to adapt; see `AdapterConfig.target_modules` and `Adapter`.

    They are looked up here, since peft's own all-linear takes in more than linear layers.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the policy's weights are quantised: engines could not be given their sum with an adapter")
    layers = dict(model.named_modules())
    if ends == "all-linear":
        head = model.get_output_embeddings()
        places = [name for name, layer in layers.items() if type(layer) is torch.nn.Linear and layer is not head]
        if not places:
            raise ValueError(f"{type(model).__name__} has no linear layers but its head")
        return places
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in layers):
            raise ValueError(f"target_modules: no layer of {type(model).__name__} is called {end!r}")
    places = [name for name in layers if any(f".{name}".endswith(f".{end}") for end in ends)]
    for name in places:
        if type(layers[name]) is not torch.nn.Linear:
            raise ValueError(
                f"target_modules: {name} is a {type(layers[name]).__name__}; only linear layers are adapted"
            )
        if layers[name].weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"target_modules: {name} is the embedding too; an adapter on one of the two would untie them"
            )
    return places


def merged(adapter: Adapter | None, held: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """See `Adapter.merged`; without an adapter all is as it should be."""
    return held if adapter is None else adapter.merged(held)
