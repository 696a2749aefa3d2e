"""The end of a run: its summary and its last words, for each way to end."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from align.metrics import Metric
from cluster.record.sinks.console import Console
from cluster.run.ending import EndStatus, how_to_look, write_end
from cluster.run.recording import Recording
from tests.fakes.run_files import config


def ended(path: Path, status: EndStatus, error: Exception | None = None) -> tuple[dict[str, Any], str]:
    """The summary and the console of a run of two steps; of one in a process before it there are 5 s."""
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text('{"step": 1, "wall_s": 5.0, "time/step_s": 1.0}\n')
    (path / "environment.json").write_text('{"ray_session": "/tmp/session"}')
    cfg, output = config(run={"name": "mine", "seed": 3}, wandb={"mode": "disabled"}), io.StringIO()
    (path / "config.toml").write_text('[run]\nname = "mine"\n')
    console = Console(2, RichConsole(file=output, width=400, soft_wrap=True))
    recording = Recording(cfg, path, console, time.monotonic(), online=False)
    recording.log(2, [Metric("policy/entropy", 1.0)])
    console.warn("something")
    write_end(cfg, recording, console, status, error)
    return json.loads((path / "summary.json").read_text()), output.getvalue()


def test_the_summary_says_which_run_it_was_how_it_ended_and_how_long_all_its_processes_took(tmp_path: Path) -> None:
    summary, console = ended(tmp_path / "run", "finished")
    assert {key: summary[key] for key in ("name", "seed", "status", "steps", "warnings")} == {
        "name": "mine",
        "seed": 3,
        "status": "finished",
        "steps": 2,
        "warnings": ["something"],
    }
    assert 5.0 <= summary["wall_s"] < 60
    assert "error" not in summary
    assert "\n\nfinished after 2 steps and 5 s. " in console
    assert (tmp_path / "run/report.html").is_file()


def test_the_summary_of_a_failure_names_its_error(tmp_path: Path) -> None:
    summary, console = ended(tmp_path / "one", "failed", ValueError("no such thing"))
    assert (summary["status"], summary["error"]) == ("failed", "no such thing")
    assert "  logs          /tmp/session/logs (every process of the run)" in console
    summary, _ = ended(tmp_path / "two", "failed", TimeoutError())
    assert summary["error"] == "TimeoutError", "one without a text"


STATUSES: dict[EndStatus, tuple[set[str], set[str]]] = {  # what is shown, what is not
    "finished": ({"policy"}, {"resume", "logs"}),
    "stopped": ({"resume"}, {"policy", "logs"}),
    "failed": ({"resume", "logs"}, {"policy"}),
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_last_words_show_what_there_is_and_how_to_go_on(status: EndStatus, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"ray_session": "/tmp/session"}')
    shown, absent = STATUSES[status]
    lines = how_to_look(tmp_path, tmp_path / "report.html", status, "nowhere").splitlines()
    names = {line.split()[0] for line in lines}
    assert {"report", "figures", "trajectories", "checkpoints", "W&B"} | shown == names
    assert not absent & names
    assert "  W&B           nowhere" in lines


def test_a_trace_and_an_adapter_are_shown_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "trace.json").touch()
    (tmp_path / "policy_adapter").mkdir()
    words = how_to_look(tmp_path, tmp_path / "report.html", "finished", "nowhere")
    assert f"  trace         {tmp_path}/trace.json (open it in ui.perfetto.dev)" in words
    assert f"  adapter       {tmp_path}/policy_adapter (a PEFT folder, for the policy that the run began with)" in words
