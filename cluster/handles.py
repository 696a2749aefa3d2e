"""Handles on Ray actors: every call has a deadline, and Ray's errors become named ones.

Token arrays stay behind Ray's object references: they go from actor to actor, and this process sees summaries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from align.metrics import Metric
from align.types import Ticket
from cluster.faults import ActorLost, RestartBudgetSpent, WrongWeights, from_ray, reason
from cluster.learning import Answer
from cluster.loop import Rollout
from cluster.rollout import RolloutConfig
from cluster.weights import Link


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Times for the learner's work."""

    start_s: float
    update_s: float
    save_s: float


class Handle:
    """One Ray actor with its role and rank.

    Args:
        actor: Ray's handle.
        role: "rollout", "scorer" or "learner".
        rank: Number within the role.
    """

    def __init__(self, actor: Any, role: str, rank: int) -> None:
        self.actor = actor
        self.role = role
        self.rank = rank

    async def answer(self, reference: Any, phase: str, deadline_s: float) -> Any:
        """The value behind a reference.

        Raises:
            ActorLost: If the actor died, or did not answer within the deadline (a frozen one looks the same).
            RunError: If the work itself failed; a RunError of the actor is raised as it is.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await reference
        except RayError as error:  # first, since a RayTaskError may be a TimeoutError of the work
            raise from_ray(error, self.role, self.rank, phase) from None
        except TimeoutError:
            raise ActorLost(self.role, self.rank, phase, f"no answer within {deadline_s:g} s") from None

    def kill(self) -> None:
        """End the actor's process at once."""
        ray.kill(self.actor, no_restart=True)


