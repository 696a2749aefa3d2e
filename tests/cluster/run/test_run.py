"""A run without Ray: its order with plain workers, and what is left and told when it fails or is stopped early."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

import cluster.run.run
from cluster.faults import INTERRUPTED, ActorLost
from cluster.record import checkpoint
from cluster.record.folder import RunFolder
from cluster.record.sinks.console import Console
from cluster.run.memory import MemoryMeter
from cluster.run.run import Training
from cluster.spec.config import resolved
from cluster.spec.inputs import Inputs
from tests.fakes.loop import PROMPTS, World
from tests.fakes.run_files import config, write
from tests.fakes.workers import FakeWorkers
from tests.harness.wandb_files import API_KEY, run_python, wandb_records

# --- with plain workers -------------------------------------------------------------------------------------------


class Process:
    """One process of a run of four steps, with a checkpoint every three and an evaluation every two.

    Args:
        path: The run folder.
        monkeypatch: Puts plain workers in the place of Ray's.
        hooks: See `World`.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **hooks: Callable[[Any], Awaitable[None]]) -> None:
        self.path = path
        self.world = World(hooks=hooks)
        self.output = io.StringIO()
        self.policy: Path | None = None
        monkeypatch.setattr(cluster.run.run, "start_workers", self._start_workers)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        cfg = config(
            run={"steps": 4, "prompts_per_step": 2},
            wandb={"mode": "disabled"},
            checkpoint={"every": 3},
            evaluation={"every": 2},
        )
        folder = RunFolder(path, resolved(cfg))
        folder.write_environment({"ray_session": "/nowhere"})
        console = Console(4, RichConsole(file=self.output, width=400, soft_wrap=True))
        inputs = Inputs(PROMPTS[:4], PROMPTS[4:], 0, 100, 1)
        self._training = Training(cfg, inputs, folder, console, MemoryMeter(), time.monotonic(), online=False)

    async def _start_workers(
        self, cfg: Any, path: Path, policy: Path, canary: Any, say: Callable[[str], None], warn: Any
    ) -> FakeWorkers:
        self.policy = policy
        say("workers start")
        return FakeWorkers(self.world)

    def run(self) -> int:
        return asyncio.run(self._training.run())

    def events(self) -> list[tuple[Any, ...]]:
        kinds = ("restore", "published", "sample", "update", "save", "export", "shutdown")
        return [event[:2] for event in self.world.events(*kinds)]

    def said(self, *beginnings: str) -> list[str]:
        lines = [line.strip() for line in self.output.getvalue().splitlines()]
        return [beginning for line in lines for beginning in beginnings if line.startswith(beginning)]

    def status(self) -> str:
        return str(json.loads((self.path / "summary.json").read_text())["status"])


def steps(*numbers: int) -> list[tuple[Any, ...]]:
    return [event for number in numbers for event in (("update", number), ("published", number))]


def saved(number: int) -> list[tuple[Any, ...]]:
    return [("save", f".step_{number:05d}.tmp"), ("export", "policy")]


BEGUN = [("published", 0), ("sample", 1), ("sample", 4)]


def test_a_run_is_evaluated_trained_saved_and_exported_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path / "run", monkeypatch)
    assert process.run() == 0
    assert process.events() == [
        *BEGUN,
        *steps(1, 2, 3),
        *saved(3),
        *steps(4),
        *saved(4),
        ("export", "policy"),
        ("shutdown",),
    ]
    said = process.said("workers start", "ready after", "evaluation after step", "finished after 4 steps", "policy ")
    evaluated = ["evaluation after step"] * 3
    assert said == ["workers start", "ready after", *evaluated, "finished after 4 steps", "policy "]
    assert process.status() == "finished"
    assert (tmp_path / "run/policy/config.json").is_file()


def test_a_run_that_is_interrupted_ends_its_step_saves_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupt(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    first = Process(tmp_path / "run", monkeypatch, update=interrupt)
    assert first.run() == INTERRUPTED
    assert first.events() == [*BEGUN, *steps(1, 2), *saved(2), ("shutdown",)]
    assert (first.status(), first.said("warning: stopping", "resume")) == ("stopped", ["warning: stopping", "resume"])
    second = Process(tmp_path / "run", monkeypatch)
    assert second.run() == 0
    assert second.events()[:4] == [("restore", "step_00002"), ("published", 2), *steps(3)]
    assert second.policy == tmp_path / "run/checkpoints/step_00002/policy"
    assert second.said("resuming     after step 2, from") and second.status() == "finished"


def test_a_second_interrupt_stops_at_once_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupt(step: int) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0.05)

    process = Process(tmp_path / "run", monkeypatch, update=interrupt)
    assert process.run() == INTERRUPTED
    assert process.events() == [*BEGUN, ("update", 1), ("shutdown",)]
    assert (process.status(), checkpoint.newest(tmp_path / "run/checkpoints")) == ("stopped", None)


def test_an_error_ends_the_workers_and_leaves_the_end_of_the_run_before_it_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(step: int) -> None:
        raise ActorLost("learner", 0, "update", "killed by the test")

    process = Process(tmp_path / "run", monkeypatch, update=fail)
    with pytest.raises(ActorLost, match="killed by the test"):
        process.run()
    assert process.events() == [*BEGUN, ("update", 1), ("shutdown",)]
    assert process.said("failed after 0 steps", "logs") == ["failed after 0 steps", "logs"]
    assert (process.status(), [event["cause"] for event in events(tmp_path / "run")]) == ("failed", ["failure"])


# --- in a process of its own, recorded in W&B -----------------------------------------------------------------------

HF_TOKEN = "hf_canary_0123456789"
FRAME = """
import asyncio, os, sys, time
from pathlib import Path
from align.metrics import Metric
from cluster.spec.config import load_config, resolved
from cluster.faults import ActorLost
from cluster.record.folder import RunFolder
from cluster.spec.config import resolved
from cluster.spec.inputs import Inputs
from cluster.record.sinks.console import Console
from cluster.run.run import Training

class Failing(Training):
    async def _train(self):
        self.recording.alerts.begin()
        for step in (1, 2):
            values = {"time/step_s": 1.0, "policy/entropy": 2.0 / step**8, "tokens/trained": 5.0}
            self.recording.log(step, [Metric(name, value) for name, value in values.items()])
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


@pytest.mark.integration
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


@pytest.mark.integration
def test_the_console_shows_the_place_of_the_record_the_warning_and_the_end(failed: tuple[Path, str]) -> None:
    run_dir, console = failed
    assert f"W&B          recorded in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/" in console
    assert "warning: collapse: entropy of the policy: 2 at the start" in console
    assert "failed after 2 steps" in console
    assert console.endswith("code 4\n")


@pytest.mark.integration
def test_no_file_of_the_run_holds_a_secret_of_the_environment(failed: tuple[Path, str]) -> None:
    run_dir, console = failed
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"events.jsonl", "summary.json", "report.html", "upload.log"} - {path.name for path in files} == {
        "upload.log"
    }
    for secret in (API_KEY, HF_TOKEN):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in console
