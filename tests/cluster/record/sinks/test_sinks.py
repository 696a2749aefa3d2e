"""Where metrics go: what a person reads, what is on disk, what W&B gets, and that no sink can end a run."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from align.metrics import GLOSSARY
from cluster.record.alerts import Alert
from cluster.record.figures import read_rows
from cluster.record.sinks.console import Console
from cluster.record.sinks.jsonl import JsonLines
from cluster.record.sinks.sink import Sinks
from cluster.record.sinks.wandb.axes import AXES, axis_of
from cluster.record.sinks.wandb.settings import WandbConfig
from tests.harness.wandb_files import API_KEY, run_python, wandb_records, wandb_rows

STEP = {
    "reward/token_mean": -1.25,
    "kl/behavior_reference": 0.5,
    "policy/entropy": 2.345,
    "staleness/max": 1,
    "mismatch/abs_mean": 1.5e-6,
    "throughput/generated_tokens_per_s": 1234.0,
    "time/rollout_wait_s": 0.25,
    "time/update_s": 1.5,
    "time/publish_s": 0.75,
    "time/step_s": 2.5,
}


# --- JSONL --------------------------------------------------------------------------------------------------------


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (1, 2):
        sink.log(step, 0.12345, {"b": 2.0, "a": step})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[-1] == {"step": step, "wall_s": 0.123, "a": step, "b": 2.0}
        assert len(rows) == step
    sink.close()


def test_a_resumed_run_adds_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        sink = JsonLines(path)
        sink.log(step, 0.0, {})
        sink.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_the_first_line_after_a_kill_is_not_glued_to_the_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    sink = JsonLines(path)
    sink.log(2, 0.0, {"a": 2})
    sink.close()
    assert [(row["step"], row["a"]) for row in read_rows(path)] == [(1, 1), (2, 2)]


# --- console ------------------------------------------------------------------------------------------------------


def console(num_steps: int = 10, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    rich = RichConsole(file=file, width=200, force_terminal=terminal, highlight=False, soft_wrap=True)
    return Console(num_steps, rich), file


def test_a_step_is_one_line_under_a_heading() -> None:
    sink, file = console()
    sink.log(1, 3.0, STEP)
    heading, line = file.getvalue().splitlines()
    names = (
        "step",
        "reward/tok",
        "KL/tok",
        "entropy",
        "stale",
        "mismatch",
        "tok/s",
        "wait",
        "update",
        "publish",
        "left",
    )
    places = [heading.index(name) for name in names]
    assert places == sorted(places)
    assert line.split() == [
        "1/10", "-1.2500", "0.5000", "2.345", "1", "1.5e-06", "1234", "0.25", "1.50", "0.75", "-"
    ]  # fmt: skip


def test_a_run_that_pays_outcomes_shows_them_and_no_kl() -> None:
    file = io.StringIO()
    sink = Console(10, RichConsole(file=file, width=200, highlight=False, soft_wrap=True), pays_outcomes=True)
    sink.log(1, 3.0, STEP | {"reward/trajectory_mean": 0.125})
    heading, line = file.getvalue().splitlines()
    assert heading.split()[:3] == ["step", "reward", "entropy"]
    assert line.split()[:3] == ["1/10", "0.125", "2.345"]


def test_values_stand_under_their_headings() -> None:
    sink, file = console()
    sink.log(1, 3.0, STEP)
    heading, line = file.getvalue().splitlines()
    for title, value in (("reward/tok", "-1.2500"), ("mismatch", "1.5e-06"), ("publish s", "0.75"), ("left", "-")):
        assert heading.index(title) + len(title) == line.rindex(value) + len(value)


def test_the_time_left_follows_from_the_steps_since_the_first() -> None:
    sink, file = console(num_steps=100)
    for step, wall_s in ((41, 100.0), (42, 110.0), (44, 124.0)):
        sink.log(step, wall_s, STEP)
    left = [line.split()[-1] for line in file.getvalue().splitlines()[1:]]
    assert left == [
        "-",
        "9:40",
        "7:28",
    ]  # 58 steps of 10 s, 56 steps of 8 s; the start-up before step 41 does not count


def test_a_value_that_is_missing_is_a_dash() -> None:
    sink, file = console()
    sink.log(1, 3.0, {name: value for name, value in STEP.items() if name != "mismatch/abs_mean"})
    assert file.getvalue().splitlines()[1].split()[5] == "-"


def test_the_heading_comes_again_after_twenty_lines() -> None:
    sink, file = console(num_steps=50)
    for step in range(1, 42):
        sink.log(step, float(step), STEP)
    headings = [number for number, line in enumerate(file.getvalue().splitlines()) if "reward/tok" in line]
    assert headings == [0, 21, 42]


def test_an_evaluation_has_a_line_of_its_own() -> None:
    sink, file = console()
    evaluation = {
        "eval/heldout/kl_per_token": 0.12345,
        "eval/heldout/grammatical": 0.875,
        "eval/heldout/completion_tokens_mean": 7.25,
        "eval/heldout/accuracy": 0.5,
        "eval/train/kl_per_token": 0.5,
    }
    sink.log(0, 1.0, evaluation)
    sink.log(1, 2.0, STEP | evaluation)
    before, _, step_line, after = file.getvalue().splitlines()
    assert before == (
        "  evaluation after step 0: heldout: KL per token 0.1235, grammatical 87.5%, length 7.2, accuracy 50.0%; "
        "train: KL per token 0.5000"
    )
    assert step_line.split()[0] == "1/10"
    assert after == before.replace("step 0", "step 1")


def test_a_warning_is_shown_and_kept() -> None:
    sink, file = console()
    sink.warn("the engine [is] slow")
    assert file.getvalue() == "warning: the engine [is] slow\n"
    assert sink.warnings == ["the engine [is] slow"]


def test_a_long_line_is_not_broken() -> None:
    sink, file = console()
    sink.say("word " * 100)
    assert file.getvalue() == "word " * 100 + "\n"


def test_a_terminal_gets_a_bar_with_the_time_left_that_goes_away() -> None:
    sink, file = console(terminal=True)
    sink.log(1, 1.0, STEP)
    sink.log(2, 2.0, STEP)
    sink.close()
    assert "2/10" in file.getvalue()
    assert "0:08 left" in file.getvalue()
    sink.close()  # twice does no harm


# --- all of them --------------------------------------------------------------------------------------------------


class ListSink:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.walls: list[float] = []
        self.closed = False

    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))
        self.walls.append(wall_s)

    def close(self) -> None:
        self.closed = True


class FailingSink(ListSink):
    def log(self, step: int, wall_s: float, values: Mapping[str, float]) -> None:
        super().log(step, wall_s, values)
        raise OSError("No space left on device")

    def close(self) -> None:
        raise OSError("still no space")


def test_every_sink_gets_every_step_with_the_time_since_the_start() -> None:
    one, two = ListSink(), ListSink()
    sinks = Sinks([one, two], warn=pytest.fail, started=time.monotonic() - 100)
    sinks.log(1, {"a": 1.0})
    sinks.log(2, {"a": 2.0})
    sinks.close()
    assert one.rows == two.rows == [(1, {"a": 1.0}), (2, {"a": 2.0})]
    assert 100 <= one.walls[0] <= one.walls[1] < 160
    assert one.closed and two.closed


def test_a_sink_that_fails_is_left_out_and_named_once_while_the_others_go_on() -> None:
    failing, good, warnings = FailingSink(), ListSink(), list[str]()
    sinks = Sinks([failing, good], warnings.append, time.monotonic())
    for step in (1, 2, 3):
        sinks.log(step, {})
    sinks.close()
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert [step for step, _ in failing.rows] == [1]
    assert warnings == ["FailingSink failed and is left out from now on: No space left on device"]


def test_an_alert_reaches_the_sinks_that_take_alerts_the_disk_and_the_console(tmp_path: Path) -> None:
    screen, file = console()
    disk = JsonLines(tmp_path / "metrics.jsonl")
    sinks = Sinks([screen, disk, ListSink()], pytest.fail, time.monotonic())
    sinks.alert(Alert("stall", "warn", 3, "stalled", "no step for 600 s"))
    sinks.alert(Alert("failure", "error", 3, "failed: RUN", "[RUN] gone"))
    sinks.close()
    assert file.getvalue() == "warning: stalled: no step for 600 s\n", "the error is the last line of the run anyway"
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["cause"], row["level"], row["step"], row["title"], row["text"]) for row in rows] == [
        ("alert", "stall", "warn", 3, "stalled", "no step for 600 s"),
        ("alert", "failure", "error", 3, "failed: RUN", "[RUN] gone"),
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_sink_that_does_not_close_is_named_and_the_others_are_closed() -> None:
    class FailingClose(ListSink):
        def close(self) -> None:
            raise OSError("no space")

    good, warnings = ListSink(), list[str]()
    Sinks([FailingClose(), good], warnings.append, time.monotonic()).close()
    assert good.closed
    assert warnings == ["FailingClose did not close: no space"]


def test_a_sink_that_cannot_start_is_named_and_the_others_go_on() -> None:
    def refuse() -> ListSink:
        raise OSError("no space")

    good, late, warnings = ListSink(), ListSink(), list[str]()
    sinks = Sinks([good], warnings.append, time.monotonic())
    sinks.add(refuse)
    sinks.add(lambda: late)
    sinks.log(1, {})
    sinks.close()
    assert [step for step, _ in good.rows] == [step for step, _ in late.rows] == [1]
    assert good.closed and late.closed
    assert warnings == ["a sink could not start and is left out: no space"]


# --- W&B, in processes of its own since wandb keeps global state ----------------------------------------------------


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
    writer.wait(10)
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


CHECK_ONLINE = """
import json, time
from cluster.faults import TrackingError
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.record.sinks.wandb.access import check_online
for mode in {modes!r}:
    warnings, started = [], time.monotonic()
    try:
        answer = check_online(WandbConfig(mode=mode), warnings.append)
    except TrackingError as error:
        answer = str(error)
    print(json.dumps([answer, warnings, time.monotonic() - started]))
