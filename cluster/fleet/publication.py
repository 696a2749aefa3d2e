"""All rollout actors, and the publication to them: delivered, verified with a canary, and again after a loss."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from align.metrics import Metric
from cluster.actors.rollout import RolloutConfig
from cluster.actors.weights import Link
from cluster.faults import ActorLost, WrongWeights, reason
from cluster.fleet.canary import Canary
from cluster.fleet.delivery import Delivery, DirectDelivery, StoreDelivery, if_there
from cluster.fleet.handle import spend
from cluster.fleet.learner import LearnerHandle, Published
from cluster.fleet.rollout import RolloutHandle


class FleetHandle:
    """All rollout actors and the publication to them; see the loop's `Fleet`.

    Args:
        actors: The handles.
        create: Makes the Ray actor of a rank.
        learner: The learner.
        cfg: Restart budget.
        canary: What every engine is checked with after it has taken weights.
        link: How weights get to the engines, or None for Ray's object store.
        warn: Told of every replacement.
    """

    def __init__(
        self,
        actors: list[RolloutHandle],
        create: Callable[[int], Any],
        learner: LearnerHandle,
        cfg: RolloutConfig,
        canary: Canary,
        link: Link | None,
        warn: Callable[[str], None],
    ) -> None:
        self.actors: list[RolloutHandle] = actors
        self.num_restarts = 0
        self._create = create
        self._cfg = cfg
        self._canary = canary
        self._delivery: Delivery = DirectDelivery(learner, canary, link) if link else StoreDelivery(learner, canary)
        self._warn = warn
        self._publishing = asyncio.Lock()
        self._replacing: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def publish(self, version: int) -> list[Metric]:
        """Bring the learner's weights to every actor and compare the canary.

        An actor that is lost on the way is left to its rollout loop, which replaces it.
        """
        async with self._publishing:
            published = await self._delivery.publish(self.actors)
            if published.version != version:
                raise WrongWeights(f"the learner published version {published.version}, expected {version}", "")
            gaps = await asyncio.gather(*(self._verify(actor, published) for actor in self.actors))
            usage = await asyncio.gather(*(if_there(actor, actor.usage) for actor in self.actors))
        return [
            Metric("weights/version", version),
            Metric("weights/published_bytes", published.num_bytes),
            *(Metric("weights/canary_gap", gap) for gap in gaps if gap is not None),
            Metric("fleet/restarts", self.num_restarts),
            *(Metric("idle/rollout_fraction", 1 - used[0] / used[1], used[1]) for used in usage if used and used[1]),
        ]

    async def _verify(self, actor: RolloutHandle, published: Published) -> float | None:
        """The canary gap of one actor, or None if it is lost."""
        measured = await if_there(actor, lambda: actor.canary(self._canary.sequences))
        if measured is None:
            return None
        return self._canary.check(measured, published.canary, actor.rank, published.version)

    async def replace(self, lost: Any, error: BaseException) -> RolloutHandle:
        """A fresh actor of the same rank, which joins after it has loaded and verified published weights.

        Whoever met the loss may ask; the first call replaces, the others get what it made.
        """
        async with self._replacing[lost.rank]:
            if lost not in self.actors:
                return next(actor for actor in self.actors if actor.rank == lost.rank)
            lost.lost = error
            lost.kill()
            fresh = await self._start_again(lost, error)
            async with self._publishing:
                others = [actor for actor in self.actors if actor is not lost]
                reached, published = await self._delivery.supply(fresh, others)
                await asyncio.gather(*(self._verify(actor, published) for actor in reached))
                self.actors[self.actors.index(lost)] = fresh
            return fresh

    async def _start_again(self, lost: RolloutHandle, error: BaseException) -> RolloutHandle:
        """Start actors of the lost one's rank until one is up or the budget is spent."""
        while True:
            self.num_restarts = spend(self.num_restarts, self._cfg.max_restarts, "rollout.max_restarts", error)
            self._warn(f"{reason(error)}; replacing it ({self.num_restarts} of {self._cfg.max_restarts} restarts)")
            fresh = RolloutHandle(self._create(lost.rank), lost.rank, self._cfg, lost.max_groups)
            try:
                await fresh.ready()
                return fresh
            except ActorLost as failed:
                error = failed
                fresh.kill()
