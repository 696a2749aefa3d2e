"""One answer of an actor: its deadline, named errors, and the budget of restarts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.faults import ActorLost, RestartBudgetSpent, RunError, TrainingDiverged, WrongWeights
from cluster.fleet.handle import Handle, spend
from tests.fakes.ray_actors import SHORT, FakeActor, Method, complete, failed_task, fails, gives, never


def ask(method: Method, deadline_s: float = 5) -> Any:
    async def scenario() -> Any:
        handle = Handle(FakeActor(work=method), "scorer", 2)
        return await handle.answer(handle.actor.work.remote(), "a test", deadline_s)

    return complete(scenario())


def test_an_answer_within_the_deadline_is_the_answer() -> None:
    assert ask(gives([1, 2])) == [1, 2]


def test_an_actor_that_does_not_answer_in_time_is_lost() -> None:
    with pytest.raises(ActorLost, match=r"scorer 2 was lost during a test: no answer within 0\.02 s"):
        ask(never, SHORT)


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", None)])
def test_a_dead_actor_is_lost(error: Exception) -> None:
    with pytest.raises(ActorLost, match="scorer 2 was lost during a test: ") as caught:
        ask(fails(error))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "cause", [ActorLost("rollout", 1, "generate", "the engine died"), TrainingDiverged("3 updates"), WrongWeights("x")]
)
def test_a_named_error_of_the_actor_is_raised_as_it_is(cause: RunError) -> None:
    with pytest.raises(type(cause)) as caught:
        ask(fails(failed_task(cause)))
    assert caught.value is cause


@pytest.mark.parametrize("cause", [ZeroDivisionError("a bug"), ValueError("a bug"), TimeoutError("a bug")])
def test_a_bug_in_the_work_is_not_taken_for_a_lost_actor(cause: Exception) -> None:
    with pytest.raises(RunError, match="scorer 2 failed during a test") as caught:
        ask(fails(failed_task(cause)))
    assert type(caught.value) is RunError
    assert repr(cause) in str(caught.value)


def test_a_cancelled_wait_is_cancelled() -> None:
    async def scenario() -> None:
        handle = Handle(FakeActor(work=never), "scorer", 2)
        waiting = asyncio.ensure_future(handle.answer(handle.actor.work.remote(), "a test", 5))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    complete(scenario())


def test_restarts_are_counted_up_to_the_budget() -> None:
    error = ActorLost("rollout", 1, "load", "killed")
    assert [spend(used, 3, "rollout.max_restarts", error) for used in range(3)] == [1, 2, 3]
    with pytest.raises(RestartBudgetSpent, match=r"rollout 1 was lost.*3 of 3 restarts \(rollout.max_restarts\)"):
        spend(3, 3, "rollout.max_restarts", error)
    with pytest.raises(RestartBudgetSpent):
        spend(0, 0, "rollout.max_restarts", error)
