"""The record of a run for W&B, in processes of its own since wandb keeps global state: kept, gone on with, uploaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.metrics import GLOSSARY
from cluster.record.sinks.wandb.axes import AXES, axis_of
from tests.fakes.metrics import STEP
from tests.fakes.wandb_server import fake_wandb
from tests.harness.wandb_files import API_KEY, run_python, wandb_records, wandb_rows

pytestmark = pytest.mark.integration

WRITE_A_RUN = f"""
import json, sys
from pathlib import Path
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
cfg = WandbConfig(mode="offline", project="tests", entity="team", tags=("a", "b"), group="seeds", notes="why")
sink = WandbSink(cfg, Path("run").absolute(), "my-run", {{"run": {{"seed": 3, "name": "demo"}}, "lr": 0.5}}, online=False)
sink.log(0, 0.5, {{"eval/heldout/kl_per_token": 1.5}})
for step in range(1, 201):
    sink.log(step, step + 0.5, {{"tokens/trained": 10, **{{name: step / 7 for name in {list(STEP)!r}}}}})
sink.close()
print(json.dumps({{"directory": str(sink.directory), "uploaded": sink.uploaded}}))
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that was recorded offline, with a key in the environment."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "run").mkdir()
    done = run_python(WRITE_A_RUN, folder, WANDB_API_KEY=API_KEY)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)  # and nothing else is printed
    (record,) = Path(answer["directory"]).glob("*.wandb")
    return answer | {"folder": folder, "record": record, "records": list(wandb_records(record))}


def test_an_offline_run_holds_every_value_that_was_logged(offline_run: dict[str, Any]) -> None:
    rows = wandb_rows(offline_run["record"])
    assert rows[0] == {"step": 0, "wall_s": 0.5, "trained_tokens": 0, "eval/heldout/kl_per_token": 1.5}
    expected = [
        {"step": k, "wall_s": k + 0.5, "trained_tokens": 10 * k, "tokens/trained": 10, **dict.fromkeys(STEP, k / 7)}
        for k in range(1, 201)
    ]
    assert rows[1:] == expected
    histories = [r.history for r in offline_run["records"] if r.WhichOneof("record_type") == "history"]
    assert [history.step.num for history in histories] == list(range(201))


def test_an_offline_run_holds_config_name_project_tags_group_and_notes(offline_run: dict[str, Any]) -> None:
    (run,) = [r.run for r in offline_run["records"] if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["run"] == {"seed": 3, "name": "demo"}
    assert config["lr"] == 0.5
    assert (run.display_name, run.project, run.entity, list(run.tags)) == ("my-run", "tests", "team", ["a", "b"])
    assert (run.run_group, run.notes) == ("seeds", "why")


def test_every_metric_of_the_glossary_has_its_axis_and_its_summary(offline_run: dict[str, Any]) -> None:
    metrics = {r.metric.name: r.metric for r in offline_run["records"] if r.WhichOneof("record_type") == "metric"}
    assert set(metrics) == {*GLOSSARY, *AXES}
    assert {name: metrics[name].step_metric for name in GLOSSARY} == {name: axis_of(name) for name in GLOSSARY}
    kept = {
        name: [kind for kind in ("min", "max", "last") if getattr(metrics[name].summary, kind)] for name in GLOSSARY
    }
    assert kept["eval/heldout/kl_per_token"] == ["min", "last"]
    assert kept["eval/heldout/accuracy"] == kept["mismatch/abs_max"] == ["max", "last"]
    assert kept["optimizer/lr"] == ["last"]
    assert all(metrics[axis].options.hidden for axis in AXES)


def test_the_record_lies_in_the_run_folder_and_holds_no_key(offline_run: dict[str, Any]) -> None:
    folder: Path = offline_run["folder"]
    assert Path(offline_run["directory"]).is_relative_to(folder / "run" / "wandb")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if API_KEY.encode() in path.read_bytes()] == []


def test_an_offline_run_is_not_called_uploaded(offline_run: dict[str, Any]) -> None:
    assert offline_run["uploaded"] is False


STOP_THE_WRITER = """
import os, signal, time
from pathlib import Path
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
Path("run").mkdir()
sink = WandbSink(WandbConfig(mode="offline"), Path("run").absolute(), "my-run", {}, online=False)
for step in range(3):
    sink.log(step, 1.0, {"optimizer/lr": step / 7})
for writer in sink._writers:
    os.kill(writer.pid, signal.SIGINT)
    writer.wait(120)
time.sleep(1.1)  # the folder of a record is named by the second
sink.log(3, 1.0, {"optimizer/lr": 3 / 7})
sink.close()
"""


def test_a_record_goes_on_when_a_signal_to_all_processes_of_a_job_ended_its_writer(tmp_path: Path) -> None:
    done = run_python(STOP_THE_WRITER, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    records = [record for path in files for record in wandb_records(path)]
    steps = [r.history.step.num for r in records if r.WhichOneof("record_type") == "history"]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    assert len({r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}) == 1


START_A_RUN = """
from pathlib import Path
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
for folder in ("run", "other-run"):
    Path(folder).mkdir(exist_ok=True)
    WandbSink(WandbConfig(mode="offline"), Path(folder).absolute(), "my-run", {}, online=False).close()
"""


def test_all_processes_of_a_run_are_one_run_of_the_server(tmp_path: Path) -> None:
    for _ in range(2):
        done = run_python(START_A_RUN, tmp_path)
        assert done.returncode == 0, done.stderr
    ids = {
        folder: [
            record.run.run_id
            for path in (tmp_path / folder / "wandb").glob("offline-run-*/*.wandb")
            for record in wandb_records(path)
            if record.WhichOneof("record_type") == "run"
        ]
        for folder in ("run", "other-run")
    }
    kept = {folder: (tmp_path / folder / "wandb_id").read_text() for folder in ids}
    assert ids == {folder: [identity] * 2 for folder, identity in kept.items()}
    assert kept["run"] != kept["other-run"]


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
import itertools, json, time
from pathlib import Path
from cluster.record.alerts import Alert
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.sink import WandbSink
from cluster.record.sinks.wandb.access import check_online, entity_of
run, warnings = Path("run").absolute(), []
run.mkdir()
cfg = WandbConfig(entity=ENTITY, deadline_s=300)
assert check_online(cfg, warnings.append) is True
sink = WandbSink(cfg, run, "my-run", {}, True, warn=warnings.append)
for step in itertools.count(1):
    sink.log(step, float(step), {"optimizer/lr": step})
    if not WAITS_FOR_A_WARNING and step == 3 or warnings:
        break
    time.sleep(0.1)
sink.alert(Alert("stall", "warn", step, "stalled", "no step for 600 s"))
sink.close()
print(json.dumps({"entity": entity_of(cfg), "uploaded": sink.uploaded, "warnings": warnings}))
"""


def upload(folder: Path, url: str, entity: str | None, waits: bool = False) -> dict[str, Any]:
    script = UPLOAD.replace("ENTITY", repr(entity), 1).replace("WAITS_FOR_A_WARNING", repr(waits))
    done = run_python(script, folder, WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url, WANDB_HTTP_TIMEOUT="120")
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
