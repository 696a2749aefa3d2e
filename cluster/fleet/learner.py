"""The handle on the learner, which may run on several ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from align.metrics import Metric
from cluster.actors.weights import Link
from cluster.faults import ActorLost
from cluster.fleet.handle import Handle
from cluster.loop.answer import Answer
from cluster.loop.rollout import Rollout

Result = TypeVar("Result")
_CAUSE_S = 5.0  # how long Ray may take to tell that a process died


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Times for the learner's work."""

    start_s: float
    update_s: float
    save_s: float


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
            starts = self._call(lambda rank: rank.join.remote(meeting))
        await self._together(starts, "start", self.deadlines.start_s)

    async def update(self, rollouts: Sequence[Rollout], step: int) -> list[Metric]:
        """One optimizer step on these rollouts."""
        parts = [*(r.payload for r in rollouts), *(r.scores for r in rollouts)]
        phase = f"update of step {step}"
        return await self._ask(lambda rank: rank.update.remote(step, *parts), phase, self.deadlines.update_s)

    async def export(self, canary: Sequence[Sequence[int]]) -> Published:
        """Put the current weights into Ray's object store, and score the canary with them."""
        exported, summary = self.actor.export.options(num_returns=2).remote()
        exporting = [summary, *self._helping()]
        scored = self._call(lambda rank: rank.canary.remote(canary))
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
        sending = [self.actor.send.remote(), *self._helping()]
        scored = self._call(lambda rank: rank.canary.remote(canary))
        if connecting is not None:
            await self.answer(connecting, "connect", self.deadlines.update_s + 2 * link.deadline_s)
        deadline_s = self.deadlines.save_s + 4 * link.deadline_s
        fingerprint, num_bytes, version = await self._together(sending, "send of the weights", deadline_s)
        expected = await self._together(scored, "canary", self.deadlines.save_s)
        return Published(version, num_bytes, expected, fingerprint=fingerprint)

    async def export_reference(self, directory: Path) -> str:
        """Write the policy as a Hugging Face folder, for the scorers; returns the fingerprint of its weights in float32."""
        writing = self._call(lambda rank: rank.export_policy.remote(directory))
        inspecting = [self.actor.fingerprint.remote(), *self._helping()]
        await self._together(writing, "export of the reference", self.deadlines.save_s)
        return await self._together(inspecting, "fingerprint", self.deadlines.save_s)

    async def evaluate(self, ref_log_distributions: Any, rollouts: Sequence[Rollout]) -> list[Answer]:
        """Judge what the current policy sampled; without a reference there are no distributions."""
        parts = [ref_log_distributions, *(r.payload for r in rollouts)]
        return await self._ask(lambda rank: rank.evaluate.remote(*parts), "evaluation", self.deadlines.update_s)

    async def canary_sequences(self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int) -> list[list[int]]:
        """See `LearnerActor.canary_sequences`."""
        arguments = (prompts, max_tokens, seed)
        return await self._ask(lambda rank: rank.canary_sequences.remote(*arguments), "canary", self.deadlines.start_s)

    async def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of tokens 1.. of each sequence under the current weights."""
        return await self._ask(lambda rank: rank.canary.remote(sequences), "canary", self.deadlines.save_s)

    async def save(self, directory: Path) -> None:
        """Write policy and optimizer into a folder that all ranks and this process see."""
        await self._ask(lambda rank: rank.save.remote(directory), "save", self.deadlines.save_s)

    async def restore(self, directory: Path, version: int) -> None:
        """Take up the optimizer of a checkpoint, and its adapter."""
        await self._ask(lambda rank: rank.restore.remote(directory, version), "restore", self.deadlines.save_s)

    async def export_policy(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder, and an adapter beside it."""
        phase, deadline_s = "export of the policy", self.deadlines.save_s
        await self._ask(lambda rank: rank.export_policy.remote(directory, with_adapter=True), phase, deadline_s)

    async def _ask(self, call: Callable[[Any], Awaitable[Result]], phase: str, deadline_s: float) -> Result:
        """Call all ranks; the first one's answer, once all have answered."""
        return await self._together(self._call(call), phase, deadline_s)

    def _call(self, call: Callable[[Any], Awaitable[Result]]) -> list[Awaitable[Result]]:
        """References to the answers of all ranks."""
        return [call(handle.actor) for handle in self._ranks]

    def _helping(self) -> list[Any]:
        return [handle.actor.help_gather.remote() for handle in self._ranks[1:]]

    async def _together(self, references: Sequence[Awaitable[Result]], phase: str, deadline_s: float) -> Result:
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
