"""Plain async fakes at the endpoints of the loop: no Ray, no clock, every interleaving chosen by the test."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from align.data.curriculum import CurriculumConfig
from align.data.prompts import PromptStream
from align.data.types import Prompt, Ticket
from align.metrics import Metric, reduce
from cluster.faults import ActorLost, RestartBudgetSpent
from cluster.loop.buffer import Buffer
from cluster.loop.fate import Fate, settled_before
from cluster.loop.filtering import Filter, FilterConfig
from cluster.loop.goodput import Goodput
from cluster.loop.ledger import Ledger
from cluster.loop.loop import Run, run_loop
from cluster.loop.quarantine import Failure, Quarantine, QuarantineConfig
from cluster.loop.rollout import Rollout

PROMPTS = [Prompt(f"p{number}", f"prompt {number}", (1, 2)) for number in range(5)]
GROUP_SIZE = 2


@dataclass
class World:
    """What the fakes share.

    Attributes:
        pace: Turns of the event loop that a piece of work takes, by what it is; `None` decides by dice.
        dice: Decides them.
        hooks: Called in the middle of "rollout", "score", "update", "publish", "replace" and "after_step" with what the
            work is about; may raise or wait.
        reported: Oldest version that is reported for a ticket, where it is not the true one.
        outcomes: Outcomes of the group of a ticket.
        failures: Failures of the reward on the group of a ticket.
        skips: Steps whose update is not finite.
        masked: Tokens that every update masks.
        reference: Policy version that the scorers' reference has.
        log: What happened, in order.
    """

    pace: dict[str, int] = field(default_factory=dict)
    dice: random.Random | None = None
    hooks: dict[str, Callable[[Any], Awaitable[None]]] = field(default_factory=dict)
    reported: dict[int, int] = field(default_factory=dict)
    outcomes: Callable[[Ticket], tuple[float, ...]] = lambda _: (0.0, 1.0)
    failures: Callable[[Ticket], tuple[Failure, ...]] = lambda _: ()
    skips: set[int] = field(default_factory=set)
    masked: int = 0
    reference: int = 0
    log: list[tuple[Any, ...]] = field(default_factory=list)

    async def work(self, what: str, about: Any) -> None:
        turns = self.pace.get(what, 1) if self.dice is None else self.dice.randrange(12)
        for _ in range(turns):
            await asyncio.sleep(0)  # lets the others run; no time passes
        if what in self.hooks:
            await self.hooks[what](about)

    def lose(self, rollouts: Collection[int]) -> None:
        """The actors of these rollouts are lost, counted from 0 in the order in which they would be handed over."""
        counted = count()

        async def lose_some(about: tuple[FakeActor, Ticket]) -> None:
            if next(counted) in rollouts:
                raise ActorLost("rollout", about[0].rank, "rollout", "killed by the test")

        self.hooks["rollout"] = lose_some

    def events(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [event for event in self.log if event[0] in kinds]


@dataclass(eq=False)
class FakeActor:
    world: World
    rank: int
    version: int
    max_groups: int = 4

    async def rollout(self, ticket: Ticket) -> Rollout:
        oldest = self.version
        self.world.log.append(("rollout", ticket.number, self.rank))
        await self.world.work("rollout", (self, ticket))
        oldest = self.world.reported.get(ticket.number, oldest)
        self.world.log.append(("handed over", ticket.number))
        return Rollout(ticket, oldest, num_tokens=10 + ticket.number, num_stopped=1, payload=f"group {ticket.number}")


@dataclass
class FakeScorer:
    world: World

    async def score(self, rollout: Rollout) -> Rollout:
        await self.world.work("score", rollout)
        self.world.log.append(("score", rollout.ticket.number, self.world.reference))
        outcomes = self.world.outcomes(rollout.ticket)
        failures = self.world.failures(rollout.ticket)
        outcomes = outcomes[len(failures) :]
        return replace(rollout, scores=f"scores of {rollout.payload}", outcomes=outcomes, failures=failures)

    def end_step(self) -> list[Metric]:
        return []


@dataclass
class FakeFleet:
    world: World
    actors: list[FakeActor]
    version: int
    restarts_left: int = 3

    async def replace(self, lost: Any, error: BaseException) -> FakeActor:
        self.world.log.append(("replace", lost.rank, error))
        if not self.restarts_left:
            raise RestartBudgetSpent(f"{error}; no restart is left")
        self.restarts_left -= 1
        await self.world.work("replace", lost)
        fresh = FakeActor(self.world, lost.rank, self.version, lost.max_groups)
        self.actors[self.actors.index(lost)] = fresh
        return fresh

    async def publish(self, version: int) -> list[Metric]:
        self.version = version  # a replacement that starts now serves it already
        for actor in list(self.actors):  # the others take it up one after the other
            await self.world.work("publish", version)
            actor.version = version
        for actor in self.actors:
            actor.version = version
        self.world.log.append(("published", version))
        return [Metric("weights/version", version)]


@dataclass
class FakeLearner:
    world: World

    async def update(self, rollouts: Sequence[Rollout], step: int) -> list[Metric]:
        assert all(rollout.scores == f"scores of {rollout.payload}" for rollout in rollouts)
        tickets = [rollout.ticket.number for rollout in rollouts]
        staleness = max(step - 1 - rollout.oldest_version for rollout in rollouts)
        self.world.log.append(("update", step, tickets, staleness))
        await self.world.work("update", step)
        judged = [r.num_tokens - sum(failure.num_tokens for failure in r.failures) for r in rollouts]
        trained = 0 if step in self.world.skips else sum(judged) - self.world.masked
        return [Metric("tokens/trained", trained), Metric("tokens/masked", self.world.masked)]


@dataclass
class FakeReference:
    world: World
    every: int

    async def refresh(self, step: int) -> list[Metric]:
        await self.world.work("refresh", step)
        if self.every and step % self.every == 0:
            self.world.reference = step
            self.world.log.append(("refreshed", step))
        return []


@dataclass
class FakeObserver:
    world: World
    metrics: list[dict[str, float]] = field(default_factory=list)

    def after_group(self, rollout: Rollout) -> None:
        self.world.log.append(("after_group", rollout.ticket.number))

    async def after_step(self, step: int, metrics: list[Metric]) -> None:
        self.world.log.append(("after_step", step))
        self.metrics.append(reduce(metrics))
        await self.world.work("after_step", step)


class LoggedBuffer(Buffer[Rollout]):
    """A real buffer that also writes its releases into the log."""

    world: World

    def release(self) -> None:
        self.world.log.append(("release",))
        super().release()


class LoggedPrompts(PromptStream):
    """Real prompts that also write what is given back into the log."""

    world: World

    def give_back(self, tickets: Iterable[Ticket]) -> None:
        tickets = list(tickets)
        self.world.log += [("given back", ticket.number) for ticket in tickets]
        super().give_back(tickets)


def make_run(
    world: World,
    *,
    steps: int = 4,
    groups_per_step: int = 2,
    group_size: int = GROUP_SIZE,
    max_staleness: int = 0,
    num_actors: int = 1,
    max_groups: int = 4,
    restarts: int = 3,
    version: int = 0,
    cursor: int = 0,
    leased: Sequence[int] = (),
    num_trained: int = 0,
    num_filtered: int = 0,
    num_quarantined: int = 0,
    filtering: FilterConfig | None = None,
    filter_state: Mapping[str, Any] | None = None,
    quarantining: QuarantineConfig | None = None,
    quarantine_path: Path = Path(os.devnull),
    quarantine_state: Mapping[str, Any] | None = None,
    goodput: Goodput | None = None,
    refresh_every: int = 0,
) -> Run:
    buffer = LoggedBuffer(groups_per_step, max_staleness)
    buffer.world = world
    actors = [FakeActor(world, rank, version, max_groups) for rank in range(num_actors)]
    filter_ = Filter(filtering or FilterConfig(), groups_per_step, 7, state=filter_state)
    prompts = LoggedPrompts(PROMPTS, group_size, 7, cursor, deque(leased), filter_.visits)
    prompts.world = world
    settled = settled_before(quarantine_state or {}, filter_state or {})
    return Run(
        prompts=prompts,
        buffer=buffer,
        fleet=FakeFleet(world, actors, version, restarts),
        scorer=FakeScorer(world),
        quarantine=Quarantine(quarantining or QuarantineConfig(), quarantine_path, quarantine_state),
        filter=filter_,
        learner=FakeLearner(world),
        reference=FakeReference(world, refresh_every),
        observer=FakeObserver(world),
        ledger=Ledger(num_trained, num_filtered, num_quarantined, goodput, settled),
        max_staleness=max_staleness,
        first_step=version + 1,
        last_step=steps,
    )


EVENTFUL_STEPS, EVENTFUL_GROUP_SIZE = 5, 3
CURRICULUM = CurriculumConfig(low=0.3, high=0.7, newest_weight=0.5, visit_probability=0.3)
"""Of an eventful run."""


def eventful_world(seed: int) -> World:
    """Actors are lost, groups have no signal, rewards fail and updates are skipped, all by dice."""
    dice = random.Random(seed)

    def outcomes(ticket: Ticket) -> tuple[float, ...]:
        given = random.Random(f"outcomes {seed} {ticket.number}")
        return given.choice([(0.0, 0.6, 1.0), (1.0, 0.0, 0.2), (1.0,) * 3, (0.0,) * 3])

    def failures(ticket: Ticket) -> tuple[Failure, ...]:
        num = random.Random(f"failures {seed} {ticket.number}").choice((0, 0, 0, 1, 2, 3))
        return (Failure(ticket.number, ticket.prompt.id, "", "", 0, 3, "a traceback"),) * num

    world = World(dice=random.Random(seed), outcomes=outcomes, failures=failures, masked=2)
    world.lose({dice.randrange(30) for _ in range(3)})
    world.skips = {dice.randint(1, EVENTFUL_STEPS)}
    return world


def eventful(seed: int, max_staleness: int, **more: Any) -> Run:
    """A run of an eventful world with all that can keep a group from training."""
    return make_run(
        eventful_world(seed),
        steps=EVENTFUL_STEPS,
        group_size=EVENTFUL_GROUP_SIZE,
        num_actors=2,
        restarts=9,
        max_staleness=max_staleness,
        filtering=FilterConfig(drop_without_signal=True, max_dropped_batches=50, curriculum=CURRICULUM),
        quarantining=QuarantineConfig(max_fraction=0.99, window=20),
        **more,
    )


def saved(run: Run, version: int) -> dict[str, Any]:
    """What a checkpoint keeps of a run that has ended, as `make_run` takes it up again; through JSON, as a file would."""
    state = {
        "version": version,
        "cursor": run.prompts.cursor,
        "leased": sorted([*run.prompts.returned, *run.ledger.in_flight]),
        "num_trained": run.ledger.num[Fate.TRAINED],
        "num_filtered": run.ledger.num[Fate.FILTERED],
        "num_quarantined": run.ledger.num[Fate.QUARANTINED],
        "quarantine_state": run.quarantine.state(run.ledger.settled),
        "filter_state": run.filter.state(run.ledger.settled),
    }
    return dict(json.loads(json.dumps(state)))


def complete(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a scenario; it must end in time and leave no task behind."""

    async def bounded() -> Any:
        try:
            async with asyncio.timeout(5):
                return await work
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks were left behind"

    return asyncio.run(bounded())


def trained(world: World) -> list[list[int]]:
    return [tickets for _, _, tickets, _ in world.events("update")]


def flat(lists: list[list[Any]]) -> list[Any]:
    return [item for items in lists for item in items]


def largest_staleness(world: World) -> int:
    return max(staleness for *_, staleness in world.events("update"))


def run_and_act(world: World, run: Run, turns: int, act: Callable[[asyncio.Task[int]], None]) -> int | None:
    """Run, and act after some turns of the event loop; the last step, or None if the run was cancelled."""

    async def scenario() -> int | None:
        loop = asyncio.ensure_future(run_loop(run))
        for _ in range(turns):
            await asyncio.sleep(0)
        act(loop)
        try:
            return await loop
        except asyncio.CancelledError:
            return None

    result: int | None = complete(scenario())
    return result
