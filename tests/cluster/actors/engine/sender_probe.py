"""Drives the learner's side of NCCL and IPC with fakes, for `test_sender.py`.

vLLM's own trainer classes (0.32) run as they are; what needs a GPU is replaced by fakes: the NCCL group, CUDA streams, CUDA
handles. vLLM 0.26 is imitated by classes with its signatures, since only one vLLM can be installed.
"""

from __future__ import annotations

import base64
import concurrent.futures
import json
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(300), "c.weight": torch.zeros(5, 2)}


class FakeReference:
    """Work in a thread, behind Ray's `ObjectRef.future`."""

    pool = concurrent.futures.ThreadPoolExecutor(16)

    def __init__(self, work: Callable[[], Any]) -> None:
        self._future = self.pool.submit(work)

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future


@dataclass
class FakeMethod:
    work: Callable[..., Any]

    def remote(self, *arguments: Any) -> FakeReference:
        return FakeReference(lambda: self.work(*arguments))


@dataclass
class FakeEngine:
    """An engine that notes what it is told; in `fails_in` it fails, in `hangs_in` it comes back too late."""

    rank: int
    log: list[tuple[Any, ...]]
    fails_in: str = ""
    hangs_in: str = ""
    waits_for: Any = None
    told: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, method: str) -> FakeMethod:
        def work(*arguments: Any) -> None:
            self.log.append((method, self.rank))
            if arguments:
                self.told[method] = arguments[0]
            if method == self.fails_in:
                from ray.exceptions import ActorDiedError

                raise ActorDiedError()
            if method == self.hangs_in:
                time.sleep(1.0)
            if method == "update_weights" and self.waits_for is not None:
                self.waits_for.arrived.wait(5)

        return FakeMethod(work)


class FakeGroup:
    """Rank 0 of an NCCL group: keeps what is broadcast; waits like NCCL until it is destroyed if `blocks`."""

    def __init__(self, log: list[tuple[Any, ...]], blocks: bool = False) -> None:
        import threading

        self.log = log
        self.blocks = blocks
        self.sent: list[torch.Tensor] = []
        self.arrived = threading.Event()
        self.destroyed = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        self.log.append(("broadcast", 0))
        self.sent.append(tensor.clone())
        if self.blocks:
            assert self.destroyed.wait(5), "nobody gave up the group: the learner would wait for ever"
        self.arrived.set()

    def destroy(self) -> None:
        self.destroyed.set()
        self.arrived.set()

    def bytes(self) -> bytes:
        return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in self.sent)


class FakeStream:
    """CUDA's stream on a machine without."""

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def link(transport: str, **changes: Any) -> Any:
    from cluster.actors.weights import Link

    return Link(
        **{"transport": transport, "workers_per_engine": 2, "packed_buffer_bytes": 64, "deadline_s": 5} | changes
    )


def wire() -> Any:
    from cluster.actors.weights import WireWeights

    return WireWeights(TENSORS.items, "bfloat16", lambda: {name: tuple(t.shape) for name, t in TENSORS.items()})


def expected_bytes() -> bytes:
    return b"".join(t.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes() for t in TENSORS.values())


def order(log: list[tuple[Any, ...]]) -> list[str]:
    """Methods in order, each once for all engines that were told in a row."""
    methods = [entry[0] for entry in log]
    return [m for i, m in enumerate(methods) if i == 0 or methods[i - 1] != m]


