"""Handles on Ray actors: every call has a deadline, and Ray's errors become named ones.

Token arrays stay behind Ray's object references: they go from actor to actor, and this process sees summaries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from align.data.types import Ticket
from align.metrics import Metric
from cluster.actors.learner import Answer
from cluster.actors.rollout import RolloutConfig
from cluster.actors.weights import Link
from cluster.faults import ActorLost, RestartBudgetSpent, WrongWeights, from_ray, reason
from cluster.loop.loop import Rollout

_CAUSE_S = 5.0  # how long Ray may take to tell that a process died


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
        """Sample one group; see the loop's `RolloutActor`."""
        if self.lost:
            raise self.lost
        payload, summary = self.actor.rollout.options(num_returns=2).remote(ticket)
        known = await self.answer(summary, "rollout", self.cfg.rollout_deadline_s)
        numbers = (known.oldest_version, known.num_tokens, known.num_stopped)
        return Rollout(ticket, *numbers, payload, spans=(known.span,))

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

    async def usage(self) -> tuple[float, float]:
        """Busy and elapsed seconds since the last call; see `cluster.actors.usage.BusyClock`."""
        used: tuple[float, float] = await self.answer(self.actor.usage.remote(), "usage", self.cfg.load_deadline_s)
        return used


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
    """The learner; see the loop's `Learner`. Of several ranks the first answers, and the loss of any is that of the learner.

    Every call goes to all ranks at once, without a wait in between, so that all of them run all calls in the same order.

    Args:
        actor: Ray's handle on the first rank.
        deadlines: Times for its work.
        others: Ray's handles on the other ranks.
    """

    def __init__(self, actor: Any, deadlines: Deadlines, others: Sequence[Any] = ()) -> None:
        super().__init__(actor, "learner", 0)
        self.deadlines = deadlines
        self._ranks: list[Handle] = [self, *(Handle(other, self.role, rank) for rank, other in enumerate(others, 1))]

    async def ready(self) -> None:
        """Wait until the policy is loaded, by several ranks together."""
        if len(self._ranks) == 1:
            starts = [self.actor.ready.remote()]
        else:
            meeting = self.actor.host.remote()
            starts = self._call(lambda actor: actor.join.remote(meeting))
        await self._together(starts, "start", self.deadlines.start_s)

    async def update(self, rollouts: Sequence[Rollout], step: int) -> list[Metric]:
        """One optimizer step on these rollouts."""
        parts = [*(r.payload for r in rollouts), *(r.scores for r in rollouts)]
        updates = self._call(lambda actor: actor.update.remote(step, *parts))
        metrics: list[Metric] = await self._together(updates, f"update of step {step}", self.deadlines.update_s)
        return metrics

    async def export(self, canary: Sequence[Sequence[int]]) -> Published:
        """Put the current weights into Ray's object store, and score the canary with them."""
        exported, summary = self.actor.export.options(num_returns=2).remote()
        exporting = [summary, *self._followers()]
        scored = self._call(lambda actor: actor.canary.remote(canary))
        num_bytes, version = await self._together(exporting, "export of the weights", self.deadlines.save_s)
        expected = await self._together(scored, "canary", self.deadlines.save_s)
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
        sending = [self.actor.send.remote(), *self._followers()]
        scored = self._call(lambda actor: actor.canary.remote(canary))
        if connecting is not None:
            await self.answer(connecting, "connect", self.deadlines.update_s + 2 * link.deadline_s)
        deadline_s = self.deadlines.save_s + 4 * link.deadline_s
        fingerprint, num_bytes, version = await self._together(sending, "send of the weights", deadline_s)
        expected = await self._together(scored, "canary", self.deadlines.save_s)
        return Published(version, num_bytes, expected, fingerprint=fingerprint)

    async def export_reference(self, directory: Path) -> str:
        """Write the policy as a Hugging Face folder, for the scorers; returns the fingerprint of its weights in float32."""
        writing = self._call(lambda actor: actor.export_policy.remote(directory))
        inspecting = [self.actor.fingerprint.remote(), *self._followers()]
        await self._together(writing, "export of the reference", self.deadlines.save_s)
        fingerprint: str = await self._together(inspecting, "fingerprint", self.deadlines.save_s)
        return fingerprint

    async def evaluate(self, ref_log_distributions: Any, rollouts: Sequence[Rollout]) -> list[Answer]:
        """Judge what the current policy sampled; without a reference there are no distributions."""
        payloads = [r.payload for r in rollouts]
        judging = self._call(lambda actor: actor.evaluate.remote(ref_log_distributions, *payloads))
        answers: list[Answer] = await self._together(judging, "evaluation", self.deadlines.update_s)
        return answers

    async def canary_sequences(self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int) -> list[list[int]]:
        """See `LearnerActor.canary_sequences`."""
        sampling = self._call(lambda actor: actor.canary_sequences.remote(prompts, max_tokens, seed))
        sequences: list[list[int]] = await self._together(sampling, "canary", self.deadlines.start_s)
        return sequences

    async def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of tokens 1.. of each sequence under the current weights."""
        scoring = self._call(lambda actor: actor.canary.remote(sequences))
        answer: list[list[float]] = await self._together(scoring, "canary", self.deadlines.save_s)
        return answer

    async def save(self, directory: Path) -> None:
        """Write policy and optimizer into a folder that all ranks and this process see."""
        await self._together(self._call(lambda actor: actor.save.remote(directory)), "save", self.deadlines.save_s)

    async def restore(self, directory: Path, version: int) -> None:
        """Take up the optimizer of a checkpoint, and its adapter."""
        restoring = self._call(lambda actor: actor.restore.remote(directory, version))
        await self._together(restoring, "restore", self.deadlines.save_s)

    async def export_policy(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder, and an adapter beside it."""
        writing = self._call(lambda actor: actor.export_policy.remote(directory, with_adapter=True))
        await self._together(writing, "export of the policy", self.deadlines.save_s)

    def _call(self, call: Callable[[Any], Any]) -> list[Any]:
        """References to the answers of all ranks."""
        return [call(handle.actor) for handle in self._ranks]

    def _followers(self) -> list[Any]:
        return [handle.actor.follow.remote() for handle in self._ranks[1:]]

    async def _together(self, references: Sequence[Any], phase: str, deadline_s: float) -> Any:
        """The first rank's answer, once all ranks have answered.

        When a rank dies the others fail too, since they wait for it, and often this is seen first. So a failure is given a
        moment for its cause, which is raised instead of what it brought about.

        Raises:
            ActorLost: If a rank died or was too late.
            RunError: If the work failed.
        """
        pairs = zip(self._ranks, references, strict=True)
        answers = [asyncio.ensure_future(handle.answer(r, phase, deadline_s)) for handle, r in pairs]
        try:
            _, late = await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
            if late:
                await asyncio.wait(late, timeout=_CAUSE_S)
            errors = [error for answer in answers if answer.done() and (error := answer.exception())]
            if errors:
                raise next((error for error in errors if isinstance(error, ActorLost)), errors[0])
            return answers[0].result()
        finally:
            for answer in answers:
                answer.cancel()


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
