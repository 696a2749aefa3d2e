"""Publication to a fleet of fakes, over both kinds of transport: versions, canary, losses, replacements."""

from __future__ import annotations

import asyncio

import pytest

from align.metrics import Metric
from cluster.actors.weights import Link
from cluster.faults import ActorLost, RestartBudgetSpent, WrongWeights
from tests.fakes.fleet import LINK, FakeEngine, World

TRANSPORTS = pytest.mark.parametrize("link", [None, LINK], ids=["object_store", "nccl"])


def value(metrics: list[Metric], name: str) -> float:
    return next(m.value for m in metrics if m.name == name)


@TRANSPORTS
def test_after_a_publish_every_actor_serves_the_version_and_the_canary_agrees(link: Link | None) -> None:
    async def play() -> None:
        world = World([FakeEngine(0), FakeEngine(1)], link)
        for version in (0, 1, 2):
            world.learner.version = version
            metrics = await world.fleet.publish(version)
            assert world.serving() == [version, version]
            assert value(metrics, "weights/version") == version
            assert value(metrics, "weights/published_bytes") == 100
            assert value(metrics, "weights/canary_gap") == 0
            assert value(metrics, "idle/rollout_fraction") == 0.75, "of 4 s each was busy for 1"
        assert world.learner.groups == ([] if link is None else [[0, 1]]), "the group is formed once"

    asyncio.run(play())


@TRANSPORTS
def test_a_learner_at_another_version_than_the_loop_is_an_error(link: Link | None) -> None:
    world = World([FakeEngine(0)], link)
    world.learner.version = 3
    with pytest.raises(WrongWeights, match="published version 3, expected 2"):
        asyncio.run(world.fleet.publish(2))


@TRANSPORTS
def test_an_engine_that_computes_something_else_stops_the_run(link: Link | None) -> None:
    world = World([FakeEngine(0), FakeEngine(1, gap=0.01)], link)
    with pytest.raises(WrongWeights, match=r"rollout 1 and learner differ by 0\.01 nats"):
        asyncio.run(world.fleet.publish(0))


@TRANSPORTS
def test_a_gap_between_the_limits_warns(link: Link | None) -> None:
    world = World([FakeEngine(0, gap=5e-4)], link)
    asyncio.run(world.fleet.publish(0))
    assert len(world.warnings) == 1
    assert "warn limit 0.0001" in world.warnings[0]


@TRANSPORTS
def test_an_actor_that_dies_before_it_says_how_busy_it_was_is_left_to_its_rollout_loop(link: Link | None) -> None:
    world = World([FakeEngine(0, fails_in="usage"), FakeEngine(1)], link)
    metrics = asyncio.run(world.fleet.publish(0))
    assert [actor.lost is not None for actor in world.fleet.actors] == [True, False]
    assert [metric.value for metric in metrics if metric.name == "idle/rollout_fraction"] == [0.75]


@TRANSPORTS
def test_an_actor_that_dies_in_the_canary_is_left_to_its_rollout_loop(link: Link | None) -> None:
    async def play() -> None:
        world = World([FakeEngine(0), FakeEngine(1, fails_in="canary")], link)
        await world.fleet.publish(0)
        assert world.serving() == [0, None]

    asyncio.run(play())


@TRANSPORTS
def test_an_actor_that_never_answers_is_lost_at_its_deadline_and_the_others_serve(link: Link | None) -> None:
    async def play() -> None:
        world = World([FakeEngine(0), FakeEngine(1, hangs_in="commit" if link else "load")], link)
        await world.fleet.publish(0)
        assert world.serving() == [0, None]
        assert "no answer within 0.2 s" in str(world.fleet.actors[1].lost)

    asyncio.run(play())


@TRANSPORTS
def test_a_replacement_serves_and_is_verified_before_it_joins(link: Link | None) -> None:
    async def play() -> None:
        spare = FakeEngine(1)
        world = World([FakeEngine(0), FakeEngine(1)], link, [spare])
        await world.fleet.publish(0)
        await world.replace(1)
        assert world.serving() == [0, 0]
        assert world.fleet.actors[1].actor.subject is spare
        world.learner.version = 1
        await world.fleet.publish(1)
        assert world.serving() == [1, 1]

    asyncio.run(play())


@TRANSPORTS
def test_two_that_meet_the_same_loss_get_one_replacement_for_one_restart(link: Link | None) -> None:
    """The rollout loop and an evaluation, at the same time; and one that comes when all is done."""

    async def play() -> None:
        spare = FakeEngine(1)
        world = World([FakeEngine(0), FakeEngine(1)], link, [spare, FakeEngine(1)])
        await world.fleet.publish(0)
        lost, error = world.fleet.actors[1], ActorLost("rollout", 1, "rollout", "died")
        first, second = await asyncio.gather(world.fleet.replace(lost, error), world.fleet.replace(lost, error))
        late = await world.fleet.replace(lost, error)
        assert first is second is late is world.fleet.actors[1]
        assert first.actor.subject is spare
        assert not spare.killed
        assert world.fleet.num_restarts == 1
        assert world.warnings == ["rollout 1 was lost during rollout: died; replacing it (1 of 2 restarts)"]

    asyncio.run(play())


@TRANSPORTS
def test_a_replacement_that_computes_something_else_does_not_join(link: Link | None) -> None:
    async def play() -> None:
        old = FakeEngine(0)
        world = World([old], link, [FakeEngine(0, gap=1.0)])
        await world.fleet.publish(0)
        with pytest.raises(WrongWeights):
            await world.replace(0)
        assert world.fleet.actors[0].actor.subject is old

    asyncio.run(play())


@TRANSPORTS
def test_replacements_end_with_the_budget(link: Link | None) -> None:
    async def play() -> None:
        world = World([FakeEngine(0)], link, [FakeEngine(0, fails_in="ready"), FakeEngine(0, fails_in="ready")])
        await world.fleet.publish(0)
        with pytest.raises(RestartBudgetSpent):
            await world.replace(0)

    asyncio.run(play())
