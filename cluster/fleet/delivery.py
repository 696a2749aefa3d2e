"""How new weights reach the engines: each within its deadline, and what is left of the fleet after a loss on the way.

A delivery is the same whatever the transport: the learner gives its weights away and every engine takes them. Only the taking
differs: from Ray's object store every actor loads by itself (`StoreDelivery`); over NCCL or CUDA IPC the learner sends to all of
them at once (`DirectDelivery`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from cluster.actors.weights import Link
from cluster.faults import ActorLost
from cluster.fleet.canary import Canary
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