def without_gpu(group_of: Callable[..., FakeGroup]) -> None:
    """Replace in vLLM 0.32 what needs a GPU."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    nccl_engine.open_trainer_endpoint = group_of
    packed_tensor._get_streams = lambda device, num: tuple(FakeStream() for _ in range(num))
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: stream  # type: ignore[assignment, misc]


def nccl_032() -> dict[str, Any]:
    from cluster.actors.engine.sender import connect

    log: list[tuple[Any, ...]] = []
    group, rendezvous = FakeGroup(log), {}

    def group_of(info: Any) -> FakeGroup:
        rendezvous.update(port=info.master_port, world_size=info.world_size)
        return group

    without_gpu(group_of)
    engines = {rank: FakeEngine(rank, log, waits_for=group) for rank in (3, 5, 6)}
    sender = connect(engines, wire(), link("nccl"))
    inits = {rank: engine.told["init_weight_transfer_engine"] for rank, engine in engines.items()}
    connected = order(log)
    log.clear()
    sender.send()
    first = order(log)
    sent = group.bytes()
    group.sent.clear()
    sender.send()
    return {
        "offsets": [info["rank_offset"] for info in inits.values()],
        "worlds": [info["world_size"] for info in inits.values()] + [rendezvous["world_size"]],
        "ports_agree": {info["master_port"] for info in inits.values()} == {rendezvous["port"]},
        "packed": [(info["packed"], info["packed_buffer_size_bytes"]) for info in inits.values()],
        "connected": connected,
        "order": [m for m in first if m != "broadcast"],
        "bytes_right": sent == expected_bytes() and group.bytes() == expected_bytes(),
        "num_broadcasts": len(group.sent),
        "update": engines[3].told["update_weights"],
    }


def failures_032() -> dict[str, Any]:
    """An engine that dies or hangs in each call: what the learner says, what the other engine was told by then, and
    whether the group was given up."""
    from cluster.actors.engine.sender import connect
    from cluster.faults import RunError

    found = {}
    for how, method in [
        ("fails_in", "ready"),
        ("fails_in", "begin_update"),
        ("fails_in", "start_weight_update"),
        ("fails_in", "update_weights"),
        ("hangs_in", "update_weights"),
        ("fails_in", "finish_weight_update"),
    ]:
        log: list[tuple[Any, ...]] = []
        group = FakeGroup(log, blocks=method == "update_weights")
        without_gpu(lambda info, group=group: group)
        engines = {0: FakeEngine(0, log), 1: FakeEngine(1, log, **{how: method})}
        try:
            connect(engines, wire(), link("nccl", deadline_s=0.5)).send()
            error = None
        except RunError as raised:
            error = raised
        told = [m for m, rank in log if rank == 0 and m not in ("broadcast", "init_weight_transfer_engine", "ready")]
        found[f"{how} {method}"] = [type(error).__name__, getattr(error, "rank", None), told, group.destroyed.is_set()]
    return found


def ipc_032() -> dict[str, Any]:
    from vllm.distributed.weight_transfer import ipc_engine

    from cluster.actors.engine.sender import connect

    log: list[tuple[Any, ...]] = []
    handle = {"GPU-1": (torch.Tensor, torch.Size([2, 3]), (3, 1), 0, b"handle")}
    buffers: list[int] = []

    def producer(iterator: Any, gpu_uuid: str, post_iter_func: Any, buffer_size_bytes: int) -> Any:
        """One chunk for each weight, in place of `packed_ipc_producer`, which needs CUDA handles."""
        buffers.append(buffer_size_bytes)
        for name, tensor in iterator:
            yield ChunkOf([name], [list(tensor.shape)], ["bfloat16"], [tensor.nbytes], handle)

    ipc_engine.packed_ipc_producer = producer
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda index: Properties("GPU-1")  # type: ignore[assignment]
    torch.cuda.ipc_collect = lambda: None  # type: ignore[assignment]
    engine = FakeEngine(0, log)
    sender = connect({0: engine}, wire(), link("ipc", workers_per_engine=1))
    sender.send()
    update = engine.told["update_weights"]
    return {
        "init": engine.told["init_weight_transfer_engine"],
        "order": order(log),
        "num_updates": sum(m == "update_weights" for m, _ in log),
        "buffer": buffers[0],
        "only_text_and_numbers": json.loads(json.dumps(update)) == update,
        "handles_arrive": pickle.loads(base64.b64decode(update["ipc_handles_pickled"])) == handle,
        "worker_reads_it": _worker_reads(update, handle),
    }


def _worker_reads(update: dict[str, Any], handle: dict[str, Any]) -> bool:
    import os

    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return IPCWeightTransferUpdateInfo(**update).ipc_handles == handle


@dataclass
class ChunkOf:
    names: list[str]
    shapes: list[list[int]]
    dtype_names: list[str]
    tensor_sizes: list[int]
    ipc_handle: dict[str, Any]


@dataclass
class Properties:
    uuid: str


@dataclass
class Arguments026:
    """`NCCLTrainerSendWeightsArgs` and `IPCTrainerSendWeightsArgs` of 0.26."""

    group: Any = None
    send_mode: Any = None
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30


@dataclass
class Update026:
    """`NCCLWeightTransferUpdateInfo` of 0.26."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    packed: bool = False
    packed_buffer_size_bytes: int = 1 << 30
    packed_num_buffers: int = 2


