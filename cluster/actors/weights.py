"""Versioned publication of the policy's weights: stage, verify a fingerprint, swap, compare a canary.

A publication is a transaction. The learner exports its weights once, with a fingerprint. Every rollout actor stages them
beside the serving ones and checks the fingerprint before it touches the engine; the engine's worker checks it again on the
bytes that it loads. Only then does the actor report the new version. Over NCCL and CUDA IPC nothing is staged: the weights
go from GPU to GPU, and the fingerprint of what every worker loaded is compared before its engine runs again. A canary, a
few fixed sequences scored by engine and learner at the same version, catches what a fingerprint of bytes cannot see (a
packed copy that stayed behind, a wrong mapping).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from align.choices import choices
from align.model.precision import DTYPES
from align.rules import Rule
from cluster.faults import TrainingDiverged

_ROW = 1024  # words per row of the checksum matrix


class WeightsConfig(BaseModel):
    """How weights travel and when a gap between engine and learner counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transport: Literal["auto", "object_store", "nccl", "ipc"] = Field(
        "auto",
        description=choices(
            "How weights travel from the learner to the engines.",
            {
                "auto": "nccl where learner and engines have GPUs and engines get no adapter, else object_store",
                "object_store": "Ray's object store and shared memory",
                "nccl": "vLLM's NCCL transfer, from GPU to GPU",
                "ipc": "CUDA IPC, for a learner and an engine on the same GPU",
            },
        ),
    )
    packed_buffer_bytes: int = Field(
        128 << 20,
        ge=1 << 20,
        description="nccl and ipc: size of the buffers that weights are packed into; nccl keeps two on every GPU, ipc one.",
    )
    canary_sequences: int = Field(
        4, ge=1, description="Fixed sequences that engine and learner both score at a publish."
    )
    canary_warn: float | None = Field(
        None, gt=0, description="Mean gap in nats that warns; left out: 1e-4 for a float32 engine, 0.15 for bfloat16."
    )
    canary_stop: float | None = Field(
        None, gt=0, description="Mean gap in nats that stops the run; left out: 1e-3 for float32, 0.5 for bfloat16."
    )

    def canary_limits(self, engine_dtype: str) -> tuple[float, float]:
        """(warn, stop) in nats for an engine of this type."""
        warn, stop = (1e-4, 1e-3) if engine_dtype == "float32" else (0.15, 0.5)
        return self.canary_warn or warn, self.canary_stop or stop

    def rules_in_a_run(self, *, learner_gpus: int, num_engines: int, engine_gpus: int) -> list[Rule]:
        """What a transport asks of the learner and the engines.

        Args:
            learner_gpus: GPUs of a rank of the learner.
            num_engines: How many engines there are.
            engine_gpus: GPUs of one of them.
        """
        return [
            (
                self.transport in ("nccl", "ipc") and not (learner_gpus and engine_gpus),
                f"weights.transport = {self.transport!r} needs GPUs for learner and engines",
            ),
            (
                self.transport == "ipc" and (num_engines, engine_gpus) != (1, 1),
                "weights.transport = 'ipc' is for one engine on the learner's GPU: rollout.num_actors = 1 and num_gpus = 1",
            ),
        ]

    def rules_of_ranks(self, num_ranks: int) -> list[Rule]:
        """What a transport asks of the number of the learner's ranks."""
        return [
            (
                self.transport == "ipc" and num_ranks > 1,
                "weights.transport = 'ipc' is for a learner on one GPU; with learner.num_ranks above 1 use 'nccl'",
            )
        ]


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, types, shapes and every bit of the values; independent of the order of the weights.

    Each tensor is read as 32-bit words (bytes, if it has no whole number of them) in rows of 1024; the exact integer sums
    of all rows and of all columns are digested. Sums of integers do not depend on their order, so any device gives the
    same digest, and only the sums leave the device.

    Raises:
        ValueError: If there is no weight.
    """
    return combine_fingerprints(tensor_fingerprint(name, tensor) for name, tensor in weights)


def combine_fingerprints(digests: Iterable[bytes]) -> str:
    """One digest of the digests of all tensors, in any order.

    Raises:
        ValueError: If there is none.
    """
    ordered = sorted(digests)
    if not ordered:
        raise ValueError("no weights to fingerprint")
    return hashlib.blake2b(b"".join(ordered), digest_size=16).hexdigest()


def tensor_fingerprint(name: str, tensor: Tensor) -> bytes:
    """Digest of one named tensor; see `fingerprint`."""
    digest = hashlib.blake2b(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode(), digest_size=16)
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = octets.view(torch.int32) if octets.numel() % 4 == 0 else octets
    whole = words.numel() // _ROW * _ROW
    for part in (words[:whole].view(-1, _ROW), words[whole:].view(1, -1)):
        if part.numel():
            for axis in (0, 1):
                digest.update(part.sum(dim=axis, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.digest()


def inspect(weights: Iterable[tuple[str, Tensor]], version: int) -> tuple[str, int]:
    """Look at weights before they are published, on the device where they are.

    Args:
        weights: In the wire type.
        version: Policy version of these weights.

    Returns:
        Their fingerprint and their size in bytes.

    Raises:
        TrainingDiverged: If a weight is not finite: such weights are never published.
    """
    digests, num_bytes = [], 0
    for name, weight in weights:
        if not weight.isfinite().all():
            raise TrainingDiverged(
                f"weight {name} of version {version} is not finite; it is not published",
                "lower optimizer.lr; the newest checkpoint is good",
            )
        digests.append(tensor_fingerprint(name, weight))
        num_bytes += weight.nbytes
    return combine_fingerprints(digests), num_bytes


@dataclass(frozen=True, slots=True)
class Link:
    """How weights get from the learner to the engines without passing through Ray.

    Attributes:
        transport: "nccl" or "ipc".
        workers_per_engine: GPUs of one engine.
        packed_buffer_bytes: Size of the buffers that weights are packed into.
        deadline_s: Time for one call of an engine.
    """

    transport: str
    workers_per_engine: int
    packed_buffer_bytes: int
    deadline_s: float

    @classmethod
    def of(cls, cfg: WeightsConfig, transport: str, workers_per_engine: int, deadline_s: float) -> Link | None:
        """The link of a run, or None if the weights pass through Ray's object store."""
        if transport == "object_store":
            return None
        return cls(transport, workers_per_engine, cfg.packed_buffer_bytes, deadline_s)


