"""The handle on the learner, of one rank and of several, with plain async objects in their place."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from align.data.types import Prompt, Ticket
from align.metrics import Metric
from cluster.faults import ActorLost, RunError
from cluster.fleet import learner as learner_module
from cluster.fleet.learner import Deadlines, LearnerHandle
from cluster.loop.rollout import Rollout
from tests.fakes.ray_actors import DEAD, SHORT, FakeActor, Method, complete, failed_task, fails, gives, never

TICKET = Ticket(5, Prompt("p", "prompt", (1, 2)), (7,))
ROLLOUT = Rollout(TICKET, oldest_version=3, num_tokens=9, num_stopped=1, payload="group 5")


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
    other = FakeActor(help_gather=method("1 help_gather"), canary=method("1 canary", [[0.5]]))

    async def scenario() -> None:
        published = await learner_of(first, other).export([[1, 2]])
        assert (published.version, published.num_bytes, published.canary) == (3, 12, [[0.5]])

    complete(scenario())
    assert [c for c in calls if c[0] == "0"] == ["0 export", "0 canary"]
    assert [c for c in calls if c[0] == "1"] == ["1 help_gather", "1 canary"]


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
    monkeypatch.setattr(learner_module, "_CAUSE_S", SHORT)
    broken = fails(failed_task(ZeroDivisionError("a bug")))

    async def scenario() -> None:
        with pytest.raises(RunError, match="learner 1 failed during update of step 4"):
            await learner_of(FakeActor(update=never), FakeActor(update=broken)).update([ROLLOUT], step=4)

    complete(scenario())
