"""What W&B gets beside the metrics: tables, artifacts, alerts; over several processes of a run; and by upload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from cluster.record import transcripts
from cluster.record.sinks.wandb.artifacts import sources
from cluster.record.sinks.wandb.tables import TABLE, table
from tests.fakes.wandb_server import fake_wandb
from tests.harness.wandb_files import API_KEY, run_python, wandb_records, wandb_rows

HF_TOKEN = "hf_canary_0123456789"


class Letters:
    """Token n is the n-th letter."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def write_step(folder: Path, step: int, rewards: list[float], version: int, parts: bool = False) -> Path:
    """One group; trajectory k answers with two tokens and is paid `rewards[k]` for each."""
    span = VersionSpan(version, 0, 2)
    answers = [
        Trajectory.from_completion([8], [k, k], [-1.0, -1.0], [span], FinishReason.STOP, seed=k)
        for k in range(len(rewards))
    ]
    scores = [TokenRewards(np.array([0, reward, reward], np.float32)) for reward in rewards]
    if parts:
        scores = [replace(score, parts={"exact_match": 1.0, "overlong": -0.5}) for score in scores]
    group = Group(Ticket(42, Prompt("p", "question", (8,)), tuple(range(len(rewards)))), tuple(answers))
    path = folder / f"step_{step:05d}.parquet"
    transcripts.write(path, [ScoredGroup(group, tuple(scores))], Letters(), step)
    return path


# --- tables -------------------------------------------------------------------------------------------------------


def test_a_row_of_a_table_says_what_was_asked_answered_paid_and_when_it_was_sampled(tmp_path: Path) -> None:
    path = write_step(tmp_path, 6, [2.0], version=4, parts=True)
    columns, rows = table(path, step=6, num_rows=10, discount=0.5)
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "prompt": "question",
            "completion": "aa",
            "reward": 4.0,
            "return": 3.0,  # 2 + 0.5 * 2
            "version": 4,
            "staleness": 1,  # step 6 updates version 5
            "finish_reason": "stop",
            "tokens": 2,
            "ticket": 42,
            "reward exact_match": 1.0,
            "reward overlong": -0.5,
        }
    ]


def test_a_table_is_bounded_and_reaches_from_the_lowest_reward_to_the_highest(tmp_path: Path) -> None:
    rewards = [float(k) for k in np.random.default_rng(0).permutation(100)]
    path = write_step(tmp_path, 1, rewards, version=0)
    columns, rows = table(path, step=1, num_rows=12, discount=1.0)
    shown = [row[columns.index("reward")] / 2 for row in rows]
    assert shown == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert len(table(path, step=1, num_rows=1, discount=1.0)[1]) == 1
    assert len(table(path, step=1, num_rows=100, discount=1.0)[1]) == 100


# --- a run with all of it, offline --------------------------------------------------------------------------------

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


# --- several processes --------------------------------------------------------------------------------------------

RESUME = """
from pathlib import Path
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
earlier = [{"step": 0}, *({"step": k, "tokens/trained": 10} for k in (1, 2, 3, 4))]
sink = WandbSink(WandbConfig(mode="offline"), Path("run").absolute(), "r", {}, False, earlier=earlier, earlier_s=100.0)
for step in (3, 4, 5):  # the checkpoint was after step 2: steps 3 and 4 come again
    sink.log(step, float(step), {"tokens/trained": 7})
sink.close()
"""


def test_tokens_and_time_go_on_after_a_resume_and_steps_that_come_again_count_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = run_python(RESUME, tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    rows = wandb_rows(record)
    assert [(row["step"], row["trained_tokens"], row["wall_s"]) for row in rows] == [
        (3, 27, 103.0),
        (4, 34, 104.0),
        (5, 41, 105.0),
    ]


# --- upload -------------------------------------------------------------------------------------------------------

UPLOAD = """
import json, time
from pathlib import Path
from cluster.record.alerts import Alert
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
from cluster.record.sinks.wandb.access import check_online, entity_of
run, warnings = Path("run").absolute(), []
run.mkdir()
cfg = WandbConfig(entity=ENTITY, deadline_s=60)
assert check_online(cfg, warnings.append) is True
sink = WandbSink(cfg, run, "my-run", {}, True, warn=warnings.append)
deadline = time.monotonic() + 60
for step in range(1, 1000):
    sink.log(step, float(step), {"optimizer/lr": step})
    if not WAITS_FOR_A_WARNING and step == 3 or warnings or time.monotonic() > deadline:
        break
    time.sleep(0.1)
sink.alert(Alert("stall", "warn", step, "stalled", "no step for 600 s"))
sink.close()
print(json.dumps({"entity": entity_of(cfg), "uploaded": sink.uploaded, "warnings": warnings}))
"""


def upload(folder: Path, url: str, entity: str | None, waits: bool = False) -> dict[str, Any]:
    script = UPLOAD.replace("ENTITY", repr(entity), 1).replace("WAITS_FOR_A_WARNING", repr(waits))
    done = run_python(script, folder, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_an_online_run_brings_rows_and_alerts_to_the_server_and_knows_it(tmp_path: Path) -> None:
    with fake_wandb() as server:
        answer = upload(tmp_path, server.url, None)
        assert answer == {"entity": "me", "uploaded": True, "warnings": []}
        lines = [
            json.loads(line)
            for body in server.streamed
            for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        ]
        assert [line["optimizer/lr"] for line in lines] == [1, 2, 3]
        (alert,) = server.sent("NotifyScriptableRunAlert")
        assert (alert["title"], alert["text"], alert["severity"]) == ("stalled", "no step for 600 s", "WARN")
        assert (tmp_path / "run" / "wandb_id").read_text() == alert["runName"]


def test_an_upload_that_the_server_refuses_is_a_warning_with_its_reason_and_the_run_goes_on(tmp_path: Path) -> None:
    with fake_wandb() as server:
        server.refuses = {"UpsertBucket": "permission denied"}
        answer = upload(tmp_path, server.url, "team", waits=True)
    assert answer["uploaded"] is False
    (warning,) = answer["warnings"]
    assert warning.startswith("the upload to W&B ended (Error initializing run: input: permission denied); the record")
    (directory,) = tmp_path.glob("run/wandb/offline-run-*")
    assert warning.endswith(f": wandb sync {directory}")
    assert API_KEY not in (tmp_path / "run" / "wandb" / "upload.log").read_text()


CHECK_ENTITY = """
from cluster.faults import RunError
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.access import check_online
for entity in ("me", "team", "teem"):
    try:
        print(check_online(WandbConfig(entity=entity), print))
    except RunError as error:
        print(error.exit_code, error)
"""


def test_an_entity_that_the_key_does_not_belong_to_is_refused_with_those_that_it_does(tmp_path: Path) -> None:
    with fake_wandb() as server:
        done = run_python(CHECK_ENTITY, tmp_path, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server.url)
    assert done.stdout.splitlines() == [
        "True",
        "True",
        "2 [WANDB_ENTITY] the W&B key may not write for the entity 'teem'; it may for me, team",
        "  -> set wandb.entity to one of them, use another key, or set wandb.mode to 'offline'",
    ], done.stderr


def test_a_project_that_wandb_could_not_name_is_refused_by_the_run_file() -> None:
    from cluster.record.sinks.wandb.settings import WandbConfig

    for name in ("a/b", "what?", "x" * 129, ""):
        with pytest.raises(ValueError, match="project"):
            WandbConfig(project=name)
    assert WandbConfig(project="my project-1").project == "my project-1"
