"""A fleet of fakes behind the real handles: no Ray, no vLLM. `FakeEngine` holds what an engine may never do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.actors.rollout import RolloutConfig
from cluster.actors.weights import Link, WeightsConfig
from cluster.faults import ActorLost, WrongWeights
from cluster.fleet.canary import Canary
from cluster.fleet.learner import Deadlines, LearnerHandle
from cluster.fleet.publication import FleetHandle
from cluster.fleet.rollout import RolloutHandle
from tests.fakes.ray_actors import FakeActor

CANARY = [[1, 2, 3]]
LINK = Link("nccl", workers_per_engine=1, packed_buffer_bytes=1 << 20, deadline_s=5)


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
