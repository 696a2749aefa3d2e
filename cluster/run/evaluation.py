"""Evaluations: the current policy answers fixed prompts; exact KL to the reference, a judge's verdict, right answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from align.data.prompts import PromptStream
from align.data.types import Prompt, Ticket
from align.metrics import Metric
from cluster.faults import ActorLost
from cluster.fleet.placement import Workers
from cluster.fleet.publication import FleetHandle
from cluster.loop.answer import Answer
from cluster.loop.rollout import Rollout

_DISTRIBUTION_BYTES = 128 << 20  # whole-vocabulary distributions that travel at once
_NUM_JUDGED = 16  # groups in one call of the learner, which has a deadline


def fixed_tickets(prompts: Sequence[Prompt], group_size: int, seed: int) -> list[Ticket]:
    """One ticket per prompt, in order, with the same sampling seeds at every evaluation."""
    stream = PromptStream(prompts, group_size, seed)
    by_prompt = {t.prompt.id: t for t in (stream.ticket(number) for number in range(len(prompts)))}
    return [by_prompt[prompt.id] for prompt in prompts]


class Evaluator:
    """Runs evaluations with the run's own actors.

    Args:
        sets: Tickets by set name ("heldout", "train").
        workers: The actors.
        bytes_per_group: Size of the reference's distributions over one group; None without a reference.
    """

    def __init__(self, sets: Mapping[str, list[Ticket]], workers: Workers, bytes_per_group: int | None) -> None:
        self.sets = sets
        self._workers = workers
        self._bytes_per_group = bytes_per_group

    async def evaluate(self) -> dict[str, list[Answer]]:
        """Answers of every set at the version that the actors serve."""
        return {name: await self._answers(tickets) for name, tickets in self.sets.items()}

    async def _answers(self, tickets: Sequence[Ticket]) -> list[Answer]:
        fleet = self._workers.fleet
        places = asyncio.Semaphore(sum(actor.max_groups for actor in fleet.actors))
        rollouts = await asyncio.gather(*(_roll_out(fleet, i, ticket, places) for i, ticket in enumerate(tickets)))
        size = self._bytes_per_group
        chunk = _NUM_JUDGED if size is None else max(1, _DISTRIBUTION_BYTES // size)
        answers: list[Answer] = []
        for first in range(0, len(rollouts), chunk):
            part = rollouts[first : first + chunk]
            distributions = None if size is None else await self._workers.scorers.log_distributions(part)
            answers += await self._workers.learner.evaluate(distributions, part)
        return answers


async def _roll_out(fleet: FleetHandle, turn: int, ticket: Ticket, places: asyncio.Semaphore) -> Rollout:
    """Roll out on the actors in turn; one that is lost is replaced, within the fleet's budget."""
    while True:
        actor = fleet.actors[turn % len(fleet.actors)]
        try:
            async with places:
                return await actor.rollout(ticket)
        except ActorLost as error:
            await fleet.replace(actor, error)


def metrics_of(name: str, answers: Sequence[Answer]) -> list[Metric]:
    """KL per token over all tokens of the set, length, the judge's rate, and the share of right answers."""
    num_tokens = sum(a.num_tokens for a in answers)
    metrics = [Metric(f"eval/{name}/completion_tokens_mean", num_tokens / len(answers))]
    divergences = [a.kl for a in answers if a.kl is not None]
    if divergences:
        metrics.append(Metric(f"eval/{name}/kl_per_token", sum(divergences) / max(num_tokens, 1)))
    accuracies = [a.accuracy for a in answers if a.accuracy is not None]
    if accuracies:
        metrics.append(Metric(f"eval/{name}/accuracy", sum(accuracies) / len(accuracies)))
    if num_failed := sum(a.failed for a in answers):
        metrics.append(Metric(f"eval/{name}/unjudged_fraction", num_failed / len(answers)))
    verdicts = [a.judged for a in answers if a.judged is not None]
    if verdicts:
        metrics.append(Metric(f"eval/{name}/grammatical", sum(verdicts) / len(verdicts)))
    return metrics
