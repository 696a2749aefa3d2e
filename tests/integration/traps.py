"""Engines with one safeguard taken out, to show that the safeguard is needed and that its absence is noticed."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from cluster.actors.engine.engine import EngineSettings
from cluster.actors.engine.receiver import SharedMemoryTransfer, WorkerExtension, read_staged

_STALE_HEAD = "align_stale_head"


class StaleHeadTransfer(SharedMemoryTransfer):
    """Leaves out the second packing of the output head."""

    def finish_weight_update(self) -> None:
        """As vLLM itself would do it."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)


if _STALE_HEAD not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(_STALE_HEAD, StaleHeadTransfer)


class TrapExtension(WorkerExtension):
    """Adds the naive way to load weights."""

    def naive_load(self, path: str) -> str:
        """Call `load_weights` without vLLM's reload lifecycle; returns the error."""
        from pathlib import Path

        try:
            self.model_runner.model.load_weights(iter(read_staged(Path(path)).items()))  # type: ignore[attr-defined]
        except (AttributeError, AssertionError) as error:
            return str(error)
        return ""


@dataclasses.dataclass(frozen=True)
class TrapSettings(EngineSettings):
    """Settings of an engine whose output head stays behind."""

    def arguments(self) -> dict[str, Any]:
        """As the project's, with the trap built in."""
        changed = {
            "weight_transfer_config": {"backend": _STALE_HEAD},
            "worker_extension_cls": f"{TrapExtension.__module__}.{TrapExtension.__name__}",
        }
        return super().arguments() | changed
