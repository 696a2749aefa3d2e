"""The frame of a run, in a process of its own without Ray: what is left and told when it fails or is stopped early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.run_files import write
from tests.harness.wandb_files import API_KEY, run_python, wandb_records

HF_TOKEN = "hf_canary_0123456789"
FRAME = """
import asyncio, os, sys, time
from pathlib import Path
from align.metrics import Metric
from cluster.spec.config import load_config, resolved
from cluster.faults import ActorLost
from cluster.record.folder import RunFolder
from cluster.spec.inputs import Inputs
from cluster.record.sinks.console import Console
from cluster.run.run import Training

class Failing(Training):
    async def _train(self):
        self.alerts.begin()
        for step in (1, 2):
            values = {"time/step_s": 1.0, "policy/entropy": 2.0 / step**8, "tokens/trained": 5.0}
            self.sinks.log(step, values)
        raise ActorLost("learner", 0, "update", "refused " + os.environ["HF_TOKEN"])

cfg = load_config(Path("run.toml"), ["alerts.window=1", "wandb.mode=offline"])
folder = RunFolder(Path("run").absolute(), resolved(cfg))
folder.write_environment({"ray_session": "/nowhere"})
run = Failing(cfg, Inputs([], [], 0, 16, 1), folder, Console(2), None, time.monotonic(), False)
try:
    asyncio.run(run.run())
except ActorLost as error:
    print("code", error.exit_code)
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("frame")
    write(folder / "run.toml")
    done = run_python(FRAME, folder, WANDB_API_KEY=API_KEY, HF_TOKEN=HF_TOKEN)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_failure_and_a_collapse_before_it_are_events_on_disk_and_alerts_of_the_record(
    failed: tuple[Path, str],
) -> None:
    collapse, failure = events(failed[0])
    assert (collapse["event"], collapse["cause"], collapse["level"], collapse["step"]) == (
        "alert",
        "entropy",
        "warn",
        2,
    )
    assert (failure["cause"], failure["level"], failure["title"]) == ("failure", "error", "failed: ACTOR_LOST")
    assert "refused [HF_TOKEN]" in failure["text"]
    (record,) = failed[0].glob("wandb/offline-run-*/*.wandb")
    alerts = [r.alert.text for r in wandb_records(record) if r.WhichOneof("record_type") == "alert"]
    assert alerts == [collapse["text"], failure["text"]]


def test_the_console_shows_the_place_of_the_record_the_warning_and_the_end(failed: tuple[Path, str]) -> None:
    run_dir, console = failed
    assert f"W&B          recorded in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/" in console
    assert "warning: collapse: entropy of the policy: 2 at the start" in console
    assert "failed after 2 steps" in console
    assert console.endswith("code 4\n")


def test_no_file_of_the_run_holds_a_secret_of_the_environment(failed: tuple[Path, str]) -> None:
    run_dir, console = failed
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"events.jsonl", "summary.json", "report.html", "upload.log"} - {path.name for path in files} == {
        "upload.log"
    }
    for secret in (API_KEY, HF_TOKEN):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in console
