"""Handles on Ray actors, with plain async objects in their place: deadlines, named errors, restarts of scorers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

import cluster.fleet.learner
from align.data.types import Prompt, Ticket
from align.metrics import Metric, reduce
from cluster.actors.rollout import GroupSummary, RolloutConfig
from cluster.actors.scorer import ScorerConfig, Verdict
from cluster.faults import ActorLost, RestartBudgetSpent, RunError, TrainingDiverged, WrongWeights
from cluster.fleet.learner import Deadlines, Handle, LearnerHandle, RolloutHandle, spend
from cluster.fleet.scorers import ScorerHandle, ScorerPool
from cluster.loop.loop import Rollout
from cluster.record.trace import Span

TICKET = Ticket(5, Prompt("p", "prompt", (1, 2)), (7,))
ROLLOUT = Rollout(TICKET, oldest_version=3, num_tokens=9, num_stopped=1, payload="group 5")
SPAN = Span("rollout", 0, 1.0, 2.0)
SHORT = 0.02  # seconds; a deadline that passes in a test
Method = Callable[..., Awaitable[Any]]


class FakeMethod:
    """`actor.method`, with `remote` and `options` as Ray's."""

    def __init__(self, method: Method, num_returns: int = 1) -> None:
        self.method, self.num_returns = method, num_returns

    def options(self, num_returns: int) -> FakeMethod:
        return FakeMethod(self.method, num_returns)

    def remote(self, *arguments: Any) -> Any:
        answer = asyncio.ensure_future(self.method(*arguments))
        if self.num_returns == 1:
            return answer

        async def part(number: int) -> Any:
            return (await answer)[number]

        return [asyncio.ensure_future(part(number)) for number in range(self.num_returns)]


class FakeActor:
    """In place of Ray's handle: its methods are the async functions that it is given."""

    def __init__(self, **methods: Method) -> None:
        for name, method in methods.items():
            setattr(self, name, FakeMethod(method))


def gives(value: Any) -> Method:
    async def method(*arguments: Any) -> Any:
        return value

    return method


def fails(error: BaseException) -> Method:
    async def method(*arguments: Any) -> Any:
        raise error

    return method


async def never(*arguments: Any) -> None:
    await asyncio.Event().wait()


def failed_task(cause: Exception) -> BaseException:
    """What Ray raises for work that raised `cause`: an error of both types."""
    trace = f"Traceback (most recent call last):\n  File ...\n{cause!r}"
    error: BaseException = RayTaskError("method", trace, cause).as_instanceof_cause()
    return error


