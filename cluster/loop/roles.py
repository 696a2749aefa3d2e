"""The roles that the loop drives: who samples, who judges, who updates, who looks on. What plays them is above this room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from align.data.types import Ticket
from align.metrics import Metric
from cluster.loop.rollout import Rollout


class RolloutActor(Protocol):
    """One process that samples."""

    max_groups: int

    async def rollout(self, ticket: Ticket) -> Rollout:
        """Sample one group. Raises ActorLost."""
        ...


class Scorer(Protocol):
    """The processes that judge."""

    async def score(self, rollout: Rollout) -> Rollout:
        """The same rollout with its rewards and outcomes."""
        ...

    def end_step(self) -> list[Metric]:
        """How much of the time since the last call they worked."""
        ...


class Fleet(Protocol):
    """All rollout actors, and their replacements."""

    @property
    def actors(self) -> Sequence[RolloutActor]:
        """The actors that serve now."""
        ...

    async def replace(self, lost: Any, error: BaseException) -> RolloutActor:
        """A new actor that serves the current version. Raises RestartBudgetSpent."""
        ...

    async def publish(self, version: int) -> list[Metric]:
        """Bring the learner's weights, as `version`, to every actor, verified."""
        ...


class Learner(Protocol):
    """The process that updates."""

    async def update(self, rollouts: Sequence[Rollout], step: int) -> list[Metric]:
        """One optimizer step."""
        ...


class Reference(Protocol):
    """What the policy is compared with."""

    async def refresh(self, step: int) -> list[Metric]:
        """Take the policy's weights after this step, if its turn has come."""
        ...


class Observer(Protocol):
    """What happens beside training: logging, evaluation, checkpoints."""

    def after_group(self, rollout: Rollout) -> None:
        """A group is scored, and its slot filled or given back."""
        ...

    async def after_step(self, step: int, metrics: list[Metric]) -> None:
        """Step is trained and published."""
        ...
