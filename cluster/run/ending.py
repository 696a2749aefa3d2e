"""The end of a run: its summary, its report, and the last words on the console."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from cluster.record.figures import summarize_run
from cluster.record.files import write_atomically
from cluster.record.history import read_rows
from cluster.record.sinks.console import Console
from cluster.redaction import redact
from cluster.run.recording import Recording
from cluster.spec.config import RunConfig
from cluster.views.report import verdict, write_report

EndStatus = Literal["finished", "stopped", "failed"]
"""How a run ended: after its last step; before it, by an interrupt; by an error."""


def write_end(
    cfg: RunConfig, recording: Recording, console: Console, status: EndStatus, error: Exception | None
) -> None:
    """Close the record, write summary.json and report.html, and say where everything is.

    Blocks, while W&B uploads what is left: for a thread.

    Args:
        cfg: The run.
        recording: Its record.
        console: The console.
        status: How it ended.
        error: What it failed with.
    """
    recording.close()
    path = recording.path
    summary = summarize_run(read_rows(path / "metrics.jsonl"), recording.samples.content)
    summary |= {
        "name": cfg.run.name,
        "seed": cfg.run.seed,
        "status": status,
        "wall_s": round(recording.earlier_s + time.monotonic() - recording.started, 1),
        "warnings": console.warnings,
    }
    if error is not None:
        summary["error"] = redact(str(error)) or type(error).__name__
    write_atomically(path / "summary.json", json.dumps(summary, indent=2))
    report = write_report(path)
    console.say("")
    console.say(f"{status} after {summary['steps']} steps and {summary['wall_s']:.0f} s. {verdict(summary)}")
    console.say(how_to_look(path, report, status, recording.in_wandb()))


def how_to_look(path: Path, report: Path, status: EndStatus, in_wandb: str) -> str:
    """What the run folder holds, a line each, and how to look at it; how to resume a run that did not finish."""
    lines = [
        ("report", f"open {report} in a browser"),
        ("figures", f"cat {path}/summary.json; a line per step in {path}/metrics.jsonl"),
        ("trajectories", f"{path}/trajectories/*.parquet (pandas.read_parquet)"),
        *([("trace", f"{path}/trace.json (open it in ui.perfetto.dev)")] if (path / "trace.json").is_file() else []),
        ("checkpoints", f"{path}/checkpoints/step_*/policy (Hugging Face folders)"),
        ("W&B", in_wandb),
    ]
    if status == "finished":
        lines.append(("policy", f"{path}/policy (a Hugging Face folder for transformers and vLLM)"))
        if (path / "policy_adapter").is_dir():
            lines.append(("adapter", f"{path}/policy_adapter (a PEFT folder, for the policy that the run began with)"))
    else:
        lines.append(("resume", f"align train {path}/config.toml --set run.dir={path}"))
    if status == "failed":
        session = json.loads((path / "environment.json").read_text())["ray_session"]
        lines.append(("logs", f"{session}/logs (every process of the run)"))
    return "\n".join(f"  {name:<13} {text}" for name, text in lines)
