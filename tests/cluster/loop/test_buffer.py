"""The buffer: how many groups it admits, whom it hands out first, what wakes a waiter, and the staleness bound."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.loop.buffer import Buffer, Slot


def at_once(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise AssertionError("the coroutine waits")


def within_deadline(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


async def settle() -> None:
    """Every task runs until it waits for something that only the test can do."""
    for _ in range(20):
        await asyncio.sleep(0)


@dataclass(eq=False)
class Admitted:
    number: int
    version: int  # published when it was admitted: none of its tokens can be older
    slot: Slot[int]
    filled: bool = False


class BufferUnderEveryOrderOfEvents(RuleBasedStateMachine):
    """Groups are filled and cancelled in any order, steps are taken and published at any time."""

    @initialize(groups_per_step=st.integers(1, 4), max_staleness=st.integers(0, 3))
    def start(self, groups_per_step: int, max_staleness: int) -> None:
        self.buffer: Buffer[int] = Buffer(groups_per_step, max_staleness)
        self.max_staleness = max_staleness
        self.waiting: list[Admitted] = []  # in the order of admission
        self.num_admitted = 0
        self.num_taken = 0
        self.version = 0

    @precondition(lambda self: self.buffer.num_free > 0)
    @rule()
    def admit(self) -> None:
        self.waiting.append(Admitted(self.num_admitted, self.version, at_once(self.buffer.reserve())))
        self.num_admitted += 1

    @precondition(lambda self: any(not group.filled for group in self.waiting))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([group for group in self.waiting if not group.filled]))
        self.buffer.fill(group.slot, group.number)
        group.filled = True

    @precondition(lambda self: any(not group.filled for group in self.waiting))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([group for group in self.waiting if not group.filled]))
        self.buffer.cancel(group.slot)
        self.waiting.remove(group)

    @precondition(lambda self: not self.num_taken and self.can_take())
    @rule()
    def take(self) -> None:
        oldest = self.waiting[: self.buffer.groups_per_step]
        assert at_once(self.buffer.take()) == [group.number for group in oldest]
        assert all(self.version - group.version <= self.max_staleness for group in oldest)
        del self.waiting[: self.buffer.groups_per_step]
        self.num_taken = len(oldest)

    @precondition(lambda self: self.num_taken > 0)
    @rule()
    def publish_and_release(self) -> None:
        self.version += 1
        self.buffer.release()
        self.num_taken = 0

    @invariant()
    def slots_are_bounded_and_add_up(self) -> None:
        slots = (self.max_staleness + 1) * self.buffer.groups_per_step
        assert self.buffer.num_free == slots - len(self.waiting) - self.num_taken >= 0

    def can_take(self) -> bool:
        oldest = self.waiting[: self.buffer.groups_per_step]
        return len(oldest) == self.buffer.groups_per_step and all(group.filled for group in oldest)


BufferUnderEveryOrderOfEvents.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestBufferUnderEveryOrderOfEvents = BufferUnderEveryOrderOfEvents.TestCase


def test_a_full_buffer_admits_nothing_until_a_take_is_released() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=0)
        buffer.fill(await buffer.reserve(), "first")
        waiting = asyncio.ensure_future(buffer.reserve())
        await settle()
        assert not waiting.done()
        assert await buffer.take() == ["first"]
        await settle()
        assert not waiting.done(), "a taken group keeps its slot until its version is published"
        buffer.release()
        buffer.fill(await waiting, "second")
        assert await buffer.take() == ["second"]

    within_deadline(scenario())


def test_a_cancelled_slot_is_given_to_one_waiter_only() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=2, max_staleness=0)
        first, _ = await buffer.reserve(), await buffer.reserve()
        waiters = [asyncio.ensure_future(buffer.reserve()) for _ in range(3)]
        await settle()
        buffer.cancel(first)
        await settle()
        assert [waiter.done() for waiter in waiters] == [True, False, False]
        for waiter in waiters:
            waiter.cancel()

    within_deadline(scenario())


def test_a_take_waits_for_the_oldest_group_though_younger_ones_are_there() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=2)
        oldest, middle, youngest = [await buffer.reserve() for _ in range(3)]
        buffer.fill(youngest, "youngest")
        buffer.fill(middle, "middle")
        take = asyncio.ensure_future(buffer.take())
        await settle()
        assert not take.done()
        buffer.fill(oldest, "oldest")
        assert await take == ["oldest"]

    within_deadline(scenario())


def test_cancelling_the_oldest_group_wakes_a_take_that_waits_for_it() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=1)
        oldest, other = await buffer.reserve(), await buffer.reserve()
        buffer.fill(other, "other")
        take = asyncio.ensure_future(buffer.take())
        await settle()
        buffer.cancel(oldest)
        assert await take == ["other"]

    within_deadline(scenario())


def test_a_closed_buffer_admits_nothing_more_and_hands_out_what_it_has() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=1)
        slot = await buffer.reserve()
        buffer.close()
        waiting = asyncio.ensure_future(buffer.reserve())
        buffer.fill(slot, "group")
        assert await buffer.take() == ["group"]
        buffer.release()
        await settle()
        assert buffer.num_free == 2
        assert not waiting.done()
        waiting.cancel()

    within_deadline(scenario())


def test_a_cancelled_take_takes_nothing() -> None:
    async def scenario() -> None:
        buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=0)
        slot = await buffer.reserve()
        take = asyncio.ensure_future(buffer.take())
        await settle()
        buffer.fill(slot, "group")  # wakes the take, which is cancelled before it runs
        take.cancel()
        await settle()
        assert take.cancelled()
        assert await buffer.take() == ["group"]

    within_deadline(scenario())


def test_misuse_is_refused() -> None:
    buffer: Buffer[str] = Buffer(groups_per_step=1, max_staleness=0)
    with pytest.raises(AssertionError, match="release follows one take"):
        buffer.release()
    slot = at_once(buffer.reserve())
    buffer.fill(slot, "group")
    with pytest.raises(AssertionError, match="filled once"):
        buffer.fill(slot, "again")
    with pytest.raises(AssertionError, match="unfilled"):
        buffer.cancel(slot)
    at_once(buffer.take())
    with pytest.raises(AssertionError, match="filled once"):
        buffer.fill(slot, "after the take")
