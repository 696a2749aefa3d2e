"""The ways to start a cluster without Kubernetes: Ray's launcher for two clouds, Slurm, bare machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.harness.commands import wait_until
from tests.places import DEPLOY

CLOUDS = sorted((DEPLOY / "ray").glob("*.yaml"))
CLOUD = pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


# --- Ray's cluster launcher ----------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def test_there_are_files_for_two_clouds() -> None:
    assert [read(path)["provider"]["type"] for path in CLOUDS] == ["aws", "gcp"]


@CLOUD
def test_ray_accepts_it(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(path)))
    wrong = read(path) | {"max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(wrong))


@CLOUD
def test_the_provider_has_no_key_that_ray_would_pass_over(path: Path) -> None:
    known = {"type", "region", "availability_zone", "cache_stopped_nodes", "project_id", "use_internal_ips"}
    assert set(read(path)["provider"]) <= known


@CLOUD
def test_the_node_types_fit_each_other_and_the_commands_that_start_ray(path: Path) -> None:
    content = read(path)
    types = content["available_node_types"]
    head = types[content["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    workers = [kind for name, kind in types.items() if name != content["head_node_type"]]
    assert all(kind["resources"]["GPU"] == 8 and kind["resources"]["driver"] == 1 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) == content["max_workers"]
    start, join = content["head_start_ray_commands"][-1], content["worker_start_ray_commands"][-1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start and "--address=$RAY_HEAD_IP:6379" in join


@CLOUD
def test_it_is_closed(path: Path) -> None:
    content = read(path)
    for commands in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
        assert "--ray-client-server-port" not in commands[-1]
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert content["provider"]["use_internal_ips"] is True
    assert "~/.ray/auth_token" in content["file_mounts"]
    assert not re.search(r"(KEY|TOKEN|PASSWORD)=\S*[0-9a-f]{8}", path.read_text())


# --- bare machines -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a token, and a `ray` that says how it was started."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "ray", 'echo "$@"', 'env | grep -E "^RAY_" | sort')
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("canary-token\n")
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    return tmp_path


def node(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home)} | environment
    return subprocess.run(
        [DEPLOY / "bare" / "node.sh", *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def test_a_head_listens_for_its_machines_and_shows_its_dashboard_to_nobody(home: Path) -> None:
    command, *environment = node(home, "head", "10.0.0.1").stdout.splitlines()
    assert command == (
        "start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1 --metrics-export-port=8080 "
        "--resources={} --block"
    )
    assert "RAY_AUTH_MODE=token" in environment and f"RAY_AUTH_TOKEN_PATH={home}/.ray/auth_token" in environment


def test_the_others_join_it_and_may_say_what_they_have(home: Path) -> None:
    done = node(home, "join", "10.0.0.1", ALIGN_RESOURCES='{"driver": 1}')
    assert done.stdout.splitlines()[0] == (
        'start --address=10.0.0.1:6379 --metrics-export-port=8080 --resources={"driver": 1} --block'
    )
    assert json.loads(done.stdout.splitlines()[0].split("--resources=")[1].removesuffix(" --block")) == {"driver": 1}
    assert "canary-token" not in done.stdout + done.stderr


def test_without_a_token_that_is_its_owners_alone_nothing_is_started(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.chmod(0o644)
    open_to_all = node(home, "head", "10.0.0.1")
    token.unlink()
    missing = node(home, "head", "10.0.0.1")
    assert (open_to_all.returncode, missing.returncode) == (1, 1)
    assert "chmod 600" in open_to_all.stderr and "no token in" in missing.stderr
    assert open_to_all.stdout == missing.stdout == ""


def test_a_role_that_there_is_not_is_named(home: Path) -> None:
    done = node(home, "worker", "10.0.0.1")
    assert done.returncode == 2 and "head or join, not worker" in done.stderr


# --- Slurm ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(home: Path) -> Path:
    """Slurm's and Ray's commands, as far as the batch file uses them; Ray ends with 0 whatever the run did."""
    script(home / "bin" / "srun", "while [[ $1 == --* ]]; do shift; done", 'exec "$@"')
    script(home / "bin" / "scontrol", f'echo "$@" >> {home}/scontrol')
    script(home / "bin" / "ray", f'echo "$@" > {home}/ray', 'while [ "$1" != -- ]; do shift; done', "shift", '"$@"')
    return home


def start(slurm: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {
        "PATH": f"{slurm}/bin:/usr/bin:/bin",
        "HOME": str(slurm),
        "TMPDIR": str(slurm),
        "ALIGN_PYTHON": str(slurm),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(slurm),
    }
    command = ["bash", str(DEPLOY / "slurm" / "run.sbatch"), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_code_of_the_run_is_that_of_the_job_though_ray_loses_it(slurm: Path) -> None:
    script(slurm / "bin" / "align", f'echo "$RAY_ADDRESS $*" > {slurm}/align', "exit 6")
    assert start(slurm, "run.toml", "--set", "run.dir=/shared/a b").wait(timeout=60) == 6
    address, *words = (slurm / "align").read_text().split(" ", 1)
    assert re.fullmatch(r"[\d.]+:6379", address) and words == ["train run.toml --set run.dir=/shared/a b\n"]
    assert (slurm / "ray").read_text().startswith(f"symmetric-run --address {address} --min-nodes 2 ")
    assert not (slurm / "scontrol").exists()


def test_a_ray_that_could_not_be_started_fails_the_job(slurm: Path) -> None:
    script(slurm / "bin" / "ray", "exit 0")
    assert start(slurm, "run.toml").wait(timeout=60) == 1


def test_when_the_time_is_almost_up_the_run_saves_and_the_job_is_queued_again(slurm: Path) -> None:
    ends = f"trap 'touch {slurm}/saved; exit 130' TERM"
    script(slurm / "bin" / "align", ends, f"touch {slurm}/running", "while :; do sleep 0.05; done")
    job = start(slurm, "run.toml")
    wait_until((slurm / "running").exists, "the run's start", timeout_s=60)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == 130
    assert (slurm / "saved").exists() and (slurm / "scontrol").read_text() == "requeue 17\n"
    assert [path for path in slurm.iterdir() if path.name.startswith("tmp.")] == []  # the notes are gone


def test_without_a_token_no_machine_is_taken(slurm: Path) -> None:
    (slurm / ".ray" / "auth_token").unlink()
    job = start(slurm, "run.toml")
    assert job.wait(timeout=60) == 2 and not (slurm / "ray").exists()


def test_the_whole_machines_are_the_jobs_since_ray_ends_every_ray_on_them() -> None:
    text = (DEPLOY / "slurm" / "run.sbatch").read_text()
    options = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"exclusive", "ntasks-per-node=1", "requeue", "signal=B:TERM@300"} <= options
