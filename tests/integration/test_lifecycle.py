"""A run is stopped, resumed, hit by a dead engine, and asked for what the machine does not have."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.harness.commands import DEMO, AlignProcess, align, last_step, summary, trajectories, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_task")]

SMALL = [
    *("--set", "run.steps=6", "--set", "run.prompts_per_step=16", "--set", "evaluation.every=100"),
    *("--set", "evaluation.max_prompts=16", "--set", "optimizer.schedule=constant"),
]


def test_an_interrupted_and_resumed_run_equals_one_that_was_not_bit_for_bit(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    code, console = align("train", DEMO, *SMALL, "--set", f"run.dir={straight}")
    assert code == 0, console[-4000:]

    command = AlignProcess("train", DEMO, *SMALL, "--set", f"run.dir={broken}")
    wait_until(lambda: last_step(broken) >= 2, "step 2")
    command.interrupt()
    code, console = command.wait(120)
    assert (code, summary(broken)["status"]) == (130, "stopped"), console[-4000:]
    assert command.left_behind() == []
    stopped_at = summary(broken)["steps"]
    assert 2 <= stopped_at < 6, "the run was over before it could be interrupted"

    code, console = align("train", DEMO, *SMALL, "--set", f"run.dir={broken}")
    assert code == 0, console[-4000:]
    assert f"resuming     after step {stopped_at}" in console
    assert trajectories(broken) == trajectories(straight)
    weights = [load_file(folder / "policy" / "model.safetensors") for folder in (straight, broken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])

    code, console = align("train", DEMO, *SMALL, "--set", f"run.dir={broken}")
    assert code == 2
    assert "already holds this run, finished" in console


def test_a_dead_engine_is_replaced_and_no_prompt_is_lost_or_trained_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ("--set", "run.max_staleness=1", "--set", "algorithm.importance=truncated", "--set", "run.steps=10")
    command = AlignProcess("train", DEMO, *SMALL, *more, "--set", f"run.dir={folder}")
    wait_until(lambda: last_step(folder) >= 2, "step 2")
    command.kill_engine()
    code, console = command.wait(300)
    assert code == 0, console[-4000:]
    assert command.left_behind() == []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["fleet/restarts"] == 1
    assert max(row.get("staleness/max", 0) for row in rows) == 1
    tickets = [row["ticket"] for step in trajectories(folder).values() for row in step if row["repeat"] == 0]
    assert len(tickets) == len(set(tickets)) == 10 * 16
    assert set(tickets) <= set(range(12 * 16)), "only what fits into the slots was begun beyond the last step"
    assert "was lost during" in console


def test_ctrl_c_while_processes_start_ends_the_run_at_once(tmp_path: Path) -> None:
    command = AlignProcess("train", DEMO, "--set", f"run.dir={tmp_path / 'run'}")
    wait_until(lambda: len(command.descendants()) > 8, "the start of Ray")
    command.interrupt()
    code, console = command.wait(60)
    assert code == 130, console[-4000:]
    assert command.left_behind() == []
    assert "Traceback" not in console


def test_a_second_ctrl_c_ends_training_without_waiting_for_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = AlignProcess("train", DEMO, "--set", f"run.dir={folder}", "--set", "run.prompts_per_step=512")
    wait_until(lambda: last_step(folder) >= 0, "the first evaluation")
    time.sleep(1.5)  # into the first step, which takes several seconds
    command.interrupt()
    time.sleep(0.3)
    command.interrupt()
    began = time.monotonic()
    code, console = command.wait(60)
    assert code == 130, console[-4000:]
    assert time.monotonic() - began < 20
    assert command.left_behind() == []
    assert "Traceback" not in console
    assert (summary(folder)["status"], summary(folder)["steps"]) == ("stopped", 0), "the step was waited for"
    assert not (folder / "checkpoints").exists()


def test_more_actors_than_the_machine_has_cpus_is_refused_within_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    code, console = align("train", DEMO, "--set", "rollout.num_actors=999", "--set", f"run.dir={tmp_path / 'run'}")
    assert code == 3
    assert "no room for 998 of rollout (1 CPUs)" in console
    assert "--set rollout.num_actors=" in console
    assert time.monotonic() - began < 30
