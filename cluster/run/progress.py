"""How far a run has come: taken up from its newest checkpoint, and written into the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from align.data.prompts import PromptStream
from align.data.types import Prompt, Ticket
from cluster.loop.fate import Fate, settled_before
from cluster.loop.filtering import Filter
from cluster.loop.goodput import Goodput
from cluster.loop.ledger import Ledger
from cluster.loop.quarantine import Quarantine
from cluster.record import checkpoint
from cluster.record.checkpoint import Checkpoint, RunState
from cluster.record.figures import read_lines
from cluster.record.sinks.wandb.identity import known_run_id
from cluster.run.moving_reference import MovingReference
from cluster.spec.config import RunConfig


class SavedLearner(Protocol):
    """What a checkpoint asks of the learner."""

    async def save(self, directory: Path) -> None:
        """Write policy and optimizer."""
        ...

    async def restore(self, directory: Path, version: int) -> None:
        """Take up the optimizer of a checkpoint, and its adapter."""
        ...


class Progress:
    """The prompts and the books of a run, as its newest checkpoint left them, or as they are at the start.

    Attributes:
        restored: The newest complete checkpoint; None for a new run.
        version: Policy version that this process of the run begins with.
        prompts: Hands out the tickets that are not trained yet.
        filter: Drops groups without signal.
        quarantine: Drops trajectories whose reward failed.
        ledger: Counts tickets and tokens by fate.

    Args:
        cfg: The run.
        path: The run folder, with the metrics that were logged.
        prompts: Prompts to train on.
    """

    def __init__(self, cfg: RunConfig, path: Path, prompts: Sequence[Prompt]) -> None:
        self._cfg, self._path = cfg, path
        self.restored: Checkpoint | None = checkpoint.newest(self._checkpoints)
        state = self.restored.state if self.restored else RunState(0, 0, (), 0)
        self.version = state.version
        self.filter = Filter(
            cfg.filter, cfg.run.prompts_per_step, cfg.run.seed, cfg.algorithm.reward_range, state.filter
        )
        leased = deque(sorted(state.leased))
        self.prompts = PromptStream(prompts, cfg.run.group_size, cfg.run.seed, state.cursor, leased, self.filter.visits)
        self.quarantine = Quarantine(cfg.quarantine, path / "quarantine.jsonl", state.quarantine)
        goodput = Goodput.resumed(read_lines(path / "metrics.jsonl"), state.version)
        settled = settled_before(state.quarantine, state.filter)
        self.ledger = Ledger(state.num_trained, state.num_filtered, state.num_quarantined, goodput, settled)

    @property
    def _checkpoints(self) -> Path:
        return self._path / "checkpoints"

    @property
    def policy(self) -> Path:
        """Folder of the policy that the learner begins with.

        An adapter goes back onto the weights that it was made for, not onto the checkpoint's, which it is a part of.
        """
        return self.restored.policy if self.restored and self._cfg.policy.adapter is None else self._cfg.policy.model

    @property
    def canary(self) -> list[Ticket]:
        """Tickets whose prompts begin the canary sequences."""
        return [self.prompts.ticket(number) for number in range(self._cfg.weights.canary_sequences)]

    async def restore(self, learner: SavedLearner, reference: MovingReference) -> None:
        """Bring learner and reference to where the newest checkpoint, if there is one, left them."""
        if self.restored is None:
            return
        path, state = self.restored.path, self.restored.state
        await learner.restore(path.resolve(), state.version)
        if state.reference_version:
            await reference.restore(path, state.reference_version, state.reference_fingerprint)

    async def save(self, step: int, learner: SavedLearner, reference: MovingReference) -> Path:
        """Write a checkpoint after a step; returns its folder.

        Raises:
            CheckpointError: If what the learner wrote is not there.
        """

        async def write(directory: Path) -> None:
            await learner.save(directory.resolve())
            await reference.copy_into(directory)

        state, keep = self._state(step, reference), self._cfg.checkpoint.keep
        return (await checkpoint.save(self._checkpoints, state, keep, write)).path

    def _state(self, step: int, reference: MovingReference) -> RunState:
        saved, ledger = reference.saved, self.ledger
        return RunState(
            version=step,
            cursor=self.prompts.cursor,
            leased=tuple(sorted([*self.prompts.returned, *ledger.in_flight])),
            num_trained=ledger.num[Fate.TRAINED],
            num_filtered=ledger.num[Fate.FILTERED],
            num_quarantined=ledger.num[Fate.QUARANTINED],
            quarantine=self.quarantine.state(ledger.settled),
            filter=self.filter.state(ledger.settled),
            reference_version=saved.version if saved else 0,
            reference_fingerprint=saved.fingerprint if saved else "",
            wandb_id=known_run_id(self._path) or "",
        )
