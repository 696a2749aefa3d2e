"""The side of a weight update that runs in vLLM's worker process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.actors.engine.adapter import served_adapter
from cluster.actors.weights import combine_fingerprints, fingerprint, tensor_fingerprint

SHARED_MEMORY = "align_shared_memory"


def read_staged(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, over the file's own memory."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def repack_on_cpu(model: torch.nn.Module) -> None:
    """Pack again what vLLM's reload on CPU leaves behind; there it keeps a packed copy of every matrix.

    The reload packs the module that owns a parameter. A head tied to the embedding owns none, keeps the old copy, and would go
    on serving the old weights. The experts of a mixture are packed at the first load alone (`is_weight_update` in vLLM's
    `UnquantizedFusedMoEMethod`): a reload lays plain weights where the kernel reads packed ones, and it computes nonsense.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
            elif kernel := getattr(getattr(module, "quant_method", None), "moe_kernel", None):
                kernel.fused_experts.process_weights_after_loading(module)


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """Where the staged weights are."""

    path: str = ""


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """vLLM's weight-transfer interface over one safetensors file in shared memory."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Layers go back to the form in which checkpoints are loaded."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load every weight."""
        self.model.load_weights(iter(read_staged(Path(update_info.path)).items()))

    def finish_weight_update(self) -> None:
        """Layers are packed for computing again."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_on_cpu(self.model)

    def shutdown(self) -> None:
        """Nothing to close."""

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Abstract in vLLM 0.26; the learner sends through Ray's object store instead."""
        raise NotImplementedError("weights are published through Ray's object store")


if SHARED_MEMORY not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryTransfer)


class WorkerExtension:
    """Mixed into vLLM's worker. Importing this module there registers `SharedMemoryTransfer`.

    It fingerprints every tensor that any transport hands to the model, on the device where it arrived.
    """

    weight_transfer_engine: Any
    model_runner: Any

    def align_watch(self) -> None:
        """Fingerprint what the model is given from now on."""
        model = self.weight_transfer_engine.model
        load = model.load_weights
        self._loaded: list[bytes] = []

        def load_watched(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            return load(self._watched(weights))

        model.load_weights = load_watched

    def _watched(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._loaded.append(tensor_fingerprint(name, tensor))
            yield name, tensor

    def align_loaded_fingerprint(self) -> str:
        """Fingerprint of all tensors since the last call."""
        loaded, self._loaded = self._loaded, []
        return combine_fingerprints(loaded)

    def align_adapter_fingerprint(self) -> str:
        """Fingerprint of the adapter that the layers compute with, as they hold it."""
        return fingerprint(served_adapter(self.model_runner.lora_manager._adapter_manager))
