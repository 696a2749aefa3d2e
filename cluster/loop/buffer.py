"""A bounded buffer between rollout and learner, which also bounds staleness.

There are `(max_staleness + 1) * groups_per_step` slots. A group is admitted (its slot reserved) before it is rolled out, only
while a slot is free; `take` hands out the groups that were admitted first; a slot is released only after the version that
its group trained has been published.

Why staleness is bounded. Let a group be admitted while actors serve version v, so versions 1..v are published and their
slots released. All other slots in use were admitted before and number at most `(s + 1) * g - 1` (s = max_staleness, g =
groups_per_step). Takes are oldest first and take g each, so the group is in one of the next s + 1 takes, the last of which
is made by the learner at version v + s. Its oldest token was sampled at version v or later: staleness is at most s.
A group that is cancelled and admitted again counts from its new admission, and the groups behind it only move up. The same
holds for a group that is filtered: its slot is cancelled, and the group in its place is a new admission at the back.

Why filtering leaves on-policy batches the same whatever the order of completion. Let s = 0 and let tickets be handed out in
their order, those that were given back first. A new ticket is admitted only while fewer than g slots are in use, and every
ticket before it is filtered or in one of them: fewer than g of those before it have signal. So no ticket beyond the g-th with
signal is ever admitted, and the step is not taken before g with signal are there: they are the first g of their order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(eq=False, slots=True)
class Slot(Generic[Item]):
    """The place of one admitted group.

    Attributes:
        item: The group, once it is there.
    """

    item: Item | None = None


class Buffer(Generic[Item]):
    """Bounded slots, taken oldest first.

    Args:
        groups_per_step: Groups per take.
        max_staleness: See the module.
    """

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        self.groups_per_step = groups_per_step
        self.num_slots = (max_staleness + 1) * groups_per_step
        self._waiting: list[Slot[Item]] = []  # admitted and not taken, oldest first
        self._num_taken = 0  # taken and not released
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def num_free(self) -> int:
        """Slots that can be reserved now."""
        return self.num_slots - len(self._waiting) - self._num_taken

    @property
    def num_filled(self) -> int:
        """Groups that are there and not yet taken."""
        return sum(slot.item is not None for slot in self._waiting)

    async def reserve(self) -> Slot[Item]:
        """Admit one group; waits until a slot is free, woken by `release` or `cancel`."""
        await self._until(lambda: self.num_free > 0 and not self._closed)
        slot: Slot[Item] = Slot()
        self._waiting.append(slot)
        return slot

    def fill(self, slot: Slot[Item], item: Item) -> None:
        """Put the group into its slot."""
        assert slot in self._waiting and slot.item is None, "a slot is filled once, before it is taken"
        slot.item = item
        self._changed.set()

    def cancel(self, slot: Slot[Item]) -> None:
        """Give a slot up that will not be filled."""
        assert slot in self._waiting and slot.item is None, "only an admitted, unfilled slot is cancelled"
        self._waiting.remove(slot)
        self._changed.set()

    async def take(self) -> list[Item]:
        """The oldest `groups_per_step` groups; waits until all of them are filled, woken by `fill`."""
        await self._until(self._oldest_filled)
        oldest = self._waiting[: self.groups_per_step]
        del self._waiting[: self.groups_per_step]
        self._num_taken += len(oldest)
        return [slot.item for slot in oldest if slot.item is not None]

    def release(self) -> None:
        """Free the slots of the last take; call it after the version they trained is published."""
        assert self._num_taken == self.groups_per_step, "release follows one take"
        self._num_taken = 0
        self._changed.set()

    def close(self) -> None:
        """Admit nothing more: the last step is trained."""
        self._closed = True

    def _oldest_filled(self) -> bool:
        oldest = self._waiting[: self.groups_per_step]
        return len(oldest) == self.groups_per_step and all(slot.item is not None for slot in oldest)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition over this buffer; every change wakes every waiter, and each looks again."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()
