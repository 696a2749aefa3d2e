"""`align status`: where a run stands, on one screen, from its folder alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.faults import ConfigError
from cluster.loop.goodput import shares
from cluster.record.figures import ROLES, time_shares
from cluster.record.history import read_rows

_SHOWN = (
    *("reward/trajectory_mean", "kl/behavior_reference", "policy/entropy", "optimizer/grad_norm", "staleness/max"),
    *("mismatch/abs_mean", "throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s", "memory/rss_bytes"),
)
_RECENT = 10  # steps that means are taken over
_LEAST_VALUE = 24  # columns of the console for values beside their names


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands; rich prints all of it, on a console of any width.

    Attributes:
        run: Its name and its folder.
        lines: (name, value), what matters most first.
    """

    run: str
    lines: Sequence[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich's protocol for what it prints."""
        yield _table(self.lines, options.max_width, self.run)


@dataclass(frozen=True, slots=True)
class InWindow:
    """As much of a status as a window has lines for: from the state on, and how many lines are missing."""

    status: Status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """See rich's protocol for what it prints."""
        for view in self._ever_shorter(options.max_width):
            if len(console.render_lines(view, options, pad=False)) <= options.size.height:
                break
        yield view

    def _ever_shorter(self, width: int) -> Iterator[RenderableType]:
        yield self.status
        state, *others = self.status.lines
        lines = [state, ("run", self.status.run), *others]
        for num in range(len(lines) - 1, 0, -1):
            yield _table([*lines[:num], ("more", f"{len(lines) - num} in a taller window, or without --live")], width)


def _table(lines: Sequence[tuple[str, str]], width: int, title: str = "") -> Table:
    """Values beside their names where these leave room for them, else behind them."""
    table = Table(title=Text(title, "table.title") if title else None, show_header=False, box=None)
    beside = max(len(name) for name, _ in lines) + _LEAST_VALUE <= width
    if beside:
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(*([Text(name), Text(value)] if beside else [Text(f"{name}: {value}")]))
    return table


def status(run: Path) -> Status:
    """State, progress and the means of the last steps.

    Raises:
        ConfigError: If the folder holds no run.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} holds no run", "name a run folder, e.g. runs/demo-…")
    cfg = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    steps = [row for row in rows if "time/step_s" in row][-_RECENT:]
    lines = [
        ("state", state(run)),
        *_progress(rows, cfg["run"]["steps"]),
        *_means(steps),
        *_shares(steps),
        *_newest_evaluation(rows),
    ]
    return Status(f"{cfg['run']['name']} in {run}", lines)


def show(run: Path, live: bool, console: Console | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Print the status; live, anew every two seconds until Ctrl-C.

    Args:
        run: The run folder.
        live: Whether to go on.
        console: Rich's console; left out: the terminal.
        sleep: Waits for so many seconds.

    Raises:
        ConfigError: If the folder holds no run.
    """
    console = console or Console()
    if live:
        screen = Live(InWindow(status(run)), console=console, transient=True, vertical_overflow="visible")
        with contextlib.suppress(KeyboardInterrupt), screen:
            while True:
                sleep(2)
                screen.update(InWindow(status(run)))
    console.print(status(run))


def state(run: Path) -> str:
    """Whether the run of a folder is running, how it ended, or that it ended without a word."""
    if _is_locked(run / ".lock"):
        return "running"
    if not (run / "summary.json").is_file():
        return "ended without a word: killed, or its machine was lost; the same command resumes it"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return str(summary["status"]) + (f": {summary['error']}" if "error" in summary else "")


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine (or of one that shares the storage and its locks) holds the run."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _means(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found = {name: [row[name] for row in steps if name in row] for name in _SHOWN}
    return [
        (name, f"{sum(values) / len(values):.4g} (mean of {len(values)} steps)")
        for name, values in found.items()
        if values
    ]


def _shares(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found = {"sampled tokens": shares(steps[-1] if steps else {}), "idle": _idle(steps)}
    return [
        (name, ", ".join(f"{key} {share:.1%}" for key, share in of.items() if share))
        for name, of in found.items()
        if of
    ]


def _newest_evaluation(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    for row in reversed(rows):
        if evaluated := {name: value for name, value in row.items() if name.startswith("eval/")}:
            return [(f"evaluation at {row['step']}", ", ".join(f"{k[5:]} {v:.4g}" for k, v in evaluated.items()))]
    return []


def _idle(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = time_shares(steps)
    return {role: found[f"idle_{role}"] for role in ROLES} if found else {}


def _progress(rows: Sequence[Mapping[str, Any]], num_steps: int) -> list[tuple[str, str]]:
    steps = [row for row in rows if "time/step_s" in row]
    if not steps:
        return [("step", f"0 of {num_steps}")]
    last, recent = steps[-1]["step"], [row["time/step_s"] for row in steps[-_RECENT:]]
    each = sum(recent) / len(recent)
    phases = {
        name: sum(row.get(f"time/{name}_s", 0.0) for row in steps[-_RECENT:]) / sum(recent)
        for name in ("rollout_wait", "update", "publish")
    }
    return [
        ("step", f"{last} of {num_steps}; {each:.1f} s each, {each * (num_steps - last):.0f} s left"),
        ("time of a step", ", ".join(f"{name} {share:.0%}" for name, share in phases.items())),
    ]
