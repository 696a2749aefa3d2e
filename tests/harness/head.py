"""A Ray head of the test's own on 127.0.0.1, with a token, as a platform engineer would start one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.harness.commands import wait_until


@dataclass(frozen=True)
class Head:
    """A head that runs.

    Attributes:
        address: Of its dashboard.
        token: That it asks for.
        folder: Of its sessions, with the logs of all its processes.
        gcs_address: Where drivers and machines join.
        pid: Of `ray start`.
    """

    address: str
    token: str
    folder: Path
    gcs_address: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a client sets to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextlib.contextmanager
def ray_head(environment: dict[str, str]) -> Iterator[Head]:
    """Start a head with two CPUs; at the end, end it and all that it started."""
    token = secrets.token_hex(32)
    port, dashboard = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: sockets lie in it
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RAY"))}
    closed = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "min-worker-port": 20000,
        "max-worker-port": 29999,
        "temp-dir": folder,
        "num-cpus": 2,
    }
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            env=inherited | closed | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: _answers(dashboard), "the dashboard's start", timeout_s=120)
        yield Head(f"http://127.0.0.1:{dashboard}", token, folder, f"127.0.0.1:{port}", head.pid)
    finally:
        _end(psutil.Process(head.pid))
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """Ports that are free now, outside Ray's range for workers."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(head: psutil.Process) -> None:
    started = [*head.children(recursive=True), head]
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(started, timeout=15)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
