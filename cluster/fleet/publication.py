"""All rollout actors, and how new weights reach them: verified, within deadlines, and again after a loss.

One publication is the same whatever the transport: the learner gives its weights away, every engine takes them, and a canary
compares what engine and learner make of a few fixed sequences. Only the taking differs: from Ray's object store every actor
loads by itself (`StoreDelivery`); over NCCL or CUDA IPC the learner sends to all of them at once (`DirectDelivery`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from align.metrics import Metric
from cluster.actors.rollout import RolloutConfig
from cluster.actors.weights import Link
from cluster.faults import ActorLost, WrongWeights, reason
from cluster.fleet.canary import Canary
from cluster.fleet.handle import spend
from cluster.fleet.learner import LearnerHandle, Published
from cluster.fleet.rollout import RolloutHandle

Result = TypeVar("Result")


class Delivery(Protocol):
    """A way for weights to reach the engines. Actors that are lost on the way are marked and left out."""

    async def publish(self, actors: Sequence[RolloutHandle]) -> Published:
        """Bring the learner's current weights to these actors."""
        ...

    async def supply(
        self, fresh: RolloutHandle, others: Sequence[RolloutHandle]
    ) -> tuple[Sequence[RolloutHandle], Published]:
        """Bring published weights to a new actor; returns who got them, and the weights."""
        ...


class StoreDelivery:
    """Through Ray's object store, where the published weights stay for replacements.

    Args:
        learner: The learner.
        canary: Its sequences are scored with the weights that are given away.
    """

    def __init__(self, learner: LearnerHandle, canary: Canary) -> None:
        self._learner = learner
        self._canary = canary
        self._published: Published | None = None

    async def publish(self, actors: Sequence[RolloutHandle]) -> Published:
        """See `Delivery`."""
        published = self._published = await self._learner.export(self._canary.sequences)
        await asyncio.gather(*(self._load(actor, published) for actor in actors))
        return published

    async def supply(
        self, fresh: RolloutHandle, others: Sequence[RolloutHandle]
    ) -> tuple[Sequence[RolloutHandle], Published]:
        """See `Delivery`; the others keep what they have."""
        if self._published is None:
            return [fresh, *others], await self.publish([fresh, *others])
        await self._load(fresh, self._published)
        return [fresh], self._published

    async def _load(self, actor: RolloutHandle, published: Published) -> None:
        await if_there(actor, lambda: actor.load(published.exported, published.version))


class DirectDelivery:
    """From the learner's GPU to those of the engines, over a group that is formed again whenever the fleet changes.

    Args:
        learner: The learner.
        canary: Its sequences are scored with the weights that are given away.
        link: How to send.
    """

    def __init__(self, learner: LearnerHandle, canary: Canary, link: Link) -> None:
        self._learner = learner
        self._canary = canary
        self._link = link
        self._group: dict[int, Any] | None = None

    async def publish(self, actors: Sequence[RolloutHandle]) -> Published:
        """See `Delivery`. After a loss on the way the weights are sent again, to those that are left."""
        while True:
            there = [actor for actor in actors if not actor.lost]
            try:
                published = await self._send(there)
                break
            except ActorLost as error:
                if error.role == self._learner.role:
                    raise
                self._group = None
                await self._settle(there, error)
        await asyncio.gather(*(self._commit(actor, published) for actor in there))
        return published

    async def supply(
        self, fresh: RolloutHandle, others: Sequence[RolloutHandle]
    ) -> tuple[Sequence[RolloutHandle], Published]:
        """See `Delivery`; all get the learner's current weights, which are one version ahead if an update has just ended."""
        return [fresh, *others], await self.publish([fresh, *others])

    async def _send(self, actors: Sequence[RolloutHandle]) -> Published:
        engines = {actor.rank: actor.actor for actor in actors}
        changed = engines != self._group
        published = await self._learner.send(self._canary.sequences, self._link, engines if changed else None)
        self._group = engines
        return published

    async def _settle(self, actors: Sequence[RolloutHandle], error: ActorLost) -> None:
        """After a transfer that broke off: only actors whose old weights are whole stay.

        The others are ended at once, since their engines stand still in the middle of an update.
        """
        for actor in actors:
            if actor.rank == error.rank:
                actor.lost = error
        await asyncio.gather(*(if_there(actor, actor.abandon_update) for actor in actors))
        for actor in actors:
            if actor.lost:
                actor.kill()

    async def _commit(self, actor: RolloutHandle, published: Published) -> None:
        await if_there(actor, lambda: actor.commit(published.version, published.fingerprint))


async def if_there(actor: RolloutHandle, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result | None:
    """The result of the work, or None if the actor is lost. Its rollout loop replaces it."""
    if actor.lost:
        return None
    try:
        return await work()
    except ActorLost as error:
        actor.lost = error
        return None


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
