"""Beside training: which of checkpoint, evaluation and log comes after which step, and in which order."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console as RichConsole

from align.metrics import Metric
from cluster.loop.answer import Answer
from cluster.loop.buffer import Buffer
from cluster.record.samples import Samples
from cluster.record.sinks.console import Console
from cluster.run.evaluation import Evaluator
from cluster.run.memory import MemoryMeter
from cluster.run.milestones import Milestones
from cluster.run.recording import Recording
from cluster.spec.config import RunConfig
from tests.fakes.run_files import config


class Beside:
    """Milestones whose evaluations and checkpoints are remembered, in order."""

    def __init__(self, path: Path, **sections: dict[str, Any]) -> None:
        self.path = path
        self.events: list[str] = []
        self.cfg = config(
            **{"run": {"steps": 7}, "wandb": {"mode": "disabled"}, "checkpoint": {"every": 2}, **sections}
        )
        self.console = io.StringIO()
        console = Console(7, RichConsole(file=self.console, width=200))
        self.recording = Recording(self.cfg, path, console, time.monotonic(), online=False)
        memory = MemoryMeter()
        memory.peak_bytes = 123
        evaluator = cast(Evaluator, self)
        self.milestones = Milestones(self.cfg, self.recording, evaluator, self.save, Buffer(1, 0), memory)

    async def save(self, step: int) -> None:
        self.events.append(f"save {step}, {len(self.rows())} rows logged")

    async def evaluate(self) -> dict[str, list[Answer]]:
        self.events.append(f"evaluate, {len(self.rows())} rows logged")
        return {"heldout": [Answer(f"prompt {i}", f"answer {i}", 1.0, 2, None) for i in range(4)]}

    async def sample_reference(self, cfg: RunConfig, samples: Samples) -> None:
        assert not samples.begun
        self.events.append(f"reference, {len(self.rows())} rows logged")

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def before_training(self, version: int = 0) -> None:
        asyncio.run(self.milestones.before_training(version, [Metric("weights/version", version)]))

    def after_step(self, *steps: int) -> None:
        async def scenario() -> None:
            for step in steps:
                await self.milestones.after_step(step, [Metric("policy/entropy", 1.0)])

        asyncio.run(scenario())


def test_before_training_the_policy_is_evaluated_and_logged_and_then_the_reference_answers(tmp_path: Path) -> None:
    beside = Beside(tmp_path)
    beside.before_training()
    assert beside.events == ["evaluate, 0 rows logged", "reference, 1 rows logged"]
    assert beside.recording.samples.begun
    (row,) = beside.rows()
    assert (row["step"], row["weights/version"], row["eval/heldout/kl_per_token"]) == (0, 0, 0.5)
    assert row["time/eval_s"] >= 0


def test_a_resumed_run_does_not_begin_again(tmp_path: Path) -> None:
    Beside(tmp_path).before_training()
    resumed = Beside(tmp_path)
    resumed.before_training(4)
    assert (resumed.events, len(resumed.rows())) == ([], 1)


def test_without_a_reference_nothing_is_asked_of_one(tmp_path: Path) -> None:
    beside = Beside(tmp_path, reference=cast(Any, None), reward={"kind": "exact_match"})
    beside.before_training()
    assert beside.events == ["evaluate, 0 rows logged"]


def test_checkpoints_and_evaluations_have_their_turns_and_the_last_step_has_both(tmp_path: Path) -> None:
    beside = Beside(tmp_path, evaluation={"every": 3})
    beside.after_step(*range(1, 8))
    assert beside.events == [
        "save 2, 1 rows logged",
        "evaluate, 2 rows logged",
        "save 4, 3 rows logged",
        "save 6, 5 rows logged",
        "evaluate, 5 rows logged",
        "save 7, 6 rows logged",
        "evaluate, 6 rows logged",
    ]
    rows = beside.rows()
    assert [row["step"] for row in rows] == list(range(1, 8)), "one line per step, with all that was beside it"
    assert [row["step"] for row in rows if "time/checkpoint_s" in row] == [2, 4, 6, 7]
    assert [row["step"] for row in rows if "eval/heldout/kl_per_token" in row] == [3, 6, 7]
    assert {row["memory/rss_bytes"] for row in rows} == {123}


def test_a_checkpoint_that_fails_ends_the_step_before_it_is_logged(tmp_path: Path) -> None:
    class Full(Beside):
        async def save(self, step: int) -> None:
            raise OSError("no space left")

    beside = Full(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        beside.after_step(1, 2)
    assert [row["step"] for row in beside.rows()] == [1]


def test_samples_show_one_answer_per_prompt(tmp_path: Path) -> None:
    beside = Beside(tmp_path, evaluation={"group_size": 2})
    beside.before_training()
    rows = beside.recording.samples.content["sets"]["heldout"]
    assert [(row["prompt"], row["before"]) for row in rows] == [("prompt 0", "answer 0"), ("prompt 2", "answer 2")]
