"""Several raylets on one machine stand for several machines: processes spread, a machine joins, machines leave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.commands import DEMO, AlignProcess, last_step, summary, trajectories, wait_until
from tests.harness.machines import Machines, actors_of, gone, machines

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.usefixtures("tiny_task")]

RUN = [
    *("train", DEMO, "--set", "run.prompts_per_step=8", "--set", "evaluation.every=1000"),
    *("--set", "evaluation.max_prompts=8", "--set", "optimizer.schedule=constant", "--set", "rollout.num_actors=2"),
    *("--set", "wandb.mode=disabled", "--set", "checkpoint.every=2"),
]


@pytest.fixture
def cluster() -> Iterator[Machines]:
    with machines() as started:
        yield started


def test_a_run_waits_for_a_machine_to_join_spreads_over_all_and_survives_one_that_leaves(
    cluster: Machines, tmp_path: Path
) -> None:
    """Three machines of one CPU, of which somebody holds one, for a run of three processes that need one each."""
    folder = tmp_path / "run"
    there = [cluster.join() for _ in range(3)]
    cluster.hold()
    more = ("--set", "run.steps=60", "--set", f"run.dir={folder}")
    run = AlignProcess(*RUN, *more, environment=cluster.environment)
    wait_until(lambda: (folder / "environment.json").is_file(), "the start of the run")
    time.sleep(5)  # into the wait for room, which is told after a second
    assert all("LearnerActor" not in actors_of(raylet) for raylet in there)
    there.append(cluster.join())
    wait_until(lambda: last_step(folder) >= 2, "step 2")
    found = [actors_of(raylet) - {"ScorerActor"} for raylet in there]  # a scorer asks for no place of its own
    assert sorted(len(classes) for classes in found) == [1, 1, 1, 1], "the run has three, somebody one"
    engines = [raylet for raylet, classes in zip(there, found, strict=True) if "RolloutActor" in classes]
    assert len(engines) == 2
    assert sum("LearnerActor" in classes for classes in found) == 1
    assert found[3] <= {"RolloutActor", "LearnerActor"}, "the machine that joined is used"

    cluster.release()
    gone(engines[0])
    code, console = run.wait(400)
    assert code == 0, console[-4000:]
    assert run.left_behind() == []
    assert "the cluster is busy: the run starts once others give it room, or a machine joins" in console
    assert "free: 2 of 3 CPUs on 4 machine(s)" in console
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["fleet/restarts"] == 1
    assert "was lost during" in console
    tickets = [row["ticket"] for step in trajectories(folder).values() for row in step if row["repeat"] == 0]
    assert len(tickets) == len(set(tickets)) == 60 * 8


def test_where_nothing_remains_the_run_ends_with_a_named_error_and_its_checkpoint(
    cluster: Machines, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    there = [cluster.join() for _ in range(3)]
    more = ("--set", "run.steps=1000", "--set", "rollout.max_restarts=1", "--set", "rollout.start_deadline_s=120")
    run = AlignProcess(*RUN, *more, "--set", f"run.dir={folder}", environment=cluster.environment)
    wait_until(lambda: last_step(folder) >= 3, "step 3")
    gone(next(raylet for raylet in there if "RolloutActor" in actors_of(raylet)))
    code, console = run.wait(400)
    assert code == 4, console[-4000:]
    assert "[RESTART_BUDGET]" in console
    assert "1 of 1 restarts (rollout.max_restarts) are used" in console
    assert summary(folder)["status"] == "failed"
    assert sorted(folder.glob("checkpoints/step_*")), "the run goes on from here"
    assert run.left_behind() == []
