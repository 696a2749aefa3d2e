"""Programs that measure in a process of their own, since vLLM changes torch in the process that it is imported into.

A probe is a module that prints what it found as its last line, in JSON; a test starts it and judges the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from tests.places import REPOSITORY

_QUIET = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONPATH": str(REPOSITORY),
}


class Probe:
    """A probe that runs.

    Args:
        module: Its dotted name.
        arguments: Behind it on the command line.
    """

    def __init__(self, module: str, *arguments: str | Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, cwd=REPOSITORY, env=os.environ | _QUIET, **pipes)

    def answer(self, timeout_s: float = 900) -> dict[str, Any]:
        """What it found."""
        try:
            console, errors = self._process.communicate(timeout=timeout_s)
        finally:
            self.end()
        assert self._process.returncode == 0, errors[-4000:]
        found: dict[str, Any] = json.loads(console.splitlines()[-1])
        return found

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()


async def one_by_one(
    cases: Iterable[str], measure: Callable[[str], Awaitable[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """One engine after the other; an error stands in place of the figures."""
    found = {}
    for case in cases:
        try:
            found[case] = await measure(case)
        except Exception as error:
            found[case] = {"error": f"{type(error).__name__}: {error}"}
    return found