"""


def check_online(folder: Path, *modes: str, **environment: str) -> list[tuple[bool | str, list[str]]]:
    """Answer (or the text of the TrackingError) and warnings for each mode; each within seconds."""
    done = run_python(CHECK_ONLINE.format(modes=modes), folder, **environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(modes)
    assert all(elapsed_s < 30 for *_, elapsed_s in rows)
    return [(answer, warnings) for answer, warnings, _ in rows]


@pytest.fixture
def server() -> Iterator[dict[str, Any]]:
    """A server on 127.0.0.1 that answers every request with the status that the test sets."""
    state: dict[str, Any] = {"status": 200, "body": {}, "requests": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state["requests"] += 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps(state["body"]).encode()
            self.send_response(state["status"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state["url"] = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield state
        running.shutdown()
        thread.join()


def test_without_a_key_a_run_is_offline_unless_online_was_asked_for(tmp_path: Path) -> None:
    auto, online = check_online(tmp_path, "auto", "online")
    assert auto == (False, [])
    message, warnings = online
    assert str(message).startswith("[WANDB_KEY] wandb.mode is 'online', but no W&B key is set\n  -> set WANDB_API_KEY")
    assert warnings == []


def test_offline_and_disabled_ask_nobody(tmp_path: Path, server: dict[str, Any]) -> None:
    key = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server["url"]}
    assert check_online(tmp_path, "offline", "disabled", **key) == [(False, []), (False, [])]
    assert check_online(tmp_path, "auto", "online", WANDB_MODE="offline", **key) == [(False, []), (False, [])]
    assert server["requests"] == 0


def test_a_key_of_a_wrong_form_is_refused(tmp_path: Path, server: dict[str, Any]) -> None:
    ((message, _),) = check_online(tmp_path, "auto", WANDB_API_KEY="too-short", WANDB_BASE_URL=server["url"])
    assert str(message).startswith("[WANDB_KEY] W&B refused the key: ")
    assert "-> set WANDB_API_KEY" in str(message)


def test_a_key_that_the_server_refuses_is_an_error(tmp_path: Path, server: dict[str, Any]) -> None:
    server |= {"status": 401, "body": {"errors": [{"message": "unauthorized"}]}}
    ((message, _),) = check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server["url"])
    assert server["requests"] > 0
    assert str(message).startswith("[WANDB_KEY] W&B refused the key: ")
    assert API_KEY not in str(message)


def test_a_server_in_trouble_means_offline_with_a_warning_and_says_nothing_about_the_key(
    tmp_path: Path, server: dict[str, Any]
) -> None:
    server["status"] = 500
    environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server["url"], "WANDB_HTTP_TIMEOUT": "1"}
    ((answer, warnings),) = check_online(tmp_path, "auto", **environment)
    assert answer is False
    assert warnings == [
        f"the W&B server {server['url']} does not answer; the run is recorded offline (wandb sync uploads it later)"
    ]


def test_a_server_that_is_not_there_means_offline_with_a_warning(tmp_path: Path) -> None:
    with socket.socket() as bound:  # a port that nobody listens on
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        ((answer, warnings),) = check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url)
    assert answer is False
    assert warnings == [
        f"the W&B server {url} cannot be reached; the run is recorded offline (wandb sync uploads it later)"
    ]


def test_a_key_that_the_server_knows_means_online(tmp_path: Path, server: dict[str, Any]) -> None:
    server["body"] = {"data": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}}
    assert check_online(tmp_path, "auto", WANDB_API_KEY=API_KEY, WANDB_BASE_URL=server["url"]) == [(True, [])]
    assert server["requests"] > 0
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and API_KEY in path.read_text()]
    assert kept == [], "the key is not written anywhere"


def test_a_key_is_no_setting_of_a_run_file() -> None:
    with pytest.raises(ValueError, match="api_key"):
        WandbConfig(api_key=API_KEY)  # type: ignore[call-arg]
