"""The upload of a record while it is written, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Upload:
    """Uploads a record until it is complete.

    Args:
        directory: Of the record.
        log: Where the process writes what it has to say; lines are added.
    """

    def __init__(self, directory: Path, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(directory)]
        with log.open("ab") as output:
            # In a session of its own, since a Ctrl-C in the terminal is not for it.
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"WANDB_SILENT": "false"},  # so that it says why it ends
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    @property
    def complete(self) -> bool:
        """Whether it is over and all has reached the server."""
        return self._process.returncode == 0

    def why_ended(self) -> str:
        """Its last words."""
        with self._log.open(errors="replace") as lines:
            texts = [line.removeprefix("wandb:").strip().removeprefix("ERROR").strip() for line in lines]
        said = [text for text in texts if text]
        return f"the upload to W&B ended ({said[-1] if said else 'without a word'})"

    def finish(self, deadline_s: float) -> None:
        """Give it so much time to end by itself."""
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
