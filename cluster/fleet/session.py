"""Ray's session: a cluster that is joined, or a Ray of this machine alone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from cluster.capacity.machines import Cluster, ThisMachine
from cluster.faults import ResourceError


@contextlib.contextmanager
def ray_session(address: str | None, weights_bytes: int) -> Iterator[str]:
    """Join a cluster (as in a Ray job), else start Ray on this machine alone.

    A local Ray listens on 127.0.0.1 only and has no dashboard; its environment was set by `address.closed_ray`.

    Args:
        address: Of the cluster, or None for a Ray of one's own.
        weights_bytes: Size of the policy's weights on disk.

    Yields:
        Ray's session folder with its logs.

    Raises:
        ResourceError: If the cluster cannot be joined, or Ray not started.
    """
    try:
        with _interrupts_held():
            context = _start(weights_bytes) if address is None else _join(address)
        yield str(context.address_info.get("session_dir", ""))
    finally:
        with _interrupts_held():
            ray.shutdown()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold a Ctrl-C until the block is over: Ray that is interrupted while it starts or ends crashes the process later."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            raise KeyboardInterrupt


def _join(address: str) -> Any:
    return _init(f"join the cluster at {address}", address=address)


def _start(weights_bytes: int) -> Any:
    here = ThisMachine.look()
    return _init(
        "start Ray on this machine",
        address="local",
        num_cpus=here.num_cpus,
        num_gpus=here.num_gpus,
        include_dashboard=False,
        object_store_memory=(256 << 20) + 4 * weights_bytes,
        _node_ip_address="127.0.0.1",
    )


def _init(what: str, **options: Any) -> Any:
    try:
        return ray.init(namespace="align", logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:  # Ray raises a bare one when a node takes longer than 30 s to come up
        raise ResourceError(
            f"could not {what}: {error}", "check RAY_ADDRESS and the cluster's token, or try again"
        ) from None


def joined(address: str) -> Cluster:
    """What the cluster that was joined has now, and may grow to."""
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    return Cluster(address, machines, ray.cluster_resources(), grows_to())


def grows_to() -> Mapping[str, float]:
    """What an autoscaler may grow the cluster to, which is not public in Ray; empty where there is none."""
    return ray._private.state.state.get_max_resources_from_cluster_config() or {}
