"""The record of a run for W&B: on disk first, uploaded by a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.metrics import GLOSSARY
from cluster.wandb_link import claim_run_id


class WandbConfig(BaseModel):
    """Weights & Biases. The key comes from WANDB_API_KEY or netrc, never from a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when a key is set, else offline. An offline run can be synced later."
    )
    project: str = Field("align", description="Project.")
    entity: str | None = Field(None, description="Team or user; left out: the key's own.")
    tags: tuple[str, ...] = Field((), description="Tags.")
    deadline_s: float = Field(15, gt=0, description="Time for the last upload at the end of an online run.")


_FLUSH_S = 1.0  # how often W&B's process writes to disk


class WandbSink:
    """A W&B run that is always recorded on disk first, so that training never waits for a server.

    Online, a second process uploads the record while it is written; what it has not uploaded by the end can be synced later.

    Args:
        cfg: Mode, project, tags.
        run_dir: The run folder; the record goes to `run_dir/wandb`.
        name: Name of the run.
        config: The resolved config.
        online: From `check_online`.
    """

    def __init__(self, cfg: WandbConfig, run_dir: Path, name: str, config: Mapping[str, Any], online: bool) -> None:
        self._cfg, self._run_dir, self._name, self._config, self._online = cfg, run_dir, name, dict(config), online
        self._recent: list[tuple[float, int, dict[str, float]]] = []  # rows that may not be on disk yet
        self._open()

    def _open(self) -> None:
        import psutil
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, x_transaction_log_flush_interval=_FLUSH_S, save_code=False
        )
        self.run = wandb.init(
            id=claim_run_id(self._run_dir),  # one run of the server for all processes of a run
            resume="allow",
            mode="offline",
            dir=self._run_dir,
            project=self._cfg.project,
            entity=self._cfg.entity,
            name=self._name,
            tags=list(self._cfg.tags),
            config=self._config,
            settings=settings,
        )
        self._writers = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
        self.directory = Path(self.run.settings.sync_dir)
        self._define()
        self._upload = _start_upload(self.directory) if self._online else None

    def _lost_writer(self) -> bool:
        """Whether W&B's process was ended; Ray signals it together with the run when a job is stopped.

        The connection to it is given up here, or W&B would complain at the end.
        """
        import psutil
        import wandb

        if all(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in self._writers):
            return False
        with contextlib.suppress(Exception):
            wandb.teardown()
        return True

    def _define(self) -> None:
        for axis in ("step", "wall_s"):
            self.run.define_metric(axis, hidden=True)
        for name in GLOSSARY:
            self.run.define_metric(name, step_metric="step")

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`. Without its writer the record goes on in a second file of the same W&B run."""
        now, rows = time.monotonic(), [(step, {"step": step, "wall_s": wall_s, **values})]
        if self._lost_writer():
            self._open()
            rows = [row[1:] for row in self._recent] + rows
        for number, row in rows:
            self.run.log(row, step=number)
        since = now - 2 * _FLUSH_S
        self._recent = [row for row in self._recent if row[0] > since] + [(now, *rows[-1])]

    def close(self) -> None:
        """Write the record to the end, and give an upload its last seconds."""
        if not self._lost_writer():
            self.run.finish()
        if self._upload is not None:
            try:
                self._upload.wait(self._cfg.deadline_s)
            except subprocess.TimeoutExpired:
                self._upload.kill()
                self._upload.wait()

    @property
    def uploaded(self) -> bool:
        """True if all of an online run reached the server."""
        return self._upload is not None and self._upload.returncode == 0


def _start_upload(directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(directory)]
    nowhere = subprocess.DEVNULL
    # In a session of its own, since a Ctrl-C in the terminal is not for it.
    return subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
