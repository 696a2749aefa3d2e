"""The record of a run: what is opened, what it goes on with after a resume, and where it is."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from align.metrics import Metric
from cluster.record.sinks.console import Console
from cluster.run.recording import Recording
from tests.fakes.run_files import config

QUIET = {"wandb": {"mode": "disabled"}}


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, so no gauges for Prometheus."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def opened(path: Path, **sections: dict[str, Any]) -> tuple[Recording, io.StringIO]:
    output = io.StringIO()
    console = Console(9, RichConsole(file=output, width=200))
    return Recording(config(**QUIET, **sections), path, console, time.monotonic(), online=False), output


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_on_disk_and_on_the_console_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        recording, output = opened(tmp_path)
        recording.log(1, [Metric("time/step_s", 1.0), Metric("policy/entropy", 2.5)])
        assert [(row["step"], row["policy/entropy"]) for row in rows(tmp_path)] == [(1, 2.5)]
        assert "1/9" in output.getvalue() and "2.500" in output.getvalue()
        recording.alerts.close()

    asyncio.run(scenario())


def test_a_collapse_is_told_of_on_the_console_and_in_the_events(tmp_path: Path) -> None:
    async def scenario() -> None:
        recording, output = opened(tmp_path, alerts={"window": 1})
        for step in (1, 2):
            recording.log(step, [Metric("time/step_s", 1.0), Metric("policy/entropy", 2.0 / step**8)])
        (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
        assert (event["cause"], event["step"]) == ("entropy", 2)
        assert "warning: collapse: entropy of the policy" in output.getvalue()
        recording.alerts.close()

    asyncio.run(scenario())


def test_a_process_that_resumes_counts_the_time_before_it_and_measures_against_the_start_of_the_run(
    tmp_path: Path,
) -> None:
    earlier = [{"step": 1, "wall_s": 3.0}, {"step": 2, "wall_s": 7.5}, {"step": 3, "wall_s": 2.0}]
    lines = [json.dumps(row | {"time/step_s": 1.0, "policy/entropy": 2.0}) for row in earlier]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    async def scenario() -> None:
        recording, output = opened(tmp_path, alerts={"window": 1})
        assert recording.earlier_s == 9.5
        recording.log(4, [Metric("time/step_s", 1.0), Metric("policy/entropy", 0.01)])
        assert "entropy of the policy: 2 at the start" in output.getvalue()
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
        recording.alerts.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("trace", [True, False])
def test_a_trace_is_written_where_one_is_asked_for(trace: bool, tmp_path: Path) -> None:
    recording, _ = opened(tmp_path, run={"trace": trace})
    recording.close()
    assert (tmp_path / "trace.json").is_file() == trace


def test_nothing_is_recorded_in_wandb_where_that_is_switched_off(tmp_path: Path) -> None:
    recording, output = opened(tmp_path)
    recording.close()
    assert recording.in_wandb() == "not recorded (wandb.mode is 'disabled')"
    assert "W&B" not in output.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}
