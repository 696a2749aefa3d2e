"""What W&B gets beside the metrics: tables, artifacts, alerts; and no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.record.sinks.wandb.artifacts import sources
from cluster.record.sinks.wandb.tables import TABLE
from tests.fakes.wandb_steps import write_step
from tests.harness.wandb_files import API_KEY, run_python, wandb_records, wandb_rows

pytestmark = pytest.mark.integration

HF_TOKEN = "hf_canary_0123456789"
EVERYTHING = """
import json, os
from pathlib import Path
from cluster.record.alerts import Alert, AlertConfig, Alerts
from cluster.record.sinks.sink import Sinks
from cluster.record.sinks.wandb.tables import TrajectoryTables
from cluster.record.sinks.wandb.artifacts import WandbArtifacts
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
run = Path("run").absolute()
(run / "policy").mkdir()
(run / "policy" / "model.safetensors").write_text("weights")
for name in ("config.toml", "environment.json"):
    (run / name).write_text(name)
warnings = []
sinks = Sinks([], warnings.append, 0.0)
record = sinks.add(lambda: WandbSink(WandbConfig(mode="offline"), run, "my-run", {}, online=False))
kinds = ("environment", "code", "checkpoints", "policy")
sinks.add(lambda: WandbArtifacts(record, run, kinds))
sinks.add(lambda: TrajectoryTables(record, run / "trajectories", 2, 5, 1.0))

class NoTimer:
    def cancel(self): pass

alerts = Alerts(AlertConfig(window=1, entropy_fraction=0.5), sinks.alert, (), lambda delay_s, callback: NoTimer())
sinks.add(lambda: alerts)
for step, entropy in enumerate((4.0, 4.0, 1.0), 1):
    sinks.log(step, {"time/step_s": 1.0, "policy/entropy": entropy})
    folder = run / "checkpoints" / f"step_{step:05d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("state")
    sinks.artifact("checkpoints", folder, step)
sinks.artifact("policy", run / "policy", 3)
alerts.fail(RuntimeError("no access with " + os.environ["HF_TOKEN"]))
sinks.close()
print(json.dumps({"directory": str(record.directory), "warnings": warnings}))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("record")
    (folder / "run").mkdir()
    for step in (1, 2, 3):
        write_step(folder / "run" / "trajectories", step, [1.0, 2.0, 3.0], version=step - 1)
    done = run_python(EVERYTHING, folder, WANDB_API_KEY=API_KEY, HF_TOKEN=HF_TOKEN)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["warnings"] == []
    (record,) = Path(answer["directory"]).glob("*.wandb")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return answer | {"folder": folder, "records": list(wandb_records(record)), "record": record, "files": files}


def test_every_second_step_has_its_table_in_its_own_row(recorded: dict[str, Any]) -> None:
    rows = wandb_rows(recorded["record"])
    with_table = [row["step"] for row in rows if any(name.startswith(TABLE) for name in row)]
    assert (with_table, [row["step"] for row in rows]) == ([2], [1, 2, 3])
    (file,) = [path for path in recorded["files"] if path.name.endswith(".table.json")]
    content = json.loads(file.read_text())
    answers = [row[content["columns"].index("completion")] for row in content["data"]]
    assert answers == ["aa", "bb", "cc"]


def test_alerts_are_in_the_record_with_level_and_text(recorded: dict[str, Any]) -> None:
    alerts = [r.alert for r in recorded["records"] if r.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.level) for alert in alerts] == [
        ("collapse: entropy of the policy", "WARN"),
        ("failed: RuntimeError", "ERROR"),
    ]
    assert "4 at the start, 1 at step 3" in alerts[0].text
    assert alerts[1].text == "RuntimeError: no access with [HF_TOKEN]"


def artifacts(recorded: dict[str, Any], kind: str) -> list[Any]:
    found = [r.artifact for r in recorded["records"] if r.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in found if artifact.name.startswith(f"{kind}-")]


def test_environment_and_code_are_what_the_run_wrote_and_was_made_of(recorded: dict[str, Any]) -> None:
    (environment,) = artifacts(recorded, "environment")
    entries = {entry.path: entry.local_path for entry in environment.manifest.contents}
    assert entries.keys() == {"config.toml", "environment.json"}
    for name, path in entries.items():
        assert Path(path).is_relative_to(recorded["directory"])
        assert Path(path).read_text() == name
    (code,) = artifacts(recorded, "code")
    assert {entry.path for entry in code.manifest.contents} == set(sources())
    assert {"align/learner/learner.py", "cluster/loop/loop.py", "cluster/views/report.html.j2"} <= set(sources())


def test_weights_are_references_to_their_folders_and_no_copies(recorded: dict[str, Any]) -> None:
    checkpoints, run = artifacts(recorded, "checkpoints"), recorded["folder"] / "run"
    found = [(entry.path, entry.ref, entry.local_path) for one in checkpoints for entry in one.manifest.contents]
    folders = [run / "checkpoints" / f"step_{step:05d}" for step in (1, 2, 3)]
    assert found == [(f"{f.name}/state.json", (f / "state.json").as_uri(), "") for f in folders]
    assert [sorted(one.aliases) for one in checkpoints] == [["latest", f"step-{step}"] for step in (1, 2, 3)]
    (policy,) = artifacts(recorded, "policy")
    (entry,) = policy.manifest.contents
    assert (entry.ref, entry.local_path) == ((run / "policy" / "model.safetensors").as_uri(), "")


def test_all_that_a_later_upload_needs_lies_in_the_run_folder_or_is_the_code(recorded: dict[str, Any]) -> None:
    paths = {
        Path(entry.local_path)
        for one in (r.artifact for r in recorded["records"] if r.WhichOneof("record_type") == "artifact")
        for entry in one.manifest.contents
        if entry.local_path
    }
    assert any("table" in path.name for path in paths)
    outside = {path for path in paths if not path.is_relative_to(recorded["folder"] / "run")}
    assert outside <= set(sources().values())


def test_no_file_holds_a_secret_of_the_environment(recorded: dict[str, Any]) -> None:
    assert len(recorded["files"]) > 10
    for secret in (API_KEY, HF_TOKEN):
        assert [path for path in recorded["files"] if secret.encode() in path.read_bytes()] == []