class WeightInfo(NamedTuple):
    """What an engine is told of a weight before it comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WireWeights:
    """Weights in the wire type, cast one at a time on their own device, as often as they are asked for.

    By its structure this is vLLM's `WeightSource`.

    Args:
        named_weights: Called for every pass; yields every parameter once, by Hugging Face name, in the same order.
        dtype: "float32" or "bfloat16".
        named_shapes: Names and shapes of what a pass yields, in its order, which has to gather no weight.
    """

    def __init__(
        self,
        named_weights: Callable[[], Iterable[tuple[str, Tensor]]],
        dtype: str,
        named_shapes: Callable[[], Mapping[str, tuple[int, ...]]],
    ) -> None:
        self._named_weights = named_weights
        self._named_shapes = named_shapes
        self.dtype: torch.dtype = DTYPES[dtype]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._named_weights():
            yield name, weight.detach().to(self.dtype).contiguous()

    def metadata(self) -> list[WeightInfo]:
        """Name, type and shape of what a pass yields, in its order."""
        return [WeightInfo(name, self.dtype, shape) for name, shape in self._named_shapes().items()]

    @property
    def largest_bytes(self) -> int:
        """Size of the largest weight."""
        return max(math.prod(info.shape) for info in self.metadata()) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(math.prod(info.shape) for info in self.metadata()) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ExportedWeights:
    """Weights on their way through Ray's object store.

    Attributes:
        version: Policy version.
        fingerprint: Of the tensors as they must arrive, wire type included.
        arrays: By Hugging Face name, an adapter's own by peft's; bfloat16 travels as uint16, since numpy has no bfloat16.
        dtype: The wire type.
    """

    version: int
    fingerprint: str
    arrays: Mapping[str, np.ndarray[Any, Any]]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def tensors(self) -> dict[str, Tensor]:
        """The weights as torch tensors over the same memory, which is read-only: do not write to them."""
        return {name: _as_tensor(array, self.dtype) for name, array in self.arrays.items()}


def export_weights(named_weights: Iterable[tuple[str, Tensor]], version: int, dtype: str) -> ExportedWeights:
    """Copy weights to the CPU in the wire type and fingerprint them.

    Args:
        named_weights: Every parameter once, by Hugging Face name; or those of an adapter alone.
        version: Policy version of these weights.
        dtype: "float32" or "bfloat16".

    Raises:
        TrainingDiverged: If a weight is not finite: such weights are never published.
    """
    wire = {name: weight.to(device="cpu", dtype=DTYPES[dtype]).contiguous() for name, weight in named_weights}
    digest, _ = inspect(wire.items(), version)
    arrays = {name: (w.view(torch.uint16) if dtype == "bfloat16" else w).numpy() for name, w in wire.items()}
    return ExportedWeights(version, digest, arrays, dtype)


def _as_tensor(array: np.ndarray[Any, Any], dtype: str) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the array is read-only; nobody writes to it
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
