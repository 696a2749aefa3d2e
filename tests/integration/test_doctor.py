"""`align doctor` on a cluster of three real raylets, one of which is not like the others; and with engine and learner."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.commands import DEMO, align
from tests.places import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.usefixtures("tiny_task")]


@dataclass(frozen=True)
class Raylets:
    """A cluster that runs: where, and what a client sets to be let in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    """Three nodes. The third one has another transformers, and is told of an interface that it does not have."""
    fake = tmp_path_factory.mktemp("packages")
    (fake / "transformers-5.6.0.dist-info").mkdir()
    (fake / "transformers-5.6.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.6.0\n")
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short path: sockets lie in it
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    closed = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RAY"))}
    third = [f"PYTHONPATH={fake}:{REPOSITORY}", "GLOO_SOCKET_IFNAME=nowhere0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.raylets", folder, *third],
        cwd=REPOSITORY,
        env=inherited | closed | client | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield Raylets(address, closed | client)
    finally:
        process.stdin.close()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_each_node_is_looked_at_and_the_one_that_differs_is_named(raylets: Raylets, tmp_path: Path) -> None:
    command = [
        "doctor",
        DEMO,
        "--quick",
        "--address",
        raylets.address,
        "--set",
        f"run.dir={tmp_path / 'run'}",
        "--json",
    ]
    code, console = align(*command, environment=raylets.environment)
    assert code == 3, console
    verdicts: list[dict[str, Any]] = json.loads(console[console.index("[\n") :])
    nodes = {v["node"] for v in verdicts} - {""}
    assert len(nodes) == 3
    items = {node: [v["item"] for v in verdicts if v["node"] == node] for node in nodes}
    always = {"python", "ray", "vllm", "shared memory", "clock", "way", "model folders", "run folder", "interface"}
    assert all(always <= set(found) for found in items.values())
    failed = [v for v in verdicts if v["state"] == "fail"]
    assert len({v["node"] for v in failed}) == 1, failed
    by_item = {v["item"]: v for v in failed}
    assert set(by_item) == {"interface", "transformers"}, failed
    assert by_item["interface"]["found"].startswith("GLOO_SOCKET_IFNAME=nowhere0 names no interface that is up")
    assert by_item["transformers"]["found"].startswith("5.6.0, where the run is driven: 5.")
    assert by_item["transformers"]["fix"].startswith("on this node: pip install 'transformers==5.")
    assert list(tmp_path.rglob("*")) == [], "the mark is gone"


def test_a_run_does_not_start_on_a_cluster_with_a_node_that_fails(raylets: Raylets, tmp_path: Path) -> None:
    environment = raylets.environment | {"RAY_ADDRESS": raylets.address}
    code, console = align("train", DEMO, "--set", f"run.dir={tmp_path / 'run'}", environment=environment)
    assert code == 3, console
    assert "transformers: 5.6.0, where the run is driven" in console
    assert "GLOO_SOCKET_IFNAME=nowhere0" in console
    assert "ready after" not in console
    assert "Traceback" not in console


def test_engine_scorer_and_learner_are_tried_one_after_another(tmp_path: Path) -> None:
    code, console = align("doctor", DEMO, "--set", f"run.dir={tmp_path / 'run'}")
    assert code == 0, console
    assert "starting     engine, scorer and learner, one after another" in console
    lines = {line[5:20].strip(): line for line in console.splitlines()}
    assert lines["agreement"].startswith("ok ")
    assert "in float32; a run warns above 0.0001 and stops above 0.001" in lines["agreement"]
    assert lines["judgement"].startswith("ok ")
    assert "16 answers get -" in lines["judgement"]
    assert not (tmp_path / "run").exists()
