"""Starting `align` as a user does, and looking at what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

from tests.places import REPOSITORY

DEMO = REPOSITORY / "deploy" / "runs" / "demo.toml"


class AlignProcess:
    """One `align` command in a process of its own; all its descendants carry a mark in their environment.

    Args:
        arguments: After `align`.
        environment: Added to this process's, which is passed on without its settings of W&B and Ray.
    """

    def __init__(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RAY"))}
        mark = {"ALIGN_TEST_MARK": self.mark, "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
            cwd=REPOSITORY,
            env=inherited | mark | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to the command and to everything in its process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float) -> tuple[int, str]:
        """Exit code and console text; a process that does not end is killed and fails the test."""
        try:
            console, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            console, _ = self.process.communicate()
            raise AssertionError(f"align did not end within {timeout_s} s:\n{console[-4000:]}") from None
        return self.process.returncode, console

    def left_behind(self, patience_s: float = 15) -> list[str]:
        """Command lines of marked processes that are still there after a while."""
        deadline = time.monotonic() + patience_s
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [" ".join(p.cmdline())[:200] for p in left if p.is_running()]

    def kill_engine(self) -> None:
        """What the kernel does to the process of the only engine when memory runs out."""
        (engine,) = [process for process in self.descendants() if "EngineCore" in " ".join(process.cmdline())]
        os.kill(engine.pid, signal.SIGKILL)

    def descendants(self) -> list[psutil.Process]:
        """All running processes with the mark, the command itself excepted."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marked = process.environ().get("ALIGN_TEST_MARK") == self.mark
                if marked and process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def align(
    *arguments: str | Path, timeout_s: float = 300, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run `align` to its end and check that it left no process behind; exit code and console text."""
    command = AlignProcess(*arguments, environment=environment)
    result = command.wait(timeout_s)
    assert command.left_behind() == []
    return result


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
    """Poll a condition of the outside world."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl, -1 without one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def trajectories(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of the trajectories of every step, in order."""
    files = sorted((run_dir / "trajectories").glob("step_*.parquet"))
    return {int(f.stem.split("_")[1]): pyarrow.parquet.read_table(f).to_pylist() for f in files}


def summary(run_dir: Path) -> dict[str, Any]:
    """summary.json."""
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content
