"""Many ranks: one process per rank, the policy sharded over all of them (FSDP2), the batch shared out by work.

Every rank is given the whole batch and computes advantages and weights of all of it, so that every global statistic is a
number that needs no communication. Forward and backward passes run on a rank's own trajectories alone, and their gradients
are **summed**: the losses already carry the denominator of the whole batch. What is logged is collected before it is reduced.
So N ranks take the step that one rank takes, up to the order of the sums.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from align.metrics import Metric

_NOTHING = -1  # instead of a number, when rank 0 releases the others
_ATTENTION_TOKENS = 12_288
"""Length at which causal attention costs as much as the matrices of a layer: 12 times a hidden size of 1,024.

A layer has about `12 h^2` parameters, hence `24 h^2` operations per token; the scores and the mixture of values of a causal
sequence of T tokens take `2 h T` per token on average. Other sizes move the balance a little, never the gradient."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass of a rank.

    Attributes:
        rows: Its trajectories.
        counts: False for a pass that only keeps this rank in step with the others: its tokens carry no loss and nothing of
            it is logged.
    """

    rows: list[int]
    counts: bool


class Ranks:
    """This process among the `num_ranks` that hold one learner. Made alone by default; then nothing is communicated.

    Args:
        rank: Number of this process; rank 0 answers for all.
        num_ranks: Processes.
        mesh: Of all processes, [num_ranks]; None for one that is alone.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1, mesh: DeviceMesh | None = None) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.mesh = mesh

    @property
    def first(self) -> bool:
        """Whether this rank answers for all."""
        return self.rank == 0

    def passes(self, lengths: Sequence[int], cut: Callable[[Sequence[int]], Sequence[Sequence[int]]]) -> Iterator[Pass]:
        """This rank's passes over the batch, as many as every other rank's, since each pass gathers the weights.

        Args:
            lengths: Tokens of all trajectories of the batch.
            cut: Cuts trajectories of these lengths into micro-batches of their numbers.

        Yields:
            Micro-batches of trajectories of the batch; each trajectory counts on one rank and in one pass.
        """
        shares = balance(lengths, self.num_ranks)
        cuts = [[[rows[i] for i in part] for part in cut([lengths[row] for row in rows])] for rows in shares]
        own = cuts[self.rank]
        yield from (Pass(rows, counts=True) for rows in own)
        shortest = min(range(len(lengths)), key=lambda row: lengths[row])
        for _ in range(max(map(len, cuts)) - len(own)):
            yield Pass([shortest], counts=False)

    def gather(self, metrics: Sequence[Metric]) -> list[Metric]:
        """The metrics of all ranks, in the order of the ranks, not yet reduced; every rank gets them.

        They travel as JSON, which carries a float to its last bit and, unlike a pickle, nothing that could be run.
        """
        if self.mesh is None:
            return list(metrics)
        own = json.dumps([(m.name, m.value, m.weight) for m in metrics]).encode()
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        sizes[self.rank] = len(own)
        texts = torch.zeros(self.num_ranks, int(self.sum(sizes).max()), dtype=torch.uint8)
        texts[self.rank, : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        rows = zip(self.sum(texts), sizes.tolist(), strict=True)
        return [Metric(*parts) for row, size in rows for parts in json.loads(bytes(row[:size].tolist()))]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, element by element; every rank gets it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def lead(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Rank 0: one whole tensor after the other, gathered while the others `follow`. It may stop anywhere."""
        for number, tensor in enumerate(tensors):
            self._announce(number)
            yield whole(tensor)

    def release(self) -> None:
        """Rank 0: the others need not follow any longer."""
        self._announce(None)

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Other ranks: take part in every gather that rank 0 begins, until it releases this rank."""
        while (number := self._announce(None)) is not None:
            whole(tensors[number])

    def _announce(self, number: int | None) -> int | None:
        """What rank 0 announces, on every rank."""
        if self.mesh is None:
            return number
        message = torch.tensor(_NOTHING if number is None else number)
        dist.broadcast(message, src=0)
        return None if message == _NOTHING else int(message)


def balance(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Share trajectories out by work, attention included: the largest first, each to the rank with the least so far.

    Deterministic, so that every rank finds the same shares by itself.

    Returns:
        Numbers of the trajectories of every rank, ascending; each appears once.
    """
    work = [0] * num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rank = work.index(min(work))
        shares[rank].append(row)
        work[rank] += lengths[row] * (_ATTENTION_TOKENS + lengths[row])
    return [sorted(rows) for rows in shares]


# --- weights --------------------------------------------------------------------------------------------------------


def shard(model: Any, ranks: Ranks) -> None:
    """Shard the parameters of a model over all ranks, in place: layer by layer, and what is left as one more part.

    Parameters stay float32 and are gathered as float32; bfloat16 products come from autocast, as on one rank, so that the
    number of ranks changes no rounding of a forward pass. A layer is gathered for its forward and its backward pass and freed
    after each; what is left (embeddings, head) stays whole in between, so that a loss may use the head's weight. Gradients
    are summed, not averaged.

    Args:
        model: On any device; the shards are on the mesh's. Only one part at a time is whole there.
        ranks: All ranks; nothing happens if this one is alone.
    """
    if ranks.mesh is None:
        return
    layers = set(getattr(model, "_no_split_modules", None) or ())  # names of classes, by transformers
    parts = [module for module in model.modules() if type(module).__name__ in layers and module is not model]
    for part in (*parts, model):
        fully_shard(part, mesh=ranks.mesh, reshard_after_forward=part is not model)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # else the factor needs an operation that gloo does not have


def is_sharded(model: Any) -> bool:
    """Whether every forward pass of the model waits for other ranks."""
    return isinstance(model, FSDPModule)


def named_shards(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every parameter once, by name; of a sharded model what this rank holds, also after a forward pass without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()
    yield from model.named_parameters()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a sharded one, all of it; then every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a sharded one, what this rank holds of it: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_all(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds for its rows of a parameter, as the shard of one tensor of all ranks; a lone number as it is."""
    if isinstance(tensor, DTensor) or not isinstance(parameter, DTensor) or not tensor.dim():
        return tensor
    shape = torch.Size((parameter.shape[0], *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, placed as a parameter of the same shape is: on its device, and of a sharded one the own shard."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other.

    Attributes:
        address: Of rank 0.
        port: There.
    """

    address: str
    port: int


def host(address: str, timeout_s: float) -> tuple[Any, Meeting]:
    """Rank 0: open a place to meet, which listens on this address alone.

    Returns:
        The store behind it, to be kept and given to `join`; and the place, for the others.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen()
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, Meeting(address, port)


def join(
    meeting: Meeting, rank: int, num_ranks: int, *, address: str, device: str, timeout_s: float, store: Any = None
) -> Ranks:
    """Form the group of all ranks; returns once all are there. Gloo on CPUs, NCCL on GPUs.

    Args:
        meeting: Where rank 0 waits.
        rank: Number of this process.
        num_ranks: Processes.
        address: Of this node; no other of its addresses is listened on.
        device: "cpu" or "cuda".
        timeout_s: Longest wait for another rank, now and in every later operation.
        store: On rank 0, from `host`.

    Raises:
        ValueError: If no network interface has the address.
        RuntimeError: If a rank does not come in time.
    """
    interface = interface_of(address)
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            meeting.address, meeting.port, is_master=False, timeout=timeout, wait_for_workers=False
        )
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"  # objects go by gloo in either case
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return Ranks(rank, num_ranks, init_device_mesh(device, (num_ranks,)))


def interface_of(address: str) -> str:
    """Name of the network interface that has this address.

    Raises:
        ValueError: If none has.
    """
    interfaces: dict[str, Any] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(known.address == address for known in addresses):
            return name
    raise ValueError(f"no network interface of this node has the address {address}; there are {sorted(interfaces)}")