def complete(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


@pytest.fixture(autouse=True)
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed; Ray is not running."""
    actors: list[Any] = []
    monkeypatch.setattr(cluster.fleet.learner.ray, "kill", lambda actor, no_restart: actors.append(actor))
    return actors


# --- one answer ---------------------------------------------------------------------------------------------------


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


# --- rollout actor ------------------------------------------------------------------------------------------------


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


# --- learner ------------------------------------------------------------------------------------------------------


def learner(**methods: Method) -> LearnerHandle:
    return LearnerHandle(FakeActor(**methods), Deadlines(start_s=SHORT, update_s=SHORT, save_s=5))


def test_an_update_gets_all_groups_and_then_all_scores() -> None:
    calls: list[tuple[Any, ...]] = []

    async def update(*arguments: Any) -> list[Metric]:
        calls.append(arguments)
        return [Metric("optimizer/loss", 1.0)]

    async def scenario() -> list[Metric]:
        rollouts = [Rollout(TICKET, 0, 1, 1, f"group {i}", f"scores {i}") for i in range(2)]
        return await learner(update=update).update(rollouts, step=4)

    assert complete(scenario()) == [Metric("optimizer/loss", 1.0)]
    assert calls == [(4, "group 0", "group 1", "scores 0", "scores 1")]


def test_a_learner_that_hangs_is_named_with_its_step() -> None:
    async def scenario() -> None:
        with pytest.raises(ActorLost, match="learner 0 was lost during update of step 4: no answer within"):
            await learner(update=never).update([ROLLOUT], step=4)
        with pytest.raises(ActorLost, match="learner 0 was lost during start"):
            await learner(ready=never).ready()

    complete(scenario())


def test_a_reference_is_written_and_its_fingerprint_comes_back() -> None:
    written: list[Path] = []

    async def write(folder: Path) -> None:
        written.append(folder)

    async def scenario() -> None:
        one = learner(export_policy=write, fingerprint=gives("abc"))
        assert await one.export_reference(Path("reference")) == "abc"
        with pytest.raises(ActorLost, match="learner 0 was lost during export of the reference"):
            await learner(export_policy=fails(DEAD), fingerprint=gives("abc")).export_reference(Path("reference"))

    complete(scenario())
    assert written == [Path("reference")]


# --- a learner of several ranks -------------------------------------------------------------------------------------


def learner_of(*ranks: FakeActor) -> LearnerHandle:
    return LearnerHandle(ranks[0], Deadlines(start_s=5, update_s=5, save_s=5), ranks[1:])


def test_all_ranks_meet_where_the_first_waits() -> None:
    met: list[tuple[int, Any]] = []

    def rank(number: int) -> FakeActor:
        async def join(meeting: Any) -> None:
            met.append((number, await meeting))

        return FakeActor(host=gives("a place"), join=join)

    async def scenario() -> None:
        await learner_of(rank(0), rank(1), rank(2)).ready()

    complete(scenario())
    assert met == [(0, "a place"), (1, "a place"), (2, "a place")]


def test_an_update_is_over_when_the_last_rank_is_done_and_the_first_one_answers() -> None:
    async def scenario() -> None:
        calls: list[tuple[Any, ...]] = []
        last = asyncio.Event()

        async def first_rank(*arguments: Any) -> list[Metric]:
            calls.append(arguments)
            return [Metric("optimizer/loss", 1.0)]

        async def last_rank(*arguments: Any) -> list[Metric]:
            calls.append(arguments)
            await last.wait()
            return [Metric("optimizer/loss", 2.0)]

        updating = asyncio.ensure_future(
            learner_of(FakeActor(update=first_rank), FakeActor(update=last_rank)).update([ROLLOUT], step=4)
        )
        for _ in range(5):
            await asyncio.sleep(0)
        assert calls == [(4, "group 5", None)] * 2, "every rank gets the whole batch"
        assert not updating.done()
        last.set()
        assert await updating == [Metric("optimizer/loss", 1.0)]

    complete(scenario())


def test_the_others_follow_what_the_first_exports_before_any_later_call() -> None:
    calls: list[str] = []

    def method(name: str, value: Any = None) -> Method:
        async def call(*arguments: Any) -> Any:
            calls.append(name)
            return value

        return call

    first = FakeActor(export=method("0 export", ("weights", (12, 3))), canary=method("0 canary", [[0.5]]))
    other = FakeActor(follow=method("1 follow"), canary=method("1 canary", [[0.5]]))

    async def scenario() -> None:
        published = await learner_of(first, other).export([[1, 2]])
        assert (published.version, published.num_bytes, published.canary) == (3, 12, [[0.5]])

    complete(scenario())
    assert [c for c in calls if c[0] == "0"] == ["0 export", "0 canary"]
    assert [c for c in calls if c[0] == "1"] == ["1 follow", "1 canary"]


def test_the_loss_of_one_rank_is_that_of_the_learner_though_another_one_complains_first() -> None:
    async def dies_later(*arguments: Any) -> None:
        await asyncio.sleep(SHORT)
        raise ActorDiedError

    complains = fails(failed_task(RuntimeError("connection closed by peer")))

    async def scenario() -> None:
        with pytest.raises(ActorLost, match="learner 1 was lost during update of step 4"):
            await learner_of(FakeActor(update=complains), FakeActor(update=dies_later)).update([ROLLOUT], step=4)

    complete(scenario())


def test_a_rank_that_fails_ends_the_wait_for_one_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.fleet.learner, "_CAUSE_S", SHORT)
    broken = fails(failed_task(ZeroDivisionError("a bug")))

    async def scenario() -> None:
        with pytest.raises(RunError, match="learner 1 failed during update of step 4"):
            await learner_of(FakeActor(update=never), FakeActor(update=broken)).update([ROLLOUT], step=4)

    complete(scenario())


# --- scorers ------------------------------------------------------------------------------------------------------


class Scorers:
    """Makes fake scorers; `scripts` says what each new one of a rank does, the last one from then on."""

    def __init__(self, **scripts: Method) -> None:
        self.made: list[FakeActor] = []
        self.warnings: list[str] = []
        self.ready = scripts.get("ready", gives(None))
        self.score = scripts.get("score", gives(("scores", Verdict((0.5,)))))

    def create(self, rank: int) -> FakeActor:
        self.made.append(FakeActor(ready=self.ready, score=self.score))
        return self.made[-1]


def pool(first: list[FakeActor], replacements: Scorers, max_restarts: int = 3, deadline_s: float = 5) -> ScorerPool:
    cfg = ScorerConfig(score_deadline_s=deadline_s, start_deadline_s=deadline_s)
    handles = [ScorerHandle(actor, rank, cfg) for rank, actor in enumerate(first)]
    return ScorerPool(handles, replacements.create, max_restarts, replacements.warnings.append)


DEAD = ActorDiedError()


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
