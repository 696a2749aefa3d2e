"""Every node of a cluster: the looks of `machine` and `storage` there, its clock, and the way to it and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.doctor.machine import machine
from cluster.doctor.network import listening, reach
from cluster.doctor.storage import Storage
from cluster.doctor.verdict import Verdict
from cluster.doctor.versions import differences, installed
from cluster.faults import from_ray
from cluster.fleet.placement import on_node

NODE_S = 90.0
"""Time for all nodes together to answer; a process has to start on each."""
_CALL_S = 30.0
_MAX_SKEW_S = 1.0


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive, as Ray knows it."""

    id: str
    address: str
    name: str

    @staticmethod
    def alive() -> list[Node]:
        """All there are; one that shares its address with another is told from it by its id."""
        known = [node for node in ray.nodes() if node["Alive"]]
        addresses = [node["NodeManagerAddress"] for node in known]
        found = []
        for node, address in zip(known, addresses, strict=True):
            short = address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:6]}"
            found.append(Node(node["NodeID"], address, short))
        return sorted(found, key=lambda node: node.name)


class Probe:
    """Looks at the node that it runs on. A plain class; `placement.on_node` makes it a Ray actor."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def look(self, address: str, alone: bool, storage: Storage | None) -> tuple[list[Verdict], dict[str, str]]:
        """The verdicts of this machine and what is installed on it."""
        seen = [] if storage is None else list(storage.look())
        return [*machine(address, alone=alone), *seen], installed()

    def clock(self) -> float:
        """Seconds since 1970 here."""
        return time.time()

    def listen(self, address: str) -> int:
        """Open a port for as long as this process lives."""
        return self._open.enter_context(listening(address))

    def reach(self, address: str, port: int) -> str:
        """See `network.reach`."""
        return reach(address, port)


def nodes(storage: Storage | None) -> Iterator[Verdict]:
    """Look at all nodes at once; a process of Ray has to be connected.

    Args:
        storage: What every node has to find, or None without a run.
    """
    alive = Node.alive()
    alone = len({node.address for node in alive}) == 1
    named = [replace(node, name="") for node in alive] if len(alive) == 1 else alive
    probes = {node: on_node(Probe, node.id) for node in named}
    try:
        looks = {node: probe.look.remote(node.address, alone, storage) for node, probe in probes.items()}
        ray.wait(list(looks.values()), num_returns=len(looks), timeout=NODE_S)
        own, here = installed(), ray.util.get_node_ip_address()
        yield Verdict("nodes", "ok", f"{len(alive)} alive, driven from {here}")
        nccl: dict[str, str] = {}
        for node, probe in probes.items():
            for verdict in _node(node, probe, looks[node], own, here):
                if verdict.item == "NCCL":
                    nccl[node.name] = verdict.found
                yield replace(verdict, node=node.name)
        if len(set(nccl.values())) > 1:
            found = "the nodes have different ones: " + ", ".join(f"{name} {at}" for name, at in nccl.items())
            yield Verdict("NCCL", "fail", found, "use one image, or one build of torch, on all nodes with GPUs")
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _node(node: Node, probe: Any, look: Any, own: Mapping[str, str], here: str) -> Iterator[Verdict]:
    try:
        verdicts, found = ray.get(look, timeout=0)
        yield from verdicts
        yield from differences(found, own)
        yield _clock(lambda: float(ray.get(probe.clock.remote(), timeout=_CALL_S)))
        yield _way(node, probe, here)
    except GetTimeoutError:
        fix = "ray status says whether it is there; the log of its raylet says more"
        yield Verdict(
            "answer", "fail", f"none in time: {NODE_S:g} s for all looks, {_CALL_S:g} s for a call after that", fix
        )
    except RayError as error:
        found = from_ray(error, "probe", 0, "a look at the node").message.splitlines()[-1]
        yield Verdict("answer", "fail", found, "install align on this node as where the run is driven")


def _clock(read: Callable[[], float], now: Callable[[], float] = time.time) -> Verdict:
    """Its clock against the middle of the call that asked for it; half the call's time is what may be wrong about that.

    More than a second is a warning: rows, logs and checkpoints are dated by it, and certificates and W&B's server check dates.
    """
    read()  # the first call pays for what is set up
    began = now()
    theirs = read()
    ended = now()
    skew, unsure = theirs - (began + ended) / 2, (ended - began) / 2
    good = abs(skew) <= _MAX_SKEW_S + unsure
    return Verdict.of("clock", good, f"{skew:+.3f} s (± {unsure:.3f})", "on this node: chronyc makestep", "warn")


def _way(node: Node, probe: Any, here: str) -> Verdict:
    """Connections from here to the node, and from it to here."""
    port = ray.get(probe.listen.remote(node.address), timeout=_CALL_S)
    there = reach(node.address, port)
    with listening(here) as own_port:
        back = ray.get(probe.reach.remote(here, own_port), timeout=_CALL_S)
    problems = [
        *([f"{here} does not reach {node.address}:{port}: {there}"] if there else []),
        *([f"{node.address} does not reach {here}:{own_port}: {back}"] if back else []),
    ]
    found = "; ".join(problems) or f"{here} and {node.address} reach each other"
    return Verdict.of(
        "way", not problems, found, "let the nodes reach all ports of each other (firewall, network policy)"
    )
