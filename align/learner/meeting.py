"""How the processes of one learner meet: rank 0 opens a place, all others come there, and together they are its ranks."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from align.model.ranks import Ranks


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
