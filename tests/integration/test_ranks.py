"""The demo with a learner of two ranks: it learns, the death of one rank ends the run by name, and both resume it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from align.model.policy import Policy
from tests.harness.commands import DEMO, AlignProcess, align, last_step, summary, trajectories, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.usefixtures("tiny_task")]

STEPS = 6
SETTINGS = [
    *("learner.num_ranks=2", "learner.num_cpus=0.5", "checkpoint.every=1", "optimizer.schedule=constant"),
    *(f"run.steps={STEPS}", "run.prompts_per_step=16", "evaluation.every=100", "evaluation.max_prompts=16"),
]


def test_two_ranks_train_the_demo_one_of_them_dies_and_two_new_ones_finish_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["train", DEMO, *(part for s in (*SETTINGS, f"run.dir={folder}") for part in ("--set", s))]
    first = AlignProcess(*command)
    wait_until(lambda: last_step(folder) >= 2, "step 2", 300)
    learners = [p for p in first.descendants() if "LearnerActor" in " ".join(p.cmdline())]
    assert len(learners) == 2
    for process in learners:
        listening = {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}, "closed by default"
    os.kill(learners[1].pid, signal.SIGKILL)
    code, console = first.wait(120)
    assert code == 4, console[-4000:]
    assert "[ACTOR_LOST] learner" in console
    assert first.left_behind() == []

    code, console = align(*command)
    assert code == 0, console[-4000:]
    assert "resuming     after step" in console
    assert summary(folder)["kl_per_token_after"] < 0.8 * summary(folder)["kl_per_token_before"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["weights/version"] == STEPS
    assert max(row["weights/canary_gap"] for row in rows) < 1e-4, "every engine computed what the ranks do"
    assert max(row["mismatch/abs_mean"] for row in rows if "mismatch/abs_mean" in row) < 1e-5
    tickets = [row["ticket"] for step in trajectories(folder).values() for row in step if row["repeat"] == 0]
    assert sorted(tickets) == list(range(STEPS * 16)), "one rank wrote each step, whole"
    assert Policy.load(folder / "policy").vocab_size > 0