class RolloutHandle(Handle):
    """A rollout actor.

    Args:
        actor: Ray's handle.
        rank: Number of the actor.
        cfg: Deadlines.
        max_groups: Groups that may be in flight on it.
    """

    def __init__(self, actor: Any, rank: int, cfg: RolloutConfig, max_groups: int) -> None:
        super().__init__(actor, "rollout", rank)
        self.cfg = cfg
        self.max_groups = max_groups
        self.lost: ActorLost | None = None

    async def ready(self) -> None:
        """Wait until the engine is up."""
        await self.answer(self.actor.ready.remote(), "start", self.cfg.start_deadline_s)

    async def rollout(self, ticket: Ticket) -> Rollout:
        """Sample one group; see `cluster.loop.RolloutActor`."""
        if self.lost:
            raise self.lost
        payload, summary = self.actor.rollout.options(num_returns=2).remote(ticket)
        known = await self.answer(summary, "rollout", self.cfg.rollout_deadline_s)
        return Rollout(ticket, known.oldest_version, known.num_tokens, known.num_stopped, payload)

    async def load(self, weights: Any, version: int) -> None:
        """Serve the exported weights. Raises WrongWeights if the actor then reports another version."""
        await self._serve(self.actor.load.remote(weights), version)

    async def commit(self, version: int, fingerprint: str) -> None:
        """Serve what the learner sent. Raises WrongWeights if something else arrived."""
        await self._serve(self.actor.commit.remote(version, fingerprint), version)

    async def abandon_update(self) -> None:
        """Serve on after an update that failed.

        Raises:
            ActorLost: If the old weights are gone.
        """
        phase = "load"
        if not await self.answer(self.actor.abandon_update.remote(), phase, self.cfg.load_deadline_s):
            raise ActorLost(self.role, self.rank, phase, "the update broke off and the old weights are gone")

    async def _serve(self, loading: Any, version: int) -> None:
        served = await self.answer(loading, "load", self.cfg.load_deadline_s)
        if served != version:
            raise WrongWeights(f"rollout {self.rank} reports version {served} after loading {version}", "")

    async def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the canary sequences."""
        answer: list[list[float]] = await self.answer(
            self.actor.canary.remote(sequences), "canary", self.cfg.load_deadline_s
        )
        return answer


@dataclass(frozen=True, slots=True)
class Published:
    """Weights that the learner gave away.

    Attributes:
        version: Their policy version.
        num_bytes: Their size.
        canary: The learner's log-probabilities of the canary sequences under these weights.
        fingerprint: Of the weights, if they were sent from GPU to GPU.
        exported: Reference to the weights, if they are in Ray's object store.
    """

    version: int
    num_bytes: int
    canary: list[list[float]]
    fingerprint: str = ""
    exported: Any = None


class LearnerHandle(Handle):
    """The learner; see `cluster.loop.Learner`."""

    def __init__(self, actor: Any, deadlines: Deadlines) -> None:
        super().__init__(actor, "learner", 0)
        self.deadlines = deadlines

    async def ready(self) -> None:
        """Wait until the policy is loaded."""
        await self.answer(self.actor.ready.remote(), "start", self.deadlines.start_s)

    async def update(self, rollouts: Sequence[Rollout], step: int) -> list[Metric]:
        """One optimizer step on these rollouts."""
        parts = [*(r.payload for r in rollouts), *(r.scores for r in rollouts)]
        metrics: list[Metric] = await self.answer(
            self.actor.update.remote(step, *parts), f"update of step {step}", self.deadlines.update_s
        )
        return metrics

    async def export(self, canary: Sequence[Sequence[int]]) -> Published:
        """Put the current weights into Ray's object store, and score the canary with them."""
        exported, summary = self.actor.export.options(num_returns=2).remote()
        scored = self.actor.canary.remote(canary)
        num_bytes, version = await self.answer(summary, "export of the weights", self.deadlines.save_s)
        expected = await self.answer(scored, "canary", self.deadlines.save_s)
        return Published(version, num_bytes, expected, exported=exported)

    async def send(self, canary: Sequence[Sequence[int]], link: Link, regroup: Mapping[int, Any] | None) -> Published:
        """Send the current weights to the engines of the group, and score the canary with them.

        All calls are submitted at once and Ray runs them in this order, so that no update comes between them. A
        replacement may ask while an update runs; the first call then waits for its end.

        Args:
            canary: The fixed sequences.
            link: How to send.
            regroup: Ray's handles by rank, to form a new group of them first.

        Raises:
            ActorLost: If the learner, or an engine (see its role), was lost.
        """
        connecting = None if regroup is None else self.actor.connect.remote(regroup, link)
        sending = self.actor.send.remote()
        scored = self.actor.canary.remote(canary)
        if connecting is not None:
            await self.answer(connecting, "connect", self.deadlines.update_s + 2 * link.deadline_s)
        deadline_s = self.deadlines.save_s + 4 * link.deadline_s
        fingerprint, num_bytes, version = await self.answer(sending, "send of the weights", deadline_s)
        expected = await self.answer(scored, "canary", self.deadlines.save_s)
        return Published(version, num_bytes, expected, fingerprint=fingerprint)

    async def export_reference(self, directory: Path) -> str:
        """Write the policy as a Hugging Face folder, for the scorers; returns the fingerprint of its weights in float32."""
        writing = self.actor.export_policy.remote(directory)
        inspecting = self.actor.fingerprint.remote()
        await self.answer(writing, "export of the reference", self.deadlines.save_s)
        fingerprint: str = await self.answer(inspecting, "fingerprint", self.deadlines.save_s)
        return fingerprint

    async def evaluate(self, ref_log_distributions: Any, rollouts: Sequence[Rollout]) -> list[Answer]:
        """Judge what the current policy sampled; without a reference there are no distributions."""
        reference = self.actor.evaluate.remote(ref_log_distributions, *(r.payload for r in rollouts))
        answers: list[Answer] = await self.answer(reference, "evaluation", self.deadlines.update_s)
        return answers


def spend(used: int, limit: int, key: str, error: BaseException) -> int:
    """One more restart.

    Raises:
        RestartBudgetSpent: If there is none left.
    """
    if used >= limit:
        raise RestartBudgetSpent(
            f"{reason(error)}; {used} of {limit} restarts ({key}) are used", "see the actor's log for the cause"
        )
    return used + 1
