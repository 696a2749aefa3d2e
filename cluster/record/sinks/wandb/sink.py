"""The record of a run for W&B: on disk first, uploaded by a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.metrics import GLOSSARY
from cluster.record.sinks.wandb.axes import AXES, axis_of, summary_of
from cluster.record.sinks.wandb.identity import claim_run_id
from cluster.record.sinks.wandb.settings import WandbConfig

if TYPE_CHECKING:
    from cluster.record.alerts import Alert

_FLUSH_S = 1.0  # how often W&B's process writes to disk
_MAX_TITLE = 63


class WandbSink:
    """A W&B run that is always recorded on disk first, so that training never waits for a server.

    Online, a second process uploads the record while it is written; what it has not uploaded by the end can be synced later.

    Args:
        cfg: Mode, project, tags.
        run_dir: The run folder; the record goes to `run_dir/wandb`.
        name: Name of the run.
        config: The resolved config.
        online: From `check_online`.
        warn: Told if the upload ends before the run does.
        earlier: Rows of metrics.jsonl from earlier processes of the run, for the axis of trained tokens.
        earlier_s: Seconds of these processes, for the axis of time.
    """

    def __init__(
        self,
        cfg: WandbConfig,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        online: bool,
        warn: Callable[[str], None] = lambda text: None,
        earlier: Sequence[Mapping[str, Any]] = (),
        earlier_s: float = 0.0,
    ) -> None:
        self._cfg, self._run_dir, self._name, self._config, self._online = cfg, run_dir, name, dict(config), online
        self._warn, self._earlier_s = warn, earlier_s
        self._trained = {row["step"]: row.get("tokens/trained", 0) for row in earlier}
        self._recent: list[tuple[float, int, dict[str, float]]] = []  # rows that may not be on disk yet
        self._open()

    def _open(self) -> None:
        import psutil
        import wandb

        # W&B stages tables in the user's home, which need not outlive a job; the record is to be complete where it lies.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._run_dir / "wandb" / "data"))
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
            group=self._cfg.group,
            name=self._name,
            notes=self._cfg.notes,
            tags=list(self._cfg.tags),
            config=self._config,
            settings=settings,
        )
        self._writers = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
        self.directory = Path(self.run.settings.sync_dir)
        self._define()
        self._upload = _start_upload(self.directory, self._upload_log) if self._online else None

    @property
    def _upload_log(self) -> Path:
        return self._run_dir / "wandb" / "upload.log"

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
        for axis in AXES:
            self.run.define_metric(axis, hidden=True)
        for name in GLOSSARY:
            self.run.define_metric(name, step_metric=axis_of(name), summary=summary_of(name))

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`. Without its writer the record goes on in a second file of the same W&B run."""
        now, rows = time.monotonic(), [(step, {**self._axes(step, wall_s, values), **values})]
        if self._lost_writer():
            self._open()
            rows = [row[1:] for row in self._recent] + rows
        for number, row in rows:
            self.run.log(row, step=number)
        since = now - 2 * _FLUSH_S
        self._recent = [row for row in self._recent if row[0] > since] + [(now, *rows[-1])]
        self._look_after_upload()

    def _axes(self, step: int, wall_s: float, values: Mapping[str, float]) -> dict[str, float]:
        """Where the row lies on each of the AXES. Steps behind this one were lost with an earlier process and do not count."""
        self._trained[step] = values.get("tokens/trained", self._trained.get(step, 0))
        trained = sum(tokens for number, tokens in self._trained.items() if number <= step)
        return {"step": step, "trained_tokens": trained, "wall_s": self._earlier_s + wall_s}

    def _look_after_upload(self) -> None:
        if self._upload is not None and self._upload.poll() is not None:
            self._upload = None
            self._warn(
                f"{_why_upload_ended(self._upload_log)}; the record goes on on disk: wandb sync {self.directory}"
            )

    def alert(self, alert: Alert) -> None:
        """See `AlertSink`. W&B tells whoever asked it to: by mail or chat, as their settings there say."""
        if self._lost_writer():
            self._open()
        self.run.alert(alert.title[:_MAX_TITLE], alert.text, level=alert.level.upper())

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


def _start_upload(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", str(directory)]
    with log.open("ab") as output:
        # In a session of its own, since a Ctrl-C in the terminal is not for it.
        return subprocess.Popen(
            command,
            env=os.environ | {"WANDB_SILENT": "false"},  # so that it says why it ends
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _why_upload_ended(log: Path) -> str:
    texts = (line.removeprefix("wandb:").strip().removeprefix("ERROR").strip() for line in log.open(errors="replace"))
    said = [text for text in texts if text]
    return f"the upload to W&B ended ({said[-1] if said else 'without a word'})"
