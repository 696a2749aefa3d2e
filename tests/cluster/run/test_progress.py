"""The progress of a run: what a checkpoint holds of it is what a resumed run takes up."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.loop.buffer import Buffer
from cluster.loop.loop import Run, run_loop
from cluster.record import checkpoint
from cluster.record.checkpoint import RunState
from cluster.run.moving_reference import MovingReference
from cluster.run.progress import Progress
from cluster.spec.config import RunConfig
from tests.fakes.loop import PROMPTS, FakeObserver, World, complete, trained
from tests.fakes.run_files import config
from tests.fakes.workers import FakeWorkers


def run_config(**sections: dict[str, Any]) -> RunConfig:
    sections = {"algorithm": {"name": "grpo"}, "filter": {"drop_without_signal": True}, **sections}
    return config(run={"steps": 6, "prompts_per_step": 2, "group_size": 2, "max_staleness": 1}, **sections)


def began(cfg: RunConfig, path: Path) -> Progress:
    (path / "metrics.jsonl").touch()
    return Progress(cfg, path, PROMPTS)


def moving(path: Path, every: int, workers: FakeWorkers) -> MovingReference:
    return MovingReference(path / "reference", every, workers.learner.export_reference, workers.scorers.load_reference)


class Saves(FakeObserver):
    """Saves after each step, and logs the metrics as a run does."""

    def __init__(self, world: World, path: Path, progress: Progress, reference: MovingReference, learner: Any) -> None:
        super().__init__(world)
        self.states: dict[int, RunState] = {}
        self._path, self._progress, self._reference, self._learner = path, progress, reference, learner

    async def after_step(self, step: int, metrics: list[Any]) -> None:
        await super().after_step(step, metrics)
        saved = await self._progress.save(step, self._learner, self._reference)
        assert saved == self._path / "checkpoints" / f"step_{step:05d}"
        found = checkpoint.newest(self._path / "checkpoints")
        assert found is not None
        self.states[step] = found.state
        with (self._path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **self.metrics[-1]}) + "\n")


def train(cfg: RunConfig, path: Path, last: int) -> tuple[World, Saves]:
    """A process of the run with plain workers, from the newest checkpoint to a step."""
    world = World(outcomes=lambda ticket: (0.0, float(ticket.number % 3)))
    workers, progress = FakeWorkers(world), began(cfg, path)

    async def scenario() -> Saves:
        reference = moving(path, cfg.refresh_every, workers)
        await progress.restore(workers.learner, reference)
        await workers.fleet.publish(progress.version)
        observer = Saves(world, path, progress, reference, workers.learner)
        await run_loop(
            Run(
                prompts=progress.prompts,
                buffer=Buffer(cfg.run.prompts_per_step, cfg.run.max_staleness),
                fleet=workers.fleet,
                scorer=workers.scorers,
                quarantine=progress.quarantine,
                filter=progress.filter,
                learner=workers.learner,
                reference=reference,
                observer=observer,
                ledger=progress.ledger,
                max_staleness=cfg.run.max_staleness,
                first_step=progress.version + 1,
                last_step=last,
            )
        )
        return observer

    observer: Saves = complete(scenario())
    return world, observer


def test_a_new_run_begins_at_the_first_prompt_with_the_configured_policy(tmp_path: Path) -> None:
    cfg = run_config()
    progress = began(cfg, tmp_path)
    assert (progress.restored, progress.version, progress.policy) == (None, 0, cfg.policy.model)
    assert progress.prompts.next().number == 0
    assert [ticket.number for ticket in progress.canary] == list(range(cfg.weights.canary_sequences))


def test_what_was_saved_is_what_is_taken_up(tmp_path: Path) -> None:
    cfg = run_config()
    _, observer = train(cfg, tmp_path, last=3)
    state = observer.states[3]
    assert state.leased and state.num_filtered and state.num_trained == 6, "else this shows nothing"
    resumed = Progress(cfg, tmp_path, PROMPTS)
    assert resumed.version == 3
    assert resumed.policy == tmp_path / "checkpoints/step_00003/policy"
    assert (resumed.prompts.cursor, tuple(resumed.prompts.returned)) == (state.cursor, state.leased)
    workers = FakeWorkers(World())
    asyncio.run(resumed.save(4, workers.learner, moving(tmp_path, 0, workers)))
    again = checkpoint.newest(tmp_path / "checkpoints")
    assert again and again.state == replace(state, version=4)


def test_a_run_in_two_processes_trains_the_same_groups_as_in_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    whole, _ = train(run_config(), one, last=6)
    first, _ = train(run_config(), two, last=3)
    second, observer = train(run_config(), two, last=6)
    assert trained(first) + trained(second) == trained(whole)
    assert second.events("restore") == [("restore", "step_00003", 3)]
    assert observer.metrics[-1]["goodput/left_tokens"] > 0, "what was waiting when the first process ended"


def test_an_adapter_goes_back_onto_the_weights_that_it_was_made_for(tmp_path: Path) -> None:
    cfg = run_config(policy={"adapter": {"kind": "lora", "rank": 4}})
    train(cfg, tmp_path, last=1)
    resumed = Progress(cfg, tmp_path, PROMPTS)
    assert (resumed.version, resumed.policy) == (1, cfg.policy.model)


def test_a_moved_reference_comes_back_with_the_checkpoint(tmp_path: Path) -> None:
    cfg = run_config(reference={"refresh_every": 2})
    _, observer = train(cfg, tmp_path, last=3)
    assert [observer.states[step].reference_version for step in (1, 2, 3)] == [0, 2, 2]
    workers = FakeWorkers(World())
    reference = moving(tmp_path, 2, workers)
    asyncio.run(Progress(cfg, tmp_path, PROMPTS).restore(workers.learner, reference))
    assert workers.world.events("restore", "load reference") == [
        ("restore", "step_00003", 3),
        ("load reference", 2, "fingerprint of step_00002"),
    ]
    assert reference.saved and reference.saved.version == 2


def test_the_record_in_wandb_goes_on_under_the_id_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("abc123")
    _, observer = train(run_config(), tmp_path, last=1)
    assert observer.states[1].wandb_id == "abc123"
