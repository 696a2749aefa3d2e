"""Several machines on one: raylets of a cluster of the test's own that join and are killed on demand.

Run as a program it is the cluster, told what to do line by line: it has to be a process of its own, since Ray reads its
environment when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.harness.commands import wait_until
from tests.places import REPOSITORY

_FAST = {"period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3, "initial_delay_ms": 0}


class Machines:
    """A cluster whose head takes no process of a run.

    Args:
        folder: For Ray's sessions; a short path, since sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RAY"))}
        self._token = secrets.token_hex(32)
        health = {f"RAY_health_check_{name}": str(value) for name, value in _FAST.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.machines"],
            cwd=REPOSITORY,
            env=inherited | self._closed | health | {"ALIGN_TEST_MARK": self.mark, "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "machines.log").open("w"),
            text=True,
            start_new_session=True,
        )
        self.address = self.tell("start")

    @property
    def _closed(self) -> dict[str, str]:
        return {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }

    @property
    def environment(self) -> dict[str, str]:
        """What a driver sets to join."""
        return self._closed | {"RAY_ADDRESS": self.address}

    def tell(self, what: str) -> Any:
        """Let the cluster do something; returns its answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the cluster ended at {what!r}; see machines.log"
        return json.loads(line)

    def join(self, cpus: int = 1) -> psutil.Process:
        """A machine more: its raylet."""
        return psutil.Process(self.tell(f"join {cpus}"))

    def hold(self) -> None:
        """Somebody else takes a CPU."""
        self.tell("hold")

    def release(self) -> None:
        """Somebody else gives it back."""
        self.tell("release")

    def end(self) -> None:
        """End every process of the cluster, orphans too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("ALIGN_TEST_MARK") == self.mark:
                    process.kill()
        self._process.wait(30)


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """A cluster without machines; they join later."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    cluster = Machines(folder)
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def actors_of(raylet: psutil.Process) -> set[str]:
    """Classes of the actors on a machine, by the titles that Ray gives its processes."""
    titles = set()
    for process in raylet.children():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "Actor" in title:
                titles.add(title.removeprefix("ray::").split(".")[0].split()[0])
    return titles


def gone(raylet: psutil.Process) -> None:
    """A machine that leaves without a word."""
    raylet.kill()
    wait_until(lambda: not raylet.is_running() or raylet.status() == psutil.STATUS_ZOMBIE, "the end of the raylet")


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints too
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    holder = None
    for line in sys.stdin:
        what, *amounts = line.split()
        answer: Any = None
        if what == "start":
            answer = cluster.add_node(num_cpus=0, node_ip_address="127.0.0.1", include_dashboard=False).gcs_address
        elif what == "join":
            node = cluster.add_node(num_cpus=int(amounts[0]), node_ip_address="127.0.0.1")
            answer = node.all_processes["raylet"][0].process.pid
        elif what == "hold":
            ray.init(address=cluster.address, namespace="somebody", log_to_driver=False)
            holder = ray.remote(num_cpus=1)(type("HoldActor", (), {"there": lambda self: True})).remote()
            ray.get(holder.there.remote())
        elif what == "release":
            ray.kill(holder)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
