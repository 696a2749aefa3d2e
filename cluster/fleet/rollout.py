"""The handle on a rollout actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.types import Ticket
from cluster.actors.rollout import RolloutConfig
from cluster.faults import ActorLost, WrongWeights
from cluster.fleet.handle import Handle
from cluster.loop.rollout import Rollout


class RolloutHandle(Handle):
    """A rollout actor.

    Args:
        actor: Ray's handle.
        rank: Number of the actor.
        cfg: Deadlines.
        max_groups: Groups that may be in flight on it.
    """

    def __init__(self, actor: Any, rank: int, cfg: RolloutConfig, max_groups: int) -> None:
        super().__init__(actor, "rollout", rank)
        self.cfg = cfg
        self.max_groups = max_groups
        self.lost: ActorLost | None = None

    async def ready(self) -> None:
        """Wait until the engine is up."""
        await self.answer(self.actor.ready.remote(), "start", self.cfg.start_deadline_s)

    async def rollout(self, ticket: Ticket) -> Rollout:
        """Sample one group; see the loop's `RolloutActor`."""
        if self.lost:
            raise self.lost
        payload, summary = self.actor.rollout.options(num_returns=2).remote(ticket)
        known = await self.answer(summary, "rollout", self.cfg.rollout_deadline_s)
        numbers = (known.oldest_version, known.num_tokens, known.num_stopped)
        return Rollout(ticket, *numbers, payload, spans=(known.span,))

    async def load(self, weights: Any, version: int) -> None:
        """Serve the exported weights. Raises WrongWeights if the actor then reports another version."""
        await self._serve(self.actor.load.remote(weights), version)

    async def commit(self, version: int, fingerprint: str) -> None:
        """Serve what the learner sent. Raises WrongWeights if something else arrived."""
        await self._serve(self.actor.commit.remote(version, fingerprint), version)

    async def abandon_update(self) -> None:
        """Serve on after an update that failed.

        Raises:
            ActorLost: If the old weights are gone.
        """
        phase = "load"
        if not await self.answer(self.actor.abandon_update.remote(), phase, self.cfg.load_deadline_s):
            raise ActorLost(self.role, self.rank, phase, "the update broke off and the old weights are gone")

    async def _serve(self, loading: Any, version: int) -> None:
        served = await self.answer(loading, "load", self.cfg.load_deadline_s)
        if served != version:
            raise WrongWeights(f"rollout {self.rank} reports version {served} after loading {version}", "")

    async def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the canary sequences."""
        return await self.answer(self.actor.canary.remote(sequences), "canary", self.cfg.load_deadline_s)

    async def usage(self) -> tuple[float, float]:
        """Busy and elapsed seconds since the last call; see `cluster.actors.usage.BusyClock`."""
        return await self.answer(self.actor.usage.remote(), "usage", self.cfg.load_deadline_s)
