"""Handles on scorers, with plain async objects in their place: turns, losses, restarts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from align.metrics import reduce
from cluster.actors.scorer import ScorerConfig, Verdict
from cluster.faults import RestartBudgetSpent, RunError
from cluster.fleet.scorers import ScorerHandle, ScorerPool
from cluster.loop.span import Span
from tests.fakes.ray_actors import DEAD, SHORT, FakeActor, Method, complete, failed_task, fails, gives, never
from tests.fakes.scorers import ROLLOUT, TICKET, Scorers, pool

SPAN = Span("rollout", 0, 1.0, 2.0)


def test_scorers_take_turns() -> None:
    asked: list[int] = []

    def scorer(rank: int) -> FakeActor:
        async def score(payload: Any) -> tuple[str, Verdict]:
            asked.append(rank)
            return f"scores of {payload} by {rank}", Verdict((rank / 2,))

        return FakeActor(score=score)

    async def scenario() -> None:
        scorers = pool([scorer(0), scorer(1), scorer(2)], Scorers())
        scored = [await scorers.score(ROLLOUT) for _ in range(4)]
        assert asked == [0, 1, 2, 0]
        assert [await one.scores for one in scored] == [f"scores of group 5 by {rank}" for rank in (0, 1, 2, 0)]
        assert [one.outcomes for one in scored] == [(0.0,), (0.5,), (1.0,), (0.0,)]
        assert scored[0].ticket == TICKET

    complete(scenario())


def test_the_idle_share_of_scorers_is_of_the_time_that_they_measured_since_the_last_step() -> None:
    now = [100.0]
    verdict = Verdict((0.5,), began_s=50.0, ended_s=51.5)

    async def scenario() -> None:
        handles = [ScorerHandle(FakeActor(score=gives(("scores", verdict))), rank, ScorerConfig()) for rank in (0, 1)]
        scorers = ScorerPool(handles, Scorers().create, 0, print, lambda: now[0])
        for _ in range(3):
            scored = await scorers.score(replace(ROLLOUT, spans=(SPAN,)))
        now[0] += 10
        assert reduce(scorers.end_step()) == {"idle/scorer_fraction": 1 - 4.5 / 20}
        now[0] += 10
        assert reduce(scorers.end_step()) == {"idle/scorer_fraction": 1}
        assert scored.spans == (SPAN, Span("scorer", 0, 50.0, 51.5))

    complete(scenario())


@pytest.mark.parametrize("score", [fails(DEAD), never], ids=["dead", "frozen"])
def test_a_lost_scorer_is_replaced_and_the_group_is_scored_again(score: Method, killed: list[Any]) -> None:
    async def scenario() -> None:
        lost, replacements = FakeActor(score=score), Scorers()
        scorers = pool([lost], replacements, deadline_s=SHORT)
        scored = await scorers.score(ROLLOUT)
        assert await scored.scores == "scores"
        assert killed == [lost]
        assert scorers.num_restarts == len(replacements.made) == 1
        assert scorers.scorers[0].actor is replacements.made[0]
        (warning,) = replacements.warnings
        assert warning.startswith("scorer 0 was lost during score: ")
        assert warning.endswith("; replacing it (1 of 3 restarts)")
        assert "\n" not in warning

    complete(scenario())


def test_groups_that_meet_the_same_lost_scorer_replace_it_once(killed: list[Any]) -> None:
    async def scenario() -> None:
        lost, replacements = FakeActor(score=fails(DEAD)), Scorers()
        scorers = pool([lost], replacements)
        await asyncio.gather(*(scorers.score(ROLLOUT) for _ in range(5)))
        assert killed == [lost]
        assert scorers.num_restarts == len(replacements.made) == 1

    complete(scenario())


def test_a_replacement_that_does_not_start_is_replaced_too_and_no_rollout_actor_is_blamed(killed: list[Any]) -> None:
    starts = [fails(DEAD), fails(DEAD), gives(None)]

    async def ready() -> None:
        await starts.pop(0)()

    async def scenario() -> None:
        lost, replacements = FakeActor(score=fails(DEAD)), Scorers(ready=ready)
        scorers = pool([lost], replacements, max_restarts=3)
        assert await (await scorers.score(ROLLOUT)).scores == "scores"
        assert scorers.num_restarts == len(replacements.made) == 3
        assert killed == [lost, *replacements.made[:2]]

    complete(scenario())


@pytest.mark.parametrize("broken", ["score", "ready"])
def test_scorers_that_are_lost_again_and_again_end_the_run(broken: str) -> None:
    async def scenario() -> None:
        replacements = Scorers(**{broken: fails(DEAD)})
        scorers = pool([FakeActor(score=fails(DEAD))], replacements, max_restarts=2)
        with pytest.raises(RestartBudgetSpent, match=r"2 of 2 restarts \(scorer.max_restarts\)"):
            await scorers.score(ROLLOUT)
        assert len(replacements.made) == 2

    complete(scenario())


def test_a_bug_in_a_scorer_ends_the_run_without_a_restart(killed: list[Any]) -> None:
    async def scenario() -> None:
        scorers = pool([FakeActor(score=fails(failed_task(ZeroDivisionError("a bug"))))], Scorers())
        with pytest.raises(RunError, match="scorer 0 failed during score"):
            await scorers.score(ROLLOUT)
        assert scorers.num_restarts == 0
        assert killed == []

    complete(scenario())
