"""The address of a run in W&B, and the id that it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.record.sinks.wandb.identity import claim_run_id, known_run_id, whereabouts
from cluster.record.sinks.wandb.settings import WandbConfig


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_ENTITY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cluster.record.sinks.wandb.identity.site_url", lambda: "https://wandb.example.org")


def write_checkpoint(run_dir: Path, step: int, identity: str) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:05d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"state": {"version": step, "wandb_id": identity}}))


def test_a_run_keeps_its_id_and_two_runs_have_two(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    assert known_run_id(one) is None
    first = claim_run_id(one)
    assert [claim_run_id(one), known_run_id(one)] == [first, first]
    assert claim_run_id(two) != first


def test_a_folder_that_kept_only_its_checkpoints_is_still_the_same_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10, "older")
    write_checkpoint(tmp_path, 20, "newer")
    write_checkpoint(tmp_path, 30, "")
    (tmp_path / "checkpoints" / "step_00030" / "state.json").write_text("{torn")
    assert claim_run_id(tmp_path) == "newer"
    assert (tmp_path / "wandb_id").read_text() == "newer"


def test_a_new_run_takes_the_id_of_its_environment_and_a_known_one_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert claim_run_id(tmp_path) == "chosen"
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert claim_run_id(tmp_path) == "chosen"


def test_the_link_says_as_much_as_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "demo-1"
    known = WandbConfig(project="rl", entity="team")
    assert whereabouts(known, run_dir, online=True) == "https://wandb.example.org/team/rl, run demo-1"
    assert whereabouts(known, run_dir, online=True, run_id="ab12") == "https://wandb.example.org/team/rl/runs/ab12"
    unknown = WandbConfig(project="rl")
    assert whereabouts(unknown, run_dir, online=True).startswith(
        "https://wandb.example.org/home, project rl, run demo-1 (set "
    )
    assert (
        whereabouts(unknown, run_dir, online=True, entity="me", run_id="a") == "https://wandb.example.org/me/rl/runs/a"
    )
    monkeypatch.setenv("WANDB_ENTITY", "ours")
    run_dir.mkdir()
    identity = claim_run_id(run_dir)
    assert whereabouts(unknown, run_dir, online=True) == f"https://wandb.example.org/ours/rl/runs/{identity}"


def test_without_an_upload_the_link_is_the_folder_and_the_command(tmp_path: Path) -> None:
    text = whereabouts(WandbConfig(), tmp_path, online=False)
    assert text == f"recorded in {tmp_path}/wandb; upload it with: wandb sync {tmp_path}/wandb/offline-run-*"
    assert whereabouts(WandbConfig(mode="disabled"), tmp_path, online=True).startswith("not recorded")


def test_the_link_is_made_without_loading_wandb() -> None:
    code = "import sys, cluster.record.sinks.wandb.identity; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


@pytest.mark.integration
def test_the_site_is_that_of_the_server_that_the_environment_names() -> None:
    code = "from cluster.record.sinks.wandb.identity import site_url; print(site_url())"
    environment = os.environ | {"WANDB_BASE_URL": "https://api.example.org", "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "https://app.example.org"
