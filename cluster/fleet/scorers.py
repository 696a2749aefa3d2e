"""Handles on the scorers: every call has a deadline, and a lost scorer is replaced."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from align.data.types import Prompt
from align.metrics import Metric
from cluster.actors.scorer import ScorerConfig, Verdict
from cluster.faults import ActorLost, WrongWeights, reason
from cluster.fleet.handle import Handle, spend
from cluster.loop.rollout import Rollout
from cluster.loop.saved_reference import SavedReference
from cluster.loop.span import Span

Result = TypeVar("Result")


class ScorerHandle(Handle):
    """One scorer."""

    def __init__(self, actor: Any, rank: int, cfg: ScorerConfig, verifier_deadline_s: float = 0) -> None:
        super().__init__(actor, "scorer", rank)
        self.cfg = cfg
        self.verifier_deadline_s = verifier_deadline_s
        self.busy_s = 0.0  # as the scorer measured it, in calls that have ended

    async def ready(self) -> None:
        """Wait until the reference is loaded."""
        await self.answer(self.actor.ready.remote(), "start", self.cfg.start_deadline_s)

    async def score(self, rollout: Rollout) -> Rollout:
        """The rollout with its outcomes, and its rewards still behind a reference."""
        scores, summary = self.actor.score.options(num_returns=2).remote(rollout.payload)
        # Each answer may hang until its own deadline, which costs that answer alone.
        verifying_s = self.verifier_deadline_s * len(rollout.ticket.seeds)
        verdict: Verdict = await self.answer(summary, "score", self.cfg.score_deadline_s + verifying_s)
        self.busy_s += verdict.ended_s - verdict.began_s
        spans = (*rollout.spans, Span(self.role, self.rank, verdict.began_s, verdict.ended_s))
        return replace(rollout, scores=scores, outcomes=verdict.outcomes, failures=verdict.failures, spans=spans)

    async def load_reference(self, saved: SavedReference) -> None:
        """Take another reference. Raises WrongWeights if something else arrived."""
        loading = self.actor.load_reference.remote(saved.folder)
        loaded = await self.answer(loading, "load", self.cfg.start_deadline_s)
        if loaded != saved.fingerprint:
            raise WrongWeights(
                f"scorer {self.rank} read a reference with fingerprint {loaded} from {saved.folder}, the learner wrote "
                f"version {saved.version} with {saved.fingerprint}",
                "the run folder has to be on storage that the learner and the scorers share",
            )

    async def log_distributions(self, rollouts: Sequence[Rollout]) -> Any:
        """A reference to the whole distributions of the reference model along these rollouts."""
        method = self.actor.log_distributions.options(num_returns=2)
        distributions, done = method.remote(*(r.payload for r in rollouts))
        await self.answer(done, "evaluation", self.cfg.score_deadline_s)
        return distributions

    async def sample(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[str]:
        """What the reference itself answers."""
        answers = self.actor.sample.remote(prompts, max_tokens, seed)
        return await self.answer(answers, "sampling", self.cfg.score_deadline_s)


class ScorerPool:
    """All scorers; see the loop's `Scorer`. A lost scorer is replaced and asked again.

    Args:
        scorers: The handles.
        create: Makes the Ray actor of a rank.
        max_restarts: Replacements before the run ends.
        warn: Told of every replacement.
        now: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        scorers: list[ScorerHandle],
        create: Callable[[int], Any],
        max_restarts: int,
        warn: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scorers = scorers
        self.num_restarts = 0
        self._create = create
        self._max_restarts = max_restarts
        self._warn = warn
        self._turn = itertools.count()
        self._replacing = asyncio.Lock()
        self._reference: SavedReference | None = None
        self._now = now
        self._since = now()

    async def load_reference(self, saved: SavedReference) -> None:
        """Bring a reference to all scorers; later replacements take it too, before they serve."""
        async with self._replacing:
            self._reference = saved
            await asyncio.gather(*(self._load_or_replace(scorer, saved) for scorer in list(self.scorers)))

    async def _load_or_replace(self, scorer: ScorerHandle, saved: SavedReference) -> None:
        try:
            await scorer.load_reference(saved)
        except ActorLost as error:
            self.scorers[scorer.rank] = await self._start_again(scorer, error)

    async def score(self, rollout: Rollout) -> Rollout:
        """See `ScorerHandle.score`."""
        return await self._ask(lambda scorer: scorer.score(rollout))

    def end_step(self) -> list[Metric]:
        """See the loop's `Scorer`. `idle = 1 - time in calls that ended since the last call / (time since then * scorers)`."""
        now, busy_s = self._now(), sum(scorer.busy_s for scorer in self.scorers)
        idle = 1 - busy_s / ((now - self._since) * len(self.scorers))
        self._since = now
        for scorer in self.scorers:
            scorer.busy_s = 0.0
        return [Metric("idle/scorer_fraction", max(idle, 0.0))]

    async def log_distributions(self, rollouts: Sequence[Rollout]) -> Any:
        """See `ScorerHandle.log_distributions`."""
        return await self._ask(lambda scorer: scorer.log_distributions(rollouts))

    async def sample(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[str]:
        """See `ScorerHandle.sample`."""
        return await self._ask(lambda scorer: scorer.sample(prompts, max_tokens, seed))

    async def _ask(self, work: Callable[[ScorerHandle], Awaitable[Result]]) -> Result:
        """Ask the next scorer in turn, and another one if it is lost."""
        while True:
            scorer = self.scorers[next(self._turn) % len(self.scorers)]
            try:
                return await work(scorer)
            except ActorLost as error:
                if error.role != "scorer":
                    raise
                await self._replace(scorer, error)

    async def _replace(self, lost: ScorerHandle, error: ActorLost) -> None:
        async with self._replacing:
            if self.scorers[lost.rank] is not lost:
                return  # another group's failure replaced it already
            self.scorers[lost.rank] = await self._start_again(lost, error)

    async def _start_again(self, lost: ScorerHandle, error: ActorLost) -> ScorerHandle:
        """Start scorers of the lost one's rank until one is up or the budget is spent."""
        while True:
            lost.kill()
            self.num_restarts = spend(self.num_restarts, self._max_restarts, "scorer.max_restarts", error)
            self._warn(f"{reason(error)}; replacing it ({self.num_restarts} of {self._max_restarts} restarts)")
            fresh = ScorerHandle(self._create(lost.rank), lost.rank, lost.cfg, lost.verifier_deadline_s)
            try:
                await fresh.ready()
                if self._reference:
                    await fresh.load_reference(self._reference)
                return fresh
            except ActorLost as failed:
                lost, error = fresh, failed
