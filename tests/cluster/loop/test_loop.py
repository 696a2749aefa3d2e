"""The main loop with plain async fakes at its endpoints: no Ray, no clock, every interleaving chosen by the test."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from align.data.types import Ticket
from cluster.faults import ActorLost, RestartBudgetSpent
from cluster.loop.fate import Fate
from cluster.loop.loop import Run, first_error, run_loop
from tests.fakes.loop import (
    FakeActor,
    World,
    complete,
    flat,
    largest_staleness,
    make_run,
    run_and_act,
    saved,
    trained,
)


async def settle() -> None:
    """Every task runs until it waits for something that only the test can do."""
    for _ in range(100):
        await asyncio.sleep(0)


def assert_adds_up(run: Run) -> None:
    """Every ticket below the cursor was trained, was given back, or is in flight; and only one of the three."""
    run.ledger.metrics()
    fates = [*flat(trained(run.fleet.world)), *run.prompts.returned, *run.ledger.in_flight]  # type: ignore[attr-defined]
    assert sorted(fates) == list(range(run.prompts.cursor))


# --- a run without trouble ---------------------------------------------------------------------------------------


def test_a_run_trains_every_step_and_returns_the_last() -> None:
    world = World()
    run = make_run(world, steps=4, groups_per_step=2)
    assert complete(run_loop(run)) == 4
    assert trained(world) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert_adds_up(run)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_each_step_is_updated_then_published_then_released_then_observed(max_staleness: int) -> None:
    world = World(dice=random.Random(1))
    complete(run_loop(make_run(world, steps=3, max_staleness=max_staleness)))
    kinds = [(kind, *rest[:1]) for kind, *rest in world.events("update", "published", "release", "after_step")]
    step = [[("update", k), ("published", k), ("release",), ("after_step", k)] for k in (1, 2, 3)]
    assert kinds == flat(step)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_slot_is_free_before_the_version_is_published(max_staleness: int) -> None:
    async def scenario() -> None:
        world, gate = World(), asyncio.Event()

        async def wait_at_the_gate(version: int) -> None:
            await gate.wait()

        world.hooks["publish"] = wait_at_the_gate
        run = make_run(world, steps=1, groups_per_step=2, max_staleness=max_staleness, max_groups=100)
        slots = (max_staleness + 1) * 2
        loop = asyncio.ensure_future(run_loop(run))
        await settle()
        assert len(world.events("update")) == 1
        assert len(world.events("rollout")) == slots, "all slots are used, and no more"
        assert run.buffer.num_free == 0, "the taken groups keep their slots while their version is on its way"
        assert run.ledger.num[Fate.TRAINED] == 0
        gate.set()
        assert await loop == 1
        assert run.ledger.num[Fate.TRAINED] == 2

    complete(scenario())


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_rollouts_of_the_next_step_start_once_the_version_is_published(max_staleness: int) -> None:
    world = World()
    complete(run_loop(make_run(world, steps=5, groups_per_step=2, max_staleness=max_staleness, max_groups=100)))
    slots = (max_staleness + 1) * 2
    num_started = num_published = 0
    for kind, *_ in world.events("rollout", "published"):
        num_started += kind == "rollout"
        num_published += kind == "published"
        assert num_started <= slots + 2 * num_published
    assert num_started >= 5 * 2


def test_a_step_takes_from_the_last_publish_to_this_one_whatever_lay_in_between() -> None:
    """The evaluation after step 1, while the actors already sample for step 2, is a part of step 2."""
    pause_s = 0.5  # longer than a step, however busy the machine is

    async def evaluate(step: int) -> None:
        if step == 1:
            await asyncio.sleep(pause_s)

    run = make_run(World(hooks={"after_step": evaluate}), steps=2, groups_per_step=2)
    started = time.perf_counter()
    complete(run_loop(run))
    elapsed_s = time.perf_counter() - started
    first, second = run.observer.metrics  # type: ignore[attr-defined]
    parts = [sum(row[f"time/{part}_s"] for part in ("rollout_wait", "update", "publish")) for row in (first, second)]
    assert parts[0] <= first["time/step_s"] < pause_s
    assert parts[1] + pause_s <= second["time/step_s"]
    assert first["time/step_s"] + second["time/step_s"] <= elapsed_s
    for row in (first, second):
        expected = row["tokens/generated"] / row["time/step_s"]
        assert row["throughput/generated_tokens_per_s"] == pytest.approx(expected, rel=1e-6)


# --- any order ---------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, phases=[Phase.generate])  # shrinking runs that hang would take minutes
@given(
    seed=st.integers(0, 2**32),
    max_staleness=st.sampled_from([0, 1, 3]),
    groups_per_step=st.integers(1, 4),
    num_actors=st.integers(1, 3),
    max_groups=st.integers(1, 8),
    losses=st.sets(st.integers(0, 30), max_size=4),
)
def test_no_interleaving_and_no_loss_exceeds_the_limit_or_trains_a_prompt_twice(
    seed: int, max_staleness: int, groups_per_step: int, num_actors: int, max_groups: int, losses: set[int]
) -> None:
    world = World(dice=random.Random(seed))
    world.lose(losses)
    run = make_run(
        world,
        steps=6,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        num_actors=num_actors,
        max_groups=max_groups,
        restarts=len(losses),
    )
    assert complete(run_loop(run)) == 6
    assert largest_staleness(world) <= max_staleness
    numbers = flat(trained(world))
    assert len(numbers) == len(set(numbers)) == 6 * groups_per_step
    assert_adds_up(run)
    if max_staleness == 0:
        in_order = [list(range(k * groups_per_step, (k + 1) * groups_per_step)) for k in range(6)]
        assert trained(world) == in_order, "on-policy batches are the same whatever the order of completion"


# --- on-policy batches -------------------------------------------------------------------------------------------


def test_an_on_policy_batch_comes_in_the_order_of_tickets_though_it_completes_in_reverse() -> None:
    async def scenario() -> World:
        world = World()
        done: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

        async def after_the_next_one(about: tuple[FakeActor, Ticket]) -> None:
            number = about[1].number
            if number % 4 != 3:
                await done[number + 1].wait()
            done[number].set()

        world.hooks["rollout"] = after_the_next_one
        await run_loop(make_run(world, steps=3, groups_per_step=4))
        return world

    assert trained(complete(scenario())) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


# --- lost actors -------------------------------------------------------------------------------------------------


def lose_once(world: World, number: int) -> None:
    """The actor that rolls ticket `number` out is lost, the first time."""
    lost: list[int] = []

    async def lose(about: tuple[FakeActor, Ticket]) -> None:
        if about[1].number == number and not lost:
            lost.append(number)
            raise ActorLost("rollout", about[0].rank, "rollout", "killed by the test")

    world.hooks["rollout"] = lose


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("num_actors", [1, 2])
def test_after_a_loss_the_actor_is_replaced_and_every_prompt_is_trained_once(
    num_actors: int, max_staleness: int
) -> None:
    world = World()
    lose_once(world, 3)
    run = make_run(world, steps=5, max_staleness=max_staleness, num_actors=num_actors)
    assert complete(run_loop(run)) == 5
    assert len(world.events("replace")) == 1
    numbers = sorted(flat(trained(world)))
    assert numbers == list(range(10))
    assert run.ledger.num[Fate.RETURNED] >= 1
    assert_adds_up(run)


def test_prompts_of_a_lost_actor_go_out_again_before_any_new_one() -> None:
    world = World(pace={"rollout": 3, "score": 9})
    lose_once(world, 0)
    complete(run_loop(make_run(world, steps=3, groups_per_step=3, max_groups=3)))
    assert [number for _, number, _ in world.events("rollout")][:9] == [0, 1, 2, 0, 1, 2, 3, 4, 5]


def test_a_loss_cancels_the_slots_of_the_lost_actor_and_leaves_those_of_others() -> None:
    async def scenario() -> None:
        world, gate = World(), asyncio.Event()

        async def first_actor_is_lost(about: tuple[FakeActor, Ticket]) -> None:
            if about[0].rank == 0:
                raise ActorLost("rollout", 0, "rollout", "killed by the test")
            await gate.wait()

        async def wait_at_the_gate(lost: FakeActor) -> None:
            await gate.wait()

        world.hooks |= {"rollout": first_actor_is_lost, "replace": wait_at_the_gate}
        run = make_run(world, steps=1, groups_per_step=4, num_actors=2, max_groups=2)
        loop = asyncio.ensure_future(run_loop(run))
        await settle()
        assert run.buffer.num_free == 2, "of four slots two are free again"
        assert len(run.ledger.in_flight) == len(run.prompts.returned) == run.ledger.num[Fate.RETURNED] == 2
        del world.hooks["rollout"]
        gate.set()
        assert await loop == 1
        assert trained(world) == [[0, 1, 2, 3]]

    complete(scenario())


def test_a_lost_actor_does_not_disturb_the_groups_of_another_one() -> None:
    world = World(pace={"rollout": 5})
    lose_once(world, 0)
    complete(run_loop(make_run(world, steps=2, groups_per_step=4, num_actors=2, max_groups=2)))
    starts = [(number, rank) for _, number, rank in world.events("rollout")]
    other = {number for number, rank in starts[:4] if rank == 1}
    assert len(other) == 2
    assert [number for number, _ in starts if number in other] == sorted(other), "each was rolled out once"


def test_a_spent_restart_budget_ends_the_run_with_that_error() -> None:
    world = World()

    async def always_lost(about: tuple[FakeActor, Ticket]) -> None:
        raise ActorLost("rollout", about[0].rank, "rollout", "killed by the test")

    world.hooks["rollout"] = always_lost
    run = make_run(world, restarts=2)
    with pytest.raises(RestartBudgetSpent, match="killed by the test"):
        complete(run_loop(run))
    assert len(world.events("replace")) == 3
    assert_adds_up(run)


# --- bugs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rollout", "score", "update", "publish", "after_step"])
@pytest.mark.parametrize("num_actors", [1, 3])
def test_a_bug_anywhere_ends_the_run_with_its_own_error(place: str, num_actors: int) -> None:
    world = World(dice=random.Random(3))
    num_calls = 0

    async def fail_at_the_third(about: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise ZeroDivisionError(f"a bug in {place}")

    world.hooks[place] = fail_at_the_third
    run = make_run(world, steps=9, max_staleness=1, num_actors=num_actors)
    with pytest.raises(ZeroDivisionError, match=f"a bug in {place}"):
        complete(run_loop(run))
    run.ledger.metrics()


def test_a_bug_beside_a_lost_actor_is_not_hidden_by_the_loss() -> None:
    world = World()

    async def fail(about: tuple[FakeActor, Ticket]) -> None:
        if about[1].number == 0:
            raise ActorLost("rollout", 0, "rollout", "killed by the test")
        raise ZeroDivisionError("a bug")

    world.hooks["rollout"] = fail
    with pytest.raises(ZeroDivisionError):
        complete(run_loop(make_run(world)))


def test_a_bug_while_an_actor_is_replaced_ends_the_run() -> None:
    world = World()
    lose_once(world, 1)

    async def fail(lost: FakeActor) -> None:
        raise ZeroDivisionError("a bug in replace")

    world.hooks["replace"] = fail
    with pytest.raises(ZeroDivisionError, match="a bug in replace"):
        complete(run_loop(make_run(world)))


def test_the_first_error_is_the_cause_inside_nested_groups() -> None:
    cause, consequence = ZeroDivisionError("cause"), ActorLost("rollout", 0, "rollout", "consequence")
    nested = BaseExceptionGroup("", [BaseExceptionGroup("", [cause]), consequence])
    assert first_error(nested) is cause


# --- stop, cancel, resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_run_that_is_stopped_anywhere_and_resumed_trains_every_prompt_once(max_staleness: int) -> None:
    steps, groups = 4, 2
    ends = set()
    for turns in range(200):
        world = World(dice=random.Random(turns), hooks={})
        if turns % 2:
            lose_once(world, 2)
        run = make_run(world, steps=steps, max_staleness=max_staleness, num_actors=2, max_groups=2)
        last = run_and_act(world, run, turns, lambda _, run=run: run.stop.set())  # type: ignore[misc]
        assert last == len(world.events("published")), "the last step that was trained and published"
        assert_adds_up(run)
        ends.add(last)

        leased = sorted({*run.prompts.returned, *run.ledger.in_flight})
        world_2 = World(dice=random.Random(turns + 1))
        resumed = make_run(
            world_2,
            steps=steps,
            max_staleness=max_staleness,
            num_actors=2,
            max_groups=2,
            **saved(run, last),
        )
        assert complete(run_loop(resumed)) == steps
        assert [event[1] for event in world_2.events("update")] == list(range(last + 1, steps + 1))
        if last < steps:
            starts = [number for _, number, _ in world_2.events("rollout")]
            assert starts[: len(leased)] == leased, "leased tickets go out first"
        numbers = flat(trained(world) + trained(world_2))
        assert len(numbers) == len(set(numbers)) == steps * groups
        assert resumed.ledger.num[Fate.TRAINED] == steps * groups
        fates = [*numbers, *resumed.prompts.returned, *resumed.ledger.in_flight]
        assert sorted(fates) == list(range(resumed.prompts.cursor)), "no ticket is lost between the two runs"
        if max_staleness == 0:
            assert trained(world) + trained(world_2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ends == set(range(steps + 1)), "the stops fell into every step"


def test_a_run_whose_steps_are_done_trains_nothing_more() -> None:
    world = World()
    assert complete(run_loop(make_run(world, steps=4, version=4, cursor=8, num_trained=8))) == 4
    assert not world.events("update")


def test_a_run_that_is_cancelled_anywhere_leaves_no_task_and_loses_no_prompt() -> None:
    outcomes = set()
    for turns in range(150):
        world = World(dice=random.Random(turns))
        lose_once(world, 3)
        run = make_run(world, steps=4, max_staleness=1, num_actors=2, max_groups=2)
        outcomes.add(run_and_act(world, run, turns, lambda loop: loop.cancel() and None))
        assert_adds_up_after_cancel(run, world)
    assert outcomes == {None, 4}, "cancelled, or done before"


def assert_adds_up_after_cancel(run: Run, world: World) -> None:
    """As `assert_adds_up`; the batch of an update that was cut short is still in flight."""
    run.ledger.metrics()
    done = run.ledger.num[Fate.TRAINED] // run.buffer.groups_per_step
    fates = [*flat(trained(world)[:done]), *run.prompts.returned, *run.ledger.in_flight]
    assert sorted(fates) == list(range(run.prompts.cursor))


def test_a_cancel_in_the_turn_of_a_loss_is_a_cancel() -> None:
    async def scenario() -> None:
        world = World()
        loops: list[asyncio.Task[int]] = []

        async def lose_and_cancel(about: tuple[FakeActor, Ticket]) -> None:
            loops[0].cancel()
            raise ActorLost("rollout", 0, "rollout", "killed by the test")

        world.hooks["rollout"] = lose_and_cancel
        loops.append(asyncio.ensure_future(run_loop(make_run(world))))
        with pytest.raises(asyncio.CancelledError):
            await loops[0]
        assert not world.events("replace")

    complete(scenario())


def test_a_stop_ends_the_step_in_progress_first() -> None:
    world = World()
    run = make_run(world, steps=9)

    async def stop_in_the_second_update(step: int) -> None:
        if step == 2:
            run.stop.set()

    world.hooks["update"] = stop_in_the_second_update
    assert complete(run_loop(run)) == 2
    assert world.events("published", "after_step")[-2:] == [("published", 2), ("after_step", 2)]
