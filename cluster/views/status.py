"""`align status`: where a run stands, on one screen, from its folder alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.faults import ConfigError
from cluster.loop.goodput import shares
from cluster.record.figures import ROLES, read_rows, time_shares

_SHOWN = (
    *("reward/trajectory_mean", "kl/behavior_reference", "policy/entropy", "optimizer/grad_norm", "staleness/max"),
    *("mismatch/abs_mean", "throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s", "memory/rss_bytes"),
)
_RECENT = 10  # steps that means are taken over


def status(run: Path) -> Table:
    """State, progress and the means of the last steps.

    Raises:
        ConfigError: If the folder holds no run.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} holds no run", "name a run folder, e.g. runs/demo-…")
    cfg = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    table = Table(title=f"{cfg['run']['name']} in {run}: {state(run)}", show_header=False, box=None)
    for name, value in _progress(rows, cfg["run"]["steps"]):
        table.add_row(name, value)
    steps = [row for row in rows if "time/step_s" in row][-_RECENT:]
    for name in _SHOWN:
        if values := [row[name] for row in steps if name in row]:
            table.add_row(name, f"{sum(values) / len(values):.4g} (mean of {len(values)} steps)")
    for name, found in (("sampled tokens", shares(steps[-1] if steps else {})), ("idle", _idle(steps))):
        if found:
            table.add_row(name, ", ".join(f"{key} {share:.1%}" for key, share in found.items() if share))
    for row in rows[::-1]:
        if evaluated := {name: value for name, value in row.items() if name.startswith("eval/")}:
            table.add_row(f"evaluation at {row['step']}", ", ".join(f"{k[5:]} {v:.4g}" for k, v in evaluated.items()))
            break
    return table


def show(run: Path, live: bool) -> None:
    """Print the table; live, anew every two seconds until Ctrl-C."""
    if not live:
        Console().print(status(run))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(status(run)) as screen:
        while True:
            time.sleep(2)
            screen.update(status(run))


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
