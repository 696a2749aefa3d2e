"""Where metrics go: console, JSONL, W&B. None of them may end a run or make it wait."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from align.metrics import GLOSSARY
from cluster.faults import TrackingError


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


class Sink(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """Record the values of one step; `wall_s` counts from the start of the run."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class JsonLines:
    """One JSON object per line, written through at once.

    Args:
        path: The file; lines are added.
    """

    def __init__(self, path: Path) -> None:
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # by a kill; the next line must not continue it
            self._file.write("\n")

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        row = {"step": step, "wall_s": round(wall_s, 3), **{name: values[name] for name in sorted(values)}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


_COLUMNS = (  # heading, metric, format, width
    ("reward/tok", "reward/token_mean", "{:.4f}", 10),
    ("KL/tok", "kl/behavior_reference", "{:.4f}", 8),
    ("entropy", "policy/entropy", "{:.3f}", 8),
    ("stale", "staleness/max", "{:.0f}", 5),
    ("mismatch", "mismatch/abs_mean", "{:.1e}", 8),
    ("tok/s", "throughput/generated_tokens_per_s", "{:.0f}", 6),
    ("wait s", "time/rollout_wait_s", "{:.2f}", 7),
    ("update s", "time/update_s", "{:.2f}", 8),
    ("publish s", "time/publish_s", "{:.2f}", 9),
)
_HEADING_EVERY = 20


class Console:
    """What a person sees: a line per step, and a bar with the time left where the output is a terminal.

    Args:
        num_steps: Steps of the run, for the time left.
        rich: Rich's console.
    """

    def __init__(self, num_steps: int, rich: RichConsole | None = None) -> None:
        self._rich = rich or RichConsole(highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._lines = 0
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """A plain line."""
        self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Something that a person should know, in yellow; kept for the summary."""
        self.warnings.append(text)
        self._rich.print(f"warning: {text}", style="yellow", markup=False)

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        """One line for the step; evaluations get their own."""
        evaluated = {name: value for name, value in values.items() if name.startswith("eval/")}
        if "time/step_s" in values:
            self._step_line(step, wall_s, values)
        if evaluated:
            self.say(f"  evaluation after step {step}: " + _evaluation(evaluated))

    def _step_line(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        if self._lines % _HEADING_EVERY == 0:
            heading = " ".join(f"{title:>{width}}" for title, _, _, width in _COLUMNS)
            self._rich.print(f"{'step':>9} {heading} {'left':>6}", style="bold", markup=False)
        self._lines += 1
        cells = " ".join(
            f"{shape.format(values[name]) if name in values else '-':>{width}}" for _, name, shape, width in _COLUMNS
        )
        left = _clock(self._time_left(step, wall_s))
        self.say(f"{f'{step}/{self._num_steps}':>9} {cells} {left:>6}")
        if self._rich.is_terminal:
            self._show_bar(step, left)

    def _time_left(self, step: int, wall_s: float) -> float | None:
        if self._first is None:
            self._first = (step, wall_s)
            return None
        first_step, first_wall_s = self._first
        return (wall_s - first_wall_s) / (step - first_step) * (self._num_steps - step)

    def _show_bar(self, step: int, left: str) -> None:
        if self._progress is None:
            left_column = TextColumn("{task.fields[left]} left")
            columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left_column)
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._progress.add_task("steps", total=self._num_steps, left="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, left=left)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _evaluation(values: Mapping[str, float]) -> str:
    shapes = {
        "kl_per_token": "KL per token {:.4f}",
        "grammatical": "grammatical {:.1%}",
        "completion_tokens_mean": "length {:.1f}",
    }
    parts: dict[str, list[str]] = {}
    for name, value in values.items():
        _, which, what = name.split("/")
        if what in shapes:
            parts.setdefault(which, []).append(shapes[what].format(value))
    return "; ".join(f"{which}: {', '.join(texts)}" for which, texts in parts.items())


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


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
        identity = self._run_dir / "wandb_id"  # one run of the server for all processes of a run
        if not identity.is_file():
            identity.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            id=identity.read_text(),
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


def check_online(cfg: WandbConfig, warn: Any) -> bool:
    """Whether to upload: asked for or a key is set, and a server is there.

    Raises:
        TrackingError: If the server, or the form of the key, says that the key is wrong.
    """
    if cfg.mode in ("offline", "disabled") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.errors import AuthenticationError

    advice = "set WANDB_API_KEY to a valid key (wandb.ai/authorize), or wandb.mode to 'offline'"
    server = wandb.setup().settings.base_url
    try:
        if not wandb.login(prompt=False, verify=False):
            if cfg.mode == "online":
                raise TrackingError("wandb.mode is 'online', but no W&B key is set", advice)
            return False
        if not _reachable(server):
            warn(
                f"the W&B server {server} cannot be reached; the run is recorded offline (wandb sync uploads it later)"
            )
            return False
        wandb.teardown()  # a session that has its credentials would return them unverified
        wandb.login(prompt=False, verify=True)
    except AuthenticationError as error:
        if "Failed to execute API request" in str(error):  # the server is there but does not answer
            warn(f"the W&B server {server} does not answer; the run is recorded offline (wandb sync uploads it later)")
            return False
        raise TrackingError(f"W&B refused the key: {error}", advice) from None
    return True


def _reachable(url: str, timeout_s: float = 3.0) -> bool:
    parsed = urlparse(url)
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    try:
        with socket.create_connection((parsed.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


class Sinks:
    """All sinks of a run. A sink that fails is left out from then on and named once; the run goes on.

    Args:
        sinks: The sinks.
        warn: Told of a sink that failed.
        started: `time.monotonic()` at the start of the run.
    """

    def __init__(self, sinks: Sequence[Sink], warn: Any, started: float) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._started = started

    def add(self, make: Callable[[], Sink]) -> None:
        """Add a sink that may fail to start."""
        try:
            self._sinks.append(make())
        except Exception as error:  # a sink is not worth a run
            self._warn(f"a sink could not start and is left out: {error}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to every sink."""
        wall_s = time.monotonic() - self._started
        for sink in list(self._sinks):
            try:
                sink.log(step, wall_s, values)
            except Exception as error:  # a sink is not worth a run
                self._sinks.remove(sink)
                self._warn(f"{type(sink).__name__} failed and is left out from now on: {error}")

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # as above
                self._warn(f"{type(sink).__name__} did not close: {error}")
