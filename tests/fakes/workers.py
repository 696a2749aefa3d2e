"""The workers of a whole run as plain objects: those of the loop's fakes, which also evaluate, save and restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.types import Prompt
from cluster.loop.answer import Answer
from cluster.loop.rollout import Rollout
from cluster.loop.saved_reference import SavedReference
from tests.fakes.loop import FakeActor, FakeFleet, FakeLearner, FakeScorer, World


@dataclass
class SavingLearner(FakeLearner):
    """Writes what a checkpoint has to hold, and logs what it is asked for."""

    async def evaluate(self, distributions: Any, rollouts: Sequence[Rollout]) -> list[Answer]:
        kl = None if distributions is None else 1.0
        return [Answer(rollout.ticket.prompt.text, "answer", kl, 10, None) for rollout in rollouts]

    async def save(self, directory: Path) -> None:
        self.world.log.append(("save", directory.name))
        await self.export_policy(directory / "policy")
        (directory / "optimizer.safetensors").write_bytes(b"moments")

    async def restore(self, directory: Path, version: int) -> None:
        self.world.log.append(("restore", directory.name, version))

    async def export_policy(self, directory: Path) -> None:
        self.world.log.append(("export", directory.name))
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")

    async def export_reference(self, directory: Path) -> str:
        await self.export_policy(directory)
        return f"fingerprint of {directory.name}"


@dataclass
class AnsweringScorer(FakeScorer):
    """Has a reference model that answers and is replaced."""

    async def log_distributions(self, rollouts: Sequence[Rollout]) -> str:
        return "distributions"

    async def sample(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[str]:
        self.world.log.append(("sample", len(prompts)))
        return [f"{prompt.text}: the reference's answer" for prompt in prompts]

    async def load_reference(self, saved: SavedReference) -> None:
        self.world.log.append(("load reference", saved.version, saved.fingerprint))
        self.world.reference = saved.version


class FakeWorkers:
    """One of each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fleet = FakeFleet(world, [FakeActor(world, 0, 0)], 0)
        self.scorers = AnsweringScorer(world)
        self.learner = SavingLearner(world)

    async def shutdown(self) -> None:
        self.world.log.append(("shutdown",))
