"""Runs as jobs of a real Ray head: submitted, followed, stopped, resumed, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.head import Head, ray_head
from tests.integration.runs import DEMO, align, last_step, summary, trajectories, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_task")]

SECRET = "a5c1" * 10
"""A W&B key and a token of the model hub in the environment of the cluster's machines."""
SMALL = [
    *("--set", "run.prompts_per_step=8", "--set", "evaluation.every=1000", "--set", "evaluation.max_prompts=8"),
    *("--set", "optimizer.schedule=constant"),
]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head({"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "WANDB_MODE": "offline"}) as started:
        yield started


def at(head: Head, *arguments: str | Path) -> tuple[int, str]:
    """An `align` command for this cluster."""
    return align(*arguments, "--address", head.address, environment=head.environment)


def test_a_job_is_submitted_followed_stopped_and_resumed(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = ["submit", DEMO, *SMALL, "--set", f"run.dir={folder}", "--set"]

    code, console = at(head, *job, "run.steps=1000", "--id", "first")
    assert code == 0, console
    assert f"align jobs logs first --follow --address {head.address}" in console
    wait_until(lambda: last_step(folder) >= 2, "step 2")
    code, console = at(head, "jobs", "stop", "first")
    assert (code, console.split()) == (0, ["first", "STOPPED"]), console
    assert summary(folder)["status"] == "stopped"
    stopped_at = summary(folder)["steps"]
    code, console = at(head, "jobs", "logs", "first", "--follow")
    assert code == 130
    assert "stopping: the step in progress ends, a checkpoint is saved" in console
    assert "Traceback" not in console
    assert "Traceback" not in "".join(p.read_text() for p in head.folder.glob("session_*/logs/job-driver-first*"))

    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("steps = 1000", f"steps = {stopped_at + 2}"))
    code, console = at(head, *job, f"run.steps={stopped_at + 2}", "--id", "second", "--follow")
    assert code == 0, console
    assert f"resuming     after step {stopped_at}" in console
    assert console.count("ready after") == 1, "a line was printed twice"
    assert sorted(trajectories(folder)) == list(range(1, stopped_at + 3))
    tickets = [row["ticket"] for rows in trajectories(folder).values() for row in rows if row["repeat"] == 0]
    assert len(tickets) == len(set(tickets)) == 8 * (stopped_at + 2)

    code, console = at(head, "jobs", "list")
    assert [line.split()[:2] for line in console.splitlines()] == [["first", "STOPPED"], ["second", "SUCCEEDED"]]
    written = [path for root in (head.folder, tmp_path) for path in root.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert [p for p in psutil.process_iter(["cmdline"]) if SECRET in " ".join(p.info["cmdline"] or [])] == []


def test_the_exit_code_of_the_run_is_that_of_the_command(head: Head, tmp_path: Path) -> None:
    job = ["submit", DEMO, "--set", f"run.dir={tmp_path / 'run'}", "--set", "rollout.num_actors=50"]
    code, console = at(head, *job, "--follow")
    assert code == 3
    assert "the run needs 51 CPUs, the cluster at" in console


def test_bad_requests_are_refused_with_the_remedy(head: Head, tmp_path: Path) -> None:
    code, console = align("jobs", "list", "--address", head.address)
    assert (code, "set RAY_AUTH_MODE=token" in console) == (3, True), console
    wrong = head.environment | {"RAY_AUTH_TOKEN": "f" * 64}
    code, console = align("jobs", "list", "--address", head.address, environment=wrong)
    assert (code, "does not accept this token" in console) == (3, True), console
    code, console = at(head, "jobs", "logs", "unknown")
    assert (code, "no job 'unknown'" in console) == (2, True), console
    code, console = at(head, "submit", DEMO)
    assert (code, "run.dir is 'left out'" in console) == (2, True), console
    code, console = align("jobs", "list", "--address", "http://127.0.0.1:1", environment=head.environment)
    assert (code, "no Ray cluster answers at http://127.0.0.1:1" in console) == (3, True), console
