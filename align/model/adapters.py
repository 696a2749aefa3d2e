"""Adapters: a frozen model and a small trained update of its matrices (LoRA, DoRA), by `peft`.

The policy is the sum of both. Whoever takes its weights (folders, fingerprints, a reference that is refreshed, engines unless
they have the adapter itself) gets the merged ones, under the names of the plain model, and needs to know nothing of adapters.

Engines may be given the adapter alone (`Adapter.factors`): A and s B, so that the scale is the learner's whatever an engine
makes of alpha.

    LoRA:  W' = W + s B A                      with W [out, in] frozen, A [rank, in], B [out, rank] trained
    DoRA:  W' = m * V / ||V||, V = W + s B A   with m [out] trained, too; ||.|| of each row of V
    s = alpha / rank, or alpha / sqrt(rank) if rank-stabilised

A starts random and B at 0, so the policy starts as the frozen model. DoRA's gradient takes ||V|| for a constant, as its paper
has it (section 4.3): it is not quite the gradient of W'.

In float32 the merged weights and the learner's own sum agree to rounding. In bfloat16 an engine with merged weights rounds W'
where the learner rounds W and the update, each by itself, so the mismatch is somewhat larger than with full weights.

Of many ranks each holds a shard of W and of A, B and m. They are whole, one after the other, where a product of them is
needed: A, B and m of all layers come first (`trained_first`), since a matrix is merged as it comes by.

The frozen model is at hand in the learner and could stand for a reference that is the first policy; here a scorer has its own
copy, as it has of any other reference.

Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Liu et al. 2024 (DoRA). Section 4.3 of the latter as peft cites it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors.torch import load_file
from torch import Tensor

from align.choices import choices
from align.model.ranks import full_tensor, placed_like

MAX_ENGINE_RANK = 512  # vLLM's
PEFT_PREFIX = "base_model.model."  # of every name in a folder of peft
_NAME = "default"  # peft's own for the adapter of a model that has one
_A, _B, _MAGNITUDE = (f"{part}.{_NAME}.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector"))
_WEIGHTS = "adapter_model.safetensors"


class AdapterConfig(BaseModel):
    """What is trained instead of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["lora", "dora"] = Field(
        "lora",
        description=choices(
            "What is trained.",
            {
                "lora": "the low-rank update of each matrix",
                "dora": "the same, and the length of each of its rows",
            },
        ),
    )
    rank: int = Field(16, ge=1, description="Of the update of a matrix.")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(False, description="Rank-stabilised: the update is scaled by alpha / sqrt(rank) instead.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description=choices(
            "Ends of the names of the linear layers that are adapted, such as ['q_proj', 'v_proj']. The experts of a mixture are "
            "no linear layers here and stay frozen.",
            {"all-linear": "all but the head"},
        ),
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="0; see the error that another value gives.")
    publish: Literal["merged", "adapter"] = Field(
        "merged",
        description=choices(
            "What engines get.",
            {
                "merged": "merged weights, which cost them nothing",
                "adapter": "the adapter alone, which is far less to send, and slower to generate with",
            },
        ),
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"dropout is {dropout}, which no engine does: the learner's log-probabilities would be of another policy than "
                "the one that sampled; it has to be 0"
            )
        return dropout

    @model_validator(mode="after")
    def _engines_can_have_it(self) -> AdapterConfig:
        if self.publish == "adapter" and self.kind == "dora":
            raise ValueError(
                "publish = 'adapter' needs kind = 'lora': vLLM has no DoRA, whose rows are brought to a length after the sum; "
                "publish = 'merged' gives it the sum"
            )
        if self.publish == "adapter" and self.rank > MAX_ENGINE_RANK:
            raise ValueError(
                f"publish = 'adapter' needs a rank of at most {MAX_ENGINE_RANK} (not {self.rank}), which vLLM has room for; "
                "publish = 'merged' takes any"
            )
        return self

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

        self.cfg = cfg
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=cfg.rank,
            lora_alpha=cfg.alpha,
            use_dora=cfg.kind == "dora",
            use_rslora=cfg.rslora,
            target_modules=adapted_layers(model, cfg),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wrapped = get_peft_model(model, settings)
        model.eval()
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def merged(self, held: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What the model without an adapter would hold, had it learned the same: one merged matrix at a time, in float32.

        Args:
            held: Whole tensors of the model by their names there, all that is trained first.
        """
        trained: dict[str, Tensor] = {}
        for name, tensor in held:
            layer_name, inner, rest = name.partition(".base_layer.")
            if name in self._trained:
                trained[name] = tensor
            elif not inner:
                yield name, tensor
            else:
                yield f"{layer_name}.{rest}", self._merge(layer_name, tensor, trained) if rest == "weight" else tensor

    @torch.no_grad()
    def _merge(self, layer_name: str, weight: Tensor, trained: dict[str, Tensor]) -> Tensor:
        a, b = trained[f"{layer_name}.{_A}"], trained[f"{layer_name}.{_B}"]
        merged = torch.addmm(weight, b, a, alpha=self.cfg.scale)
        if self.cfg.kind == "dora":
            magnitude = trained[f"{layer_name}.{_MAGNITUDE}"]
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged

    def factors(self, held: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A and s B of every adapted layer, by their names in a folder of peft; with alpha = rank there, it is this adapter.

        Args:
            held: As for `merged`; no more of it is taken than is trained.
        """
        for name, tensor in itertools.islice(held, len(self._trained)):
            stored = PEFT_PREFIX + name.replace(f".{_NAME}.", ".")
            yield stored, tensor * self.cfg.scale if name.endswith(_B) else tensor

    def save(self, directory: Path, write: bool = True) -> None:
        """Write the adapter alone, as a folder that peft and vLLM load onto the model it was made for.

        Args:
            directory: The folder.
            write: False on a rank that only takes part in gathering.
        """
        state = self.wrapped.state_dict()
        state = {name: full_tensor(t) for name, t in state.items() if name.removeprefix(PEFT_PREFIX) in self._trained}
        if write:
            # "auto" for the embeddings would look for a model in a hub.
            self.wrapped.save_pretrained(directory, state_dict=state, save_embedding_layers=False)

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
        set_peft_model_state_dict(self.wrapped, {name: placed_like(t, own[name]) for name, t in tensors.items()})


def adapted_layers(model: Any, cfg: AdapterConfig) -> list[str]:
    """Names of the layers to adapt; see `AdapterConfig.target_modules` and `Adapter`.

    They are looked up here, since peft's own all-linear takes in more than linear layers.
    """
    head, ends = model.get_output_embeddings(), cfg.target_modules
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the policy's weights are quantised: engines could not be given their sum with an adapter")
    layers = dict(model.named_modules())
    if ends == "all-linear":
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
        if layers[name] is head and cfg.publish == "adapter":
            raise ValueError(
                f"target_modules: {name} is the head; with an adapter there vLLM cannot score the sequences by which a "
                "publication is checked; publish = 'merged' has none in the engine"
            )
    return places


def merged(adapter: Adapter | None, held: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """See `Adapter.merged`; without an adapter all is as it should be."""
    return held if adapter is None else adapter.merged(held)


def trained_first(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What is held, in its order, but all parts of an adapter before all else."""
    return sorted(named, key=lambda item: f".{_NAME}." not in item[0])
