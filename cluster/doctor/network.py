"""The network as one machine sees it: the interface that processes of a run talk over, and whether another machine answers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence

import psutil

from cluster.doctor.verdict import Verdict

_CONNECT_S = 5.0
_PATTERNS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def network(address: str, *, alone: bool, environment: Mapping[str, str] = os.environ) -> Iterator[Verdict]:
    """The interface of the machine's address, and the ones that NCCL and gloo are told to take.

    Args:
        address: Under which Ray knows the machine.
        alone: Whether no other machine takes part; then the loopback interface is right.
        environment: Of the processes on it.
    """
    addresses = {name: [one.address for one in known] for name, known in psutil.net_if_addrs().items()}
    up = [name for name, stats in psutil.net_if_stats().items() if stats.isup and name in addresses]
    for variable in _PATTERNS:
        if pattern := environment.get(variable):
            yield _told(variable, pattern, up, alone)
    own = next((name for name, known in addresses.items() if address in known), None)
    if own is None:
        fix = "ray start --node-ip-address with an address of this machine"
        yield Verdict("interface", "fail", f"none has the address {address}; there are {', '.join(addresses)}", fix)
        return
    good = alone or not is_loopback(address)
    fix = "ray start --node-ip-address with an address that the other nodes reach"
    yield Verdict.of(
        "interface", good, f"{own}, {address}" if good else f"{address} is reached by nobody else ({own})", fix
    )
    yield _port(address)


def _told(variable: str, pattern: str, up: Sequence[str], alone: bool) -> Verdict:
    chosen = chosen_interfaces(variable, pattern, up)
    if not chosen:
        return Verdict(
            "interface",
            "fail",
            f"{variable}={pattern} names no interface that is up; there are {', '.join(up)}",
            f"unset {variable}, or set it to one of these on this node",
        )
    others = [name for name in chosen if name != "lo"]
    good = alone or bool(others)
    text = f"{variable}={pattern} takes {', '.join(chosen)}"
    return Verdict.of("interface", good, text, f"unset {variable}: over the loopback no other node is reached")


def chosen_interfaces(variable: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The interfaces that NCCL or gloo would take.

    gloo takes names, with commas between; NCCL takes beginnings of names, after `=` whole names, after `^` all but those.
    Source: NCCL user guide, NCCL_SOCKET_IFNAME.
    """
    if variable.startswith("GLOO"):
        return [name for name in names if name in pattern.split(",")]
    wanted = pattern.lstrip("^").lstrip("=").split(",")
    whole = pattern.lstrip("^").startswith("=")
    matching = [n for n in names if (n in wanted if whole else n.startswith(tuple(wanted)))]
    return [n for n in names if n not in matching] if pattern.startswith("^") else matching


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the machine itself."""
    return address == "::1" or address.startswith("127.")


def _port(address: str) -> Verdict:
    """Learner and engines meet at ports that the system chooses."""
    try:
        with listening(address):
            return Verdict("ports", "ok", f"a free one can be opened at {address}")
    except OSError as error:
        return Verdict(
            "ports", "fail", f"none can be opened at {address}: {error}", "see sysctl net.ipv4.ip_local_port_range"
        )


@contextlib.contextmanager
def listening(address: str) -> Iterator[int]:
    """A free port that takes connections while the block lasts; the kernel answers, nobody reads."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((address, 0))
        server.listen(128)
        yield server.getsockname()[1]


def reach(address: str, port: int) -> str:
    """Why no connection comes about, or nothing."""
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S):
            return ""
    except OSError as error:
        return str(error) or type(error).__name__
