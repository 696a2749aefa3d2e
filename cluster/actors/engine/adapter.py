"""An adapter in vLLM: one LoRA under one name, replaced in place, version after version.

All requests name the same adapter, so those in flight go on with the new one after a load. That its keys and values are new,
and no cached prefix is an old version's, is seen to by the pause around the load (`Engine.begin_update`).

What is published is A and s B. vLLM is told alpha = rank, hence scales by 1, and what its layers hold is what was published bit
for bit: `served_adapter` reads it back from there, for one worker per engine. The frozen weights are those of the folder that the
engine started from; no fingerprint of them is taken, and the canary covers them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.lora.request import LoRARequest

from align.model.adapters import PEFT_PREFIX, AdapterConfig, adapted_layers
from align.model.folder import empty_model

STAGED_FILE = (
    "adapter_model.safetensors"  # what vLLM reads of an adapter's folder; whole weights are staged under it, too
)
_PACKED = (
    "qkv_proj",
    "gate_up_proj",
)  # vLLM's layers that are several of a model's; older versions know no other names
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for; see `align.model.adapters.MAX_ENGINE_RANK`


def lora_arguments(model: Path, cfg: AdapterConfig) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter.

    Layers that have none are left alone. Above all the head: vLLM's logits with room for an adapter have a row for every
    request, not for every token of the prompts, and the first two prompts to be scored at once end the engine.
    """
    room = next(room for room in _RANKS if room >= cfg.rank)
    ends = {name.rpartition(".")[2] for name in adapted_layers(empty_model(model), cfg)}
    targets = sorted(ends.union(_PACKED))
    one = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1}
    return one | {"max_lora_rank": room, "lora_target_modules": targets}


def lora_request(folder: Path | None = None) -> LoRARequest:
    """Names the adapter; with a folder, it is loaded from there in place of the one that is loaded."""
    path = "loaded by every publication" if folder is None else str(folder)
    return LoRARequest("policy", 1, path, load_inplace=folder is not None)


def describe_adapter(folder: Path, rank: int) -> None:
    """Write what vLLM reads beside the tensors."""
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def served_adapter(manager: Any) -> Iterator[tuple[str, Tensor]]:
    """A and s B as vLLM's layers compute with them, by their names in a folder of peft.

    A layer of vLLM may be several of the model's (q, k and v). It has room for a higher rank, and where there is no adapter it
    holds zeros. So what is served are the rows of A that are not zero, as none of an adapter's is, and their columns of B.

    Args:
        manager: vLLM's `LoRAModelManager`.
    """
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        for part, a, b in zip(parts, _slot(layer.lora_a_stacked), _slot(layer.lora_b_stacked), strict=True):
            rank = int(a.any(dim=1).sum())
            if rank:
                yield f"{PEFT_PREFIX}{part}.lora_A.weight", a[:rank]
                yield f"{PEFT_PREFIX}{part}.lora_B.weight", b[:, :rank]


def _slot(stacked: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Of the one adapter that there is room for; the head has a tensor of its own, other layers one for each part."""
    return [part[0].squeeze(0) for part in ([stacked] if isinstance(stacked, Tensor) else stacked)]
