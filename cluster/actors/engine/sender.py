"""The learner's side of a weight update over NCCL or CUDA IPC, through vLLM's own weight-transfer interface.

What one update does, in the order of the calls that reach an engine: begin (stop between two steps), start (take the layers
apart), update (receive; over NCCL all engines and the learner at once), finish (put them together). Then the controller
compares fingerprints and lets the engine run (`Engine.commit`).

vLLM 0.32 has classes that drive these calls. In 0.26 their registry is empty, and the two functions that end in `_026` do
the same with the parts that are there. No line of this file that needs a GPU has met one yet.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import inspect
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from cluster.actors.weights import Link, WireWeights
from cluster.faults import ActorLost, RunError, from_ray


class EngineClient:
    """Calls all engines at once; by its structure this is vLLM's `VLLMWeightSyncClient`.

    Args:
        engines: Ray's handles of the rollout actors, by rank.
        link: Workers of an engine and deadline.
    """

    def __init__(self, engines: Mapping[int, Any], link: Link) -> None:
        self._engines = engines
        self._link = link
        self.failure: RunError | None = None
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def world_size(self) -> int:
        """The learner and every worker of every engine."""
        return 1 + len(self._engines) * self._link.workers_per_engine

    def check(self) -> None:
        """Every engine is there and answers, before all wait for all."""
        self._call("ready", "connect")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect. A worker's NCCL rank is its rank within its engine plus the offset, so every engine has its own."""
        self._call("init_weight_transfer_engine", "connect", self._offsets(init_info), together=True)

    def _offsets(self, init_info: dict[str, Any]) -> list[dict[str, Any]]:
        if "rank_offset" not in init_info:
            return [init_info] * len(self._engines)
        first, stride = init_info["rank_offset"], self._link.workers_per_engine
        return [init_info | {"rank_offset": first + i * stride} for i in range(len(self._engines))]

    def start_weight_update(self) -> None:
        """Stop all engines, and only when all have stopped take their layers apart."""
        self._call("begin_update", "load")
        self._call("start_weight_update", "load")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive. CUDA handles go pickled, since vLLM's own message format would change their types."""
        if (handles := update_info.get("ipc_handles")) is not None:
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            others = {key: value for key, value in update_info.items() if key != "ipc_handles"}
            update_info = others | {"ipc_handles_pickled": pickled}
        self._call("update_weights", "load", [update_info] * len(self._engines), together=True)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the layers together. The version is set by `Engine.commit`, after the fingerprints were compared."""
        self._call("finish_weight_update", "load")

    def _call(
        self, method: str, phase: str, arguments: list[dict[str, Any]] | None = None, *, together: bool = False
    ) -> None:
        """Call a method of every engine.

        Args:
            method: Its name.
            phase: For the error.
            arguments: One for every engine, or None for a method without.
            together: Whether the engines wait for each other in it: then the first failure ends the call, otherwise all
                are waited for, so that none works on after the call.

        Raises:
            ActorLost: If an engine's actor died or is too late.
            RunError: If the work failed.
        """
        called = {}
        for i, (rank, engine) in enumerate(self._engines.items()):
            remote = getattr(engine, method).remote
            called[(remote(arguments[i]) if arguments else remote()).future()] = rank
        when = concurrent.futures.FIRST_EXCEPTION if together else concurrent.futures.ALL_COMPLETED
        done, late = concurrent.futures.wait(called, self._link.deadline_s, when)
        errors = {called[f]: error for f in done if (error := f.exception()) is not None}
        if errors:
            rank = min(errors)
            self._fail(from_ray(errors[rank], "rollout", rank, phase))
        if late:
            rank = min(called[f] for f in late)
            self._fail(ActorLost("rollout", rank, phase, f"no answer within {self._link.deadline_s:g} s"))

    def _fail(self, error: RunError) -> None:
        self.failure = error
        self.on_failure()
        raise error


class Sender:
    """Sends the policy's weights to a fixed set of engines, again and again. Made by `connect`.

    Args:
        client: The engines.
        send: Drives one update.
        close: Leaves the group.
    """

    def __init__(self, client: EngineClient, send: Callable[[], None], close: Callable[[], None]) -> None:
        self._client = client
        self._send = send
        self.close = close
        client.on_failure = close  # the broadcast waits for the engine that failed, for ever

    def send(self) -> None:
        """Bring the current weights to all engines, which are stopped afterwards and wait for `commit`.

        The weights are cast on streams of vLLM's, hence the two waits: for the optimizer step before, and for the last
        broadcast after.

        Raises:
            ActorLost: If an engine was lost; none of the others may be used before it says that its weights are whole.
        """
        with _cause(self._client):
            _wait_for_gpu()
            self._send()
            _wait_for_gpu()


def connect(engines: Mapping[int, Any], weights: WireWeights, link: Link) -> Sender:
    """Open both ends of the transport.

    Args:
        engines: Ray's handles of the rollout actors, by rank; at least one.
        weights: What will be sent.
        link: How.

    Raises:
        ActorLost: If an engine cannot be reached.
    """
    client = EngineClient(engines, link)
    client.check()
    open_ends = {
        ("nccl", True): _nccl,
        ("nccl", False): _nccl_026,
        ("ipc", True): _ipc,
        ("ipc", False): _ipc_026,
    }[link.transport, _drives_updates()]
    with _cause(client):
        send, close = open_ends(client, weights, link)
    return Sender(client, send, close)


Ends = tuple[Callable[[], None], Callable[[], None]]  # send, close


def _nccl(client: EngineClient, weights: WireWeights, link: Link) -> Ends:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    address, port = _rendezvous()
    info = NCCLTrainerInitInfo(
        address, port, client.world_size, packed=True, packed_buffer_size_bytes=link.packed_buffer_bytes, rank=0
    )
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=weights)
    return trainer.send_weights, trainer.model_update_group.destroy


def _nccl_026(client: EngineClient, weights: WireWeights, link: Link) -> Ends:
    from vllm.distributed.weight_transfer import nccl_engine

    address, port = _rendezvous()
    place = {"master_address": address, "master_port": port, "world_size": client.world_size}
    # The workers wait for the learner in this call and the learner for them.
    joining = _in_background(client.init_weight_transfer_engine, place | {"rank_offset": 1})
    group = nccl_engine.trainer_init(place)
    joining.result()
    geometry = {"packed": True, "packed_buffer_size_bytes": link.packed_buffer_bytes}
    arguments = nccl_engine.NCCLTrainerSendWeightsArgs(group=group, **geometry)

    def send() -> None:
        names, dtypes, shapes = zip(*weights.metadata(), strict=True)
        dtype_names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        update = nccl_engine.NCCLWeightTransferUpdateInfo(
            list(names), dtype_names, [list(shape) for shape in shapes], **geometry
        )
        client.start_weight_update()
        receiving = _in_background(client.update_weights, asdict(update))
        nccl_engine.NCCLWeightTransferEngine.trainer_send_weights(iter(weights), arguments)
        receiving.result()
        client.finish_weight_update()

    return send, group.destroy


def _ipc(client: EngineClient, weights: WireWeights, link: Link) -> Ends:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    buffer_bytes = max(link.packed_buffer_bytes, weights.largest_bytes)
    info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer_bytes, rank=0)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=weights)
    return trainer.send_weights, trainer.shutdown


def _ipc_026(client: EngineClient, weights: WireWeights, link: Link) -> Ends:
    from vllm.distributed.weight_transfer import ipc_engine

    client.init_weight_transfer_engine({})
    # One buffer for all: 0.26 releases the buffer once for every part, and a buffer that was released twice is never freed.
    arguments = ipc_engine.IPCTrainerSendWeightsArgs(
        send_mode=lambda update: client.update_weights(asdict(update)),
        packed=True,
        packed_buffer_size_bytes=weights.num_bytes,
    )

    def send() -> None:
        client.start_weight_update()
        ipc_engine.IPCWeightTransferEngine.trainer_send_weights(iter(weights), arguments)
        client.finish_weight_update()

    return send, lambda: None


def _drives_updates() -> bool:
    """Whether this vLLM has trainer classes that take the transport from their init info (0.32; not 0.26)."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    return "backend" not in inspect.signature(WeightTransferTrainerFactory.trainer_init).parameters


def _rendezvous() -> tuple[str, int]:
    """Address of this node as the others know it, and a free port there."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _in_background(work: Callable[[dict[str, Any]], None], argument: dict[str, Any]) -> concurrent.futures.Future[None]:
    """Work beside this thread, which will not wait for it if it fails itself."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    started = pool.submit(work, argument)
    pool.shutdown(wait=False)
    return started


@contextlib.contextmanager
def _cause(client: EngineClient) -> Iterator[None]:
    """An engine's failure goes before the error that it caused in the group."""
    try:
        yield
    except Exception as error:
        if client.failure is not None and client.failure is not error:
            raise client.failure from error
        raise


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
