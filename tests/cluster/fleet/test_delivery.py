"""Weights that are sent to all engines at once: groups, and losses before, in and after a transfer."""

from __future__ import annotations

import asyncio

import pytest

from cluster.faults import ActorLost, WrongWeights
from tests.fakes.fleet import LINK, FakeEngine, World


def test_a_new_group_is_formed_when_the_fleet_has_changed_and_only_then() -> None:
    async def play() -> None:
        world = World([FakeEngine(0), FakeEngine(1)], LINK, [FakeEngine(1)])
        await world.fleet.publish(0)
        await world.replace(1)
        world.learner.version = 1
        await world.fleet.publish(1)
        assert world.learner.groups == [[0, 1], [1, 0]]

    asyncio.run(play())


def test_a_replacement_that_dies_in_the_transfer_leaves_the_others_in_a_group_of_their_own() -> None:
    async def play() -> None:
        engines = [FakeEngine(0), FakeEngine(1, fails_in="begin")]
        world = World(engines, LINK, [FakeEngine(1, fails_in="begin"), FakeEngine(1)])
        async with asyncio.timeout(5):
            await world.fleet.publish(0)
            await world.replace(1)
            assert world.serving() == [0, None]
            assert world.learner.groups == [[0, 1], [0], [1, 0], [0]]
            await world.replace(1)
        assert world.serving() == [0, 0]

    asyncio.run(play())


def test_other_bytes_than_were_sent_stop_the_run_and_the_engine_stands_still() -> None:
    engine = FakeEngine(0, damage=True)
    world = World([engine], LINK)
    with pytest.raises(WrongWeights, match="other bytes"):
        asyncio.run(world.fleet.publish(0))
    assert not engine.runs


@pytest.mark.parametrize("phase", ["ready", "begin"])
def test_a_loss_before_the_transfer_costs_one_actor_and_the_others_get_the_version(phase: str) -> None:
    async def play() -> None:
        engines = [FakeEngine(0), FakeEngine(1, fails_in=phase), FakeEngine(2)]
        world = World(engines, LINK)
        await world.fleet.publish(0)
        assert world.serving() == [0, None, 0]
        assert world.learner.groups[-1] == [0, 2]
        assert [e.killed for e in engines] == [False, True, False]

    asyncio.run(play())


def test_a_loss_in_the_transfer_costs_every_engine_that_was_taken_apart_and_the_run_goes_on() -> None:
    async def play() -> None:
        engines = [FakeEngine(0), FakeEngine(1)]
        world = World(engines, LINK, [FakeEngine(0), FakeEngine(1)])
        await world.fleet.publish(0)
        engines[1].fails_in = "receive"
        world.learner.version = 1
        metrics = await world.fleet.publish(1)
        assert world.serving() == [None, None]
        assert all(e.killed for e in engines), "an engine that stands still in an update is ended at once"
        assert not [m for m in metrics if m.name == "weights/canary_gap"]
        await asyncio.gather(world.replace(0), world.replace(1))
        assert world.serving() == [1, 1]

    asyncio.run(play())


def test_a_replacement_during_an_update_gets_the_new_version_whole_and_no_false_alarm() -> None:
    async def play() -> None:
        world = World([FakeEngine(0), FakeEngine(1)], LINK, [FakeEngine(1)])
        await world.fleet.publish(0)
        finish = asyncio.Event()
        update = world.learner_handle.actor.update.remote(finish)
        await asyncio.sleep(0)
        replacing = asyncio.create_task(world.replace(1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.fleet.actors[0].actor.subject.runs, "engines do not stand still while the learner updates"
        finish.set()
        await asyncio.gather(update, replacing)
        assert world.serving() == [1, 1]
        await world.fleet.publish(1)
        assert world.serving() == [1, 1]

    asyncio.run(play())


def test_an_update_that_is_asked_for_during_a_replacement_does_not_come_between_weights_and_canary() -> None:
    async def play() -> None:
        world = World([FakeEngine(0)], LINK, [FakeEngine(0)])
        await world.fleet.publish(0)
        finish = asyncio.Event()
        finish.set()
        world.learner.busy.clear()
        replacing = asyncio.create_task(world.replace(0))
        await world.learner.busy.wait()
        update = world.learner_handle.actor.update.remote(finish)
        await asyncio.gather(update, replacing)
        assert world.serving() == [0]
        assert world.learner.version == 1

    asyncio.run(play())


def test_a_lost_learner_is_not_taken_for_a_lost_engine() -> None:
    world = World([FakeEngine(0)], LINK)
    world.learner.dies = True
    with pytest.raises(ActorLost, match="learner 0"):
        asyncio.run(world.fleet.publish(0))
