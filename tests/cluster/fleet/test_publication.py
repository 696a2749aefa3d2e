"""Publication with the real handles on fake actors: no Ray, no vLLM. `FakeEngine` holds what an engine may never do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from align.metrics import Metric
from cluster.actors.rollout import RolloutConfig
from cluster.actors.weights import Link, WeightsConfig
from cluster.faults import ActorLost, RestartBudgetSpent, WrongWeights
from cluster.fleet.canary import Canary
from cluster.fleet.learner import Deadlines, LearnerHandle
from cluster.fleet.publication import FleetHandle
from cluster.fleet.rollout import RolloutHandle
from tests.fakes.ray_actors import FakeActor

CANARY = [[1, 2, 3]]
LINK = Link("nccl", workers_per_engine=1, packed_buffer_bytes=1 << 20, deadline_s=5)
TRANSPORTS = pytest.mark.parametrize("link", [None, LINK], ids=["object_store", "nccl"])


def logprobs_of(version: int) -> list[list[float]]:
    """Different for every version, far above the canary's limits."""
    return [[-1.0 - version, -2.0]]


@dataclass(eq=False)
class FakeEngine:
    """A rollout actor whose engine may only run while its weights are those of one version.

    Attributes:
        fails_in: Method in which the actor dies.
        hangs_in: Method that never answers.
        damage: Whether other bytes arrive than were sent.
        gap: What its canary is off by.
    """

    rank: int
    fails_in: str = ""
    hangs_in: str = ""
    damage: bool = False
    gap: float = 0.0
    version: int = -1
    arrived: int | None = None
    runs: bool = True
    whole: bool = True
    killed: bool = False

    async def step(self, method: str) -> None:
        await asyncio.sleep(0)
        if self.killed or self.fails_in == method:
            self.killed = True
            raise ActorLost("rollout", self.rank, method, "died")
        if self.hangs_in == method:
            await asyncio.Event().wait()

    async def ready(self) -> int:
        await self.step("ready")
        return self.rank

    async def load(self, exported: int) -> int:
        exported = await exported if isinstance(exported, asyncio.Future) else exported
        await self.step("load")
        self.version = exported
        return self.version

    async def begin(self) -> None:
        await self.step("begin")
        self.runs = False

    async def receive(self, version: int) -> None:
        assert not self.runs, "an engine that runs on half-built layers dies"
        self.whole = False
        await self.step("receive")
        self.arrived = version

    async def commit(self, version: int, fingerprint: str) -> int:
        await self.step("commit")
        if self.damage or f"fingerprint of {self.arrived}" != fingerprint:
            raise WrongWeights("other bytes arrived")
        self.version, self.whole, self.runs = version, True, True
        return self.version

    async def abandon_update(self) -> bool:
        await self.step("abandon_update")
        self.runs = self.whole
        return self.whole

    async def canary(self, sequences: list[list[int]]) -> list[list[float]]:
        await self.step("canary")
        assert self.runs and self.whole
        return [[value + self.gap for value in row] for row in logprobs_of(self.version)]

    async def usage(self) -> tuple[float, float]:
        await self.step("usage")
        return 1.0, 4.0


@dataclass(eq=False)
class FakeLearner:
    """A learner actor that does one thing after the other, in the order of the calls."""

    version: int = 0
    group: list[FakeEngine] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    dies: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    busy: asyncio.Event = field(default_factory=asyncio.Event)

    async def update(self, finish: asyncio.Event) -> None:
        async with self.turn:
            await finish.wait()
            self.version += 1

    async def export(self) -> tuple[int, tuple[int, int]]:
        async with self.turn:
            return self.version, (100, self.version)

    async def connect(self, engines: Mapping[int, FakeActor], link: Link) -> None:
        async with self.turn:
            self.busy.set()
            self.group = []
            for engine in engines.values():
                await engine.subject.step("ready")
            self.group = [engine.subject for engine in engines.values()]
            self.groups.append(list(engines))

    async def send(self) -> tuple[str, int, int]:
        async with self.turn:
            if self.dies:
                raise ActorLost("learner", 0, "send", "died")
            for engine in self.group:
                await engine.begin()
            for engine in self.group:
                await engine.receive(self.version)
            return f"fingerprint of {self.version}", 100, self.version

    async def canary(self, sequences: list[list[int]]) -> list[list[float]]:
        async with self.turn:
            return logprobs_of(self.version)


class World:
    """A fleet of fakes.

    Args:
        engines: That serve from the start.
        link: None for the object store.
        spares: Engines that replacements get, in this order.
    """

    def __init__(self, engines: list[FakeEngine], link: Link | None, spares: list[FakeEngine] | None = None) -> None:
        self.learner = FakeLearner()
        self.warnings: list[str] = []
        self.spares = list(spares or [])
        cfg = RolloutConfig(num_actors=len(engines), max_restarts=2, load_deadline_s=0.2, start_deadline_s=1)
        self.learner_handle = LearnerHandle(FakeActor(self.learner), Deadlines(1, 1, 1))
        self.fleet = FleetHandle(
            [RolloutHandle(FakeActor(engine), engine.rank, cfg, 4) for engine in engines],
            lambda rank: FakeActor(self.spares.pop(0)),
            self.learner_handle,
            cfg,
            Canary(CANARY, WeightsConfig().canary_limits("float32"), self.warnings.append),
            link,
            self.warnings.append,
        )

    def serving(self) -> list[int | None]:
        """Version that each actor of the fleet serves; None for one that is lost."""
        return [None if a.lost else a.actor.subject.version for a in self.fleet.actors]

    async def replace(self, rank: int) -> None:
        handle = next(a for a in self.fleet.actors if a.rank == rank)
        await self.fleet.replace(handle, handle.lost or ActorLost("rollout", rank, "rollout", "died"))


@pytest.fixture(autouse=True)
def kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's kill, for the fakes."""
    monkeypatch.setattr(
        "cluster.fleet.handle.ray.kill", lambda actor, no_restart: setattr(actor.subject, "killed", True)
    )


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
