"""The handle on a rollout actor, with a plain async object in its place."""

from __future__ import annotations

import asyncio

import pytest

from align.data.types import Prompt, Ticket
from cluster.actors.rollout import GroupSummary, RolloutConfig
from cluster.faults import ActorLost, WrongWeights
from cluster.fleet.rollout import RolloutHandle
from cluster.loop.span import Span
from tests.fakes.ray_actors import SHORT, FakeActor, complete, fails, gives, never

TICKET = Ticket(5, Prompt("p", "prompt", (1, 2)), (7,))
SPAN = Span("rollout", 0, 1.0, 2.0)


def test_a_rollout_is_a_summary_with_its_tokens_left_where_they_are() -> None:
    async def scenario() -> None:
        actor = FakeActor(
            rollout=gives(("the group", GroupSummary(oldest_version=3, num_tokens=9, num_stopped=1, span=SPAN)))
        )
        rollout = await RolloutHandle(actor, 0, RolloutConfig(), max_groups=2).rollout(TICKET)
        assert (rollout.ticket, rollout.oldest_version, rollout.num_tokens, rollout.num_stopped) == (TICKET, 3, 9, 1)
        assert isinstance(rollout.payload, asyncio.Future), "a reference, not the group"
        assert await rollout.payload == "the group"

    complete(scenario())


def test_a_lost_rollout_actor_is_asked_no_more() -> None:
    async def scenario() -> None:
        handle = RolloutHandle(FakeActor(rollout=fails(AssertionError("was asked"))), 0, RolloutConfig(), max_groups=2)
        handle.lost = ActorLost("rollout", 0, "load", "no answer within 5 s")
        with pytest.raises(ActorLost) as caught:
            await handle.rollout(TICKET)
        assert caught.value is handle.lost

    complete(scenario())


def test_each_phase_of_a_rollout_actor_has_its_own_deadline() -> None:
    async def scenario() -> None:
        actor = FakeActor(ready=never, rollout=never, load=never, canary=never)
        cfg = RolloutConfig(start_deadline_s=SHORT, rollout_deadline_s=2 * SHORT, load_deadline_s=3 * SHORT)
        handle = RolloutHandle(actor, 1, cfg, max_groups=1)
        for work, phase, deadline in (
            (handle.ready(), "start", "0.02"),
            (handle.rollout(TICKET), "rollout", "0.04"),
            (handle.load("weights", 1), "load", "0.06"),
            (handle.canary([[1, 2]]), "canary", "0.06"),
        ):
            with pytest.raises(ActorLost, match=rf"rollout 1 was lost during {phase}: no answer within {deadline} s"):
                await work

    complete(scenario())


def test_an_actor_that_reports_another_version_after_a_load_has_wrong_weights() -> None:
    async def scenario() -> None:
        handle = RolloutHandle(FakeActor(load=gives(4)), 1, RolloutConfig(), max_groups=1)
        await handle.load("weights", 4)
        with pytest.raises(WrongWeights, match="rollout 1 reports version 4 after loading 5"):
            await handle.load("weights", 5)

    complete(scenario())
