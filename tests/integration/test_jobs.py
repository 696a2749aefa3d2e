"""Runs as jobs of a real Ray head: submitted, followed, stopped, resumed, and refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness.commands import DEMO, align, last_step, summary, trajectories, wait_until
from tests.harness.head import Head, ray_head

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


def ray_job(head: Head, *arguments: str | Path) -> str:
    """Ray's own command for jobs, as somebody else on the cluster uses it; what it says."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["ray", "job", arguments[0], "--address", head.address, *arguments[1:]]
    environment = os.environ | head.environment | path
    for _ in range(10):  # a cluster that has just started has no agent for a while
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if "No available agent" not in done.stderr + done.stdout:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def at(head: Head, *arguments: str | Path) -> tuple[int, str]:
    """An `align` command for this cluster."""
    return align(*arguments, "--address", head.address, environment=head.environment)


def driver_log(head: Head, job: str) -> str:
    """What the job has printed."""
    return "".join(path.read_text() for path in head.folder.glob(f"session_*/logs/job-driver-{job}*"))


def ended(head: Head, job: str) -> bool:
    """Whether the job says that its run has failed."""
    return "error [" in driver_log(head, job)


def test_a_job_is_submitted_followed_stopped_and_resumed(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = ["submit", DEMO, *SMALL, "--set", f"run.dir={folder}", "--set"]

    code, console = at(head, *job, "run.steps=1000", "--id", "first")
    assert code == 0, console
    assert f"align jobs logs first --follow --address {head.address}" in console
    wait_until(lambda: last_step(folder) >= 2 or ended(head, "first"), "step 2")
    assert not ended(head, "first"), driver_log(head, "first")
    code, console = at(head, "jobs", "stop", "first")
    assert (code, console.split()) == (0, ["first", "STOPPED"]), console
    assert summary(folder)["status"] == "stopped"
    stopped_at = summary(folder)["steps"]
    code, console = at(head, "jobs", "logs", "first", "--follow")
    assert code == 130
    assert "stopping: the step in progress ends, a checkpoint is saved" in console
    assert "Traceback" not in console
    assert "Traceback" not in driver_log(head, "first")

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
    code, console = at(head, "status", "second")
    assert code == 0 and "finished" in console, console
    written = [path for root in (head.folder, tmp_path) for path in root.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert [p for p in psutil.process_iter(["cmdline"]) if SECRET in " ".join(p.info["cmdline"] or [])] == []


def test_a_run_that_can_never_fit_is_refused_within_seconds_and_before_the_upload(head: Head, tmp_path: Path) -> None:
    began = time.monotonic()
    job = ["submit", DEMO, "--set", f"run.dir={tmp_path / 'run'}", "--set", "rollout.num_actors=50"]
    code, console = at(head, *job, "--id", "large")
    assert code == 3
    assert "no room for 49 of rollout (1 CPUs); the only machine of the cluster at" in console
    assert "would fit: --set rollout.num_actors=1, or 25 more machines with 2 CPUs" in console
    assert time.monotonic() - began < 30, "10 s where nobody else computes"
    assert "no job 'large'" in at(head, "jobs", "logs", "large")[1]


def test_the_exit_code_of_the_run_is_that_of_the_command(head: Head) -> None:
    """Storage that cannot be written to is found by the run itself, before any actor starts."""
    code, console = at(head, "submit", DEMO, "--set", "run.dir=/etc/hostname/a", "--follow")
    assert code == 2
    assert "[RUN_FOLDER] run folder /etc/hostname/a cannot be used" in console
    assert "starting     Ray" not in console


@pytest.mark.long
def test_a_busy_cluster_is_named_and_a_job_whose_driver_has_no_place_can_be_stopped(head: Head, tmp_path: Path) -> None:
    """Somebody else's actor holds a CPU; then the driver asks for both."""
    hold = "import ray, time; ray.init(); a = ray.remote(num_cpus=1)(type('Hold', (), {})).remote(); time.sleep(600)"
    ray_job(head, "submit", "--submission-id", "somebody", "--no-wait", "--", "python", "-c", hold)
    run = ["submit", DEMO, *SMALL, "--set", f"run.dir={tmp_path / 'run'}", "--set"]
    try:
        wait_until(lambda: "RUNNING" in ray_job(head, "status", "somebody"), "the start of somebody's job")
        time.sleep(3)
        code, console = at(head, *run, "deadlines.room_s=3", "--follow", "--id", "waits")
        assert code == 3, console
        assert "the cluster is busy" in console
        assert "for 1 x learner (1 CPUs), 1 x rollout (1 CPUs); free: 1 of 2 CPUs on 1 machine(s); held by" in console
        assert "somebody (1 CPUs)" in console
        cpus = ("learner.num_cpus=0", "--set", "rollout.num_cpus=0")
        code, console = at(head, *run, *cpus, "--driver-resources", "CPU=2", "--id", "pending")
        assert code == 0, console
        code, console = at(head, "jobs", "stop", "pending")
        assert (code, console.split()[0]) == (0, "pending"), console
        state = ray_job(head, "status", "pending")
        assert "was stopped" in state or "failed" in state, state
    finally:
        ray_job(head, "stop", "somebody", "--no-wait")


@pytest.mark.long
def test_rays_own_command_submits_a_run_too(head: Head, tmp_path: Path) -> None:
    """As deploy/README.md writes it: the models are where the cluster has them, the run file comes with the folder."""
    models = Path("models/tiny").resolve()
    paths = {
        "run.dir": tmp_path / "run",
        "policy.model": models / "policy",
        "reference.model": models / "reference",
        "prompts.files": f'["{models}/prompts/train.jsonl"]',
        "evaluation.heldout": f'{{files = ["{models}/prompts/heldout.jsonl"]}}',
    }
    settings = [part for key, value in paths.items() for part in ("--set", f"{key}={value}")]
    (tmp_path / "work").mkdir()
    shutil.copy(DEMO, tmp_path / "work" / "demo.toml")
    console = ray_job(
        head,
        *("submit", "--working-dir", tmp_path / "work"),
        *("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}'),
        *("--", "align", "train", "demo.toml", *SMALL, "--set", "run.steps=2", *settings),
    )
    assert "finished after 2 steps" in console
    assert summary(tmp_path / "run")["status"] == "finished"


def test_an_image_without_a_package_is_recognised_by_the_end_of_the_log(head: Head) -> None:
    ray_job(head, "submit", "--submission-id", "poor", "--no-wait", "--", "python", "-c", "import no_such_engine")
    code, console = at(head, "jobs", "logs", "poor", "--follow")
    assert code == 1
    assert "-> the image has no package no_such_engine" in console


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
    port = head.gcs_address.split(":")[1]
    code, console = align("jobs", "list", "--address", f"http://127.0.0.1:{port}", environment=head.environment)
    assert (code, "no Ray cluster answers at" in console) == (3, True), console
    code, console = align("jobs", "list", "--address", "http://127.0.0.1:1", environment=head.environment)
    assert (code, "no Ray cluster answers at http://127.0.0.1:1" in console) == (3, True), console