@dataclass
class IpcUpdate026:
    """`IPCWeightTransferUpdateInfo` of 0.26."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    ipc_handles: Any = None
    ipc_handles_pickled: str | None = None
    tensor_sizes: list[int] | None = None
    packed: bool = False


class Factory026:
    """`WeightTransferTrainerFactory` of 0.26, whose registry is empty."""

    @classmethod
    def trainer_init(cls, backend: str, config: Any, init_info: Any, *, client: Any, source: Any) -> Any:
        raise ValueError(f"Invalid weight transfer backend: {backend}")


def pretend_026(group: FakeGroup) -> None:
    """Give vLLM's modules the names and signatures of 0.26."""
    import vllm.distributed.weight_transfer as transfer
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    class Nccl:
        @staticmethod
        def trainer_send_weights(iterator: Any, arguments: Arguments026) -> None:
            assert arguments.packed
            packed = torch.cat([t.view(-1).view(torch.uint8) for _, t in iterator])
            arguments.group.broadcast(packed, src=0)

    class Ipc:
        @staticmethod
        def trainer_send_weights(iterator: Any, arguments: Arguments026) -> None:
            weights = list(iterator)
            arguments.send_mode(
                IpcUpdate026(
                    [n for n, _ in weights],
                    ["bfloat16"] * len(weights),
                    [list(t.shape) for _, t in weights],
                    ipc_handles={"GPU-1": (arguments.packed_buffer_size_bytes,)},
                    tensor_sizes=[t.nbytes for _, t in weights],
                    packed=arguments.packed,
                )
            )

    transfer.WeightTransferTrainerFactory = Factory026
    nccl_engine.trainer_init = lambda place: group
    nccl_engine.NCCLTrainerSendWeightsArgs = Arguments026
    nccl_engine.NCCLWeightTransferUpdateInfo = Update026
    nccl_engine.NCCLWeightTransferEngine = Nccl
    ipc_engine.IPCTrainerSendWeightsArgs = Arguments026
    ipc_engine.IPCWeightTransferEngine = Ipc


def nccl_026() -> dict[str, Any]:
    from cluster.actors.engine.sender import connect

    log: list[tuple[Any, ...]] = []
    group = FakeGroup(log)
    pretend_026(group)
    engines = {rank: FakeEngine(rank, log, waits_for=group) for rank in (0, 1)}
    sender = connect(engines, wire(), link("nccl"))
    sender.send()
    inits = [engine.told["init_weight_transfer_engine"] for engine in engines.values()]
    blocked = FakeGroup([], blocks=True)
    pretend_026(blocked)
    from cluster.faults import ActorLost

    try:
        connect({0: FakeEngine(0, []), 1: FakeEngine(1, [], fails_in="update_weights")}, wire(), link("nccl")).send()
        lost = None
    except ActorLost as error:
        lost = error.rank
    return {
        "offsets": [info["rank_offset"] for info in inits],
        "worlds": [info["world_size"] for info in inits],
        "init_keys": sorted(inits[0]),
        "order": [m for m in order(log) if m != "broadcast"],
        "bytes_right": group.bytes() == expected_bytes(),
        "update": engines[0].told["update_weights"],
        "lost": [lost, blocked.destroyed.is_set()],
    }


def ipc_026() -> dict[str, Any]:
    from cluster.actors.engine.sender import connect

    log: list[tuple[Any, ...]] = []
    pretend_026(FakeGroup(log))
    engine = FakeEngine(0, log)
    connect({0: engine}, wire(), link("ipc", workers_per_engine=1)).send()
    update = engine.told["update_weights"]
    return {
        "init": engine.told["init_weight_transfer_engine"],
        "order": order(log),
        "packed": update["packed"],
        "buffer": pickle.loads(base64.b64decode(update["ipc_handles_pickled"]))["GPU-1"][0],
        "raw_handles_left": "ipc_handles" in update,
    }


def engines_on_gpus() -> list[str | None]:
    """How vLLM is told to start the workers of engines of one, two and four GPUs."""
    from cluster.actors.engine.engine import EngineSettings

    settings = [
        EngineSettings(Path("m"), "bfloat16", 1, 64, 8, None, on_gpu=True, tensor_parallel_size=size)
        for size in (1, 2, 4)
    ]
    return [one.arguments().get("distributed_executor_backend") for one in settings]


if __name__ == "__main__":
    parts = [nccl_032, failures_032, ipc_032, nccl_026, ipc_026, engines_on_gpus]
    print(json.dumps({part.__name__: part() for part in parts}))
