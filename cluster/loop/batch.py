"""What a step says of the groups that it trains: their staleness, lengths, endings and tokens."""

from __future__ import annotations

from collections.abc import Sequence

from align.metrics import Metric, reduce
from cluster.faults import StalenessViolation
from cluster.loop.rollout import Rollout


def check_staleness(rollouts: Sequence[Rollout], version: int, limit: int) -> list[Metric]:
    """Staleness of every group at consumption.

    Raises:
        StalenessViolation: If one is above the limit.
    """
    for rollout in rollouts:
        staleness = version - rollout.oldest_version
        if not 0 <= staleness <= limit:
            raise StalenessViolation(
                f"ticket {rollout.ticket.number} was sampled by version {rollout.oldest_version} and met learner version "
                f"{version}: staleness {staleness}, the limit is {limit}",
                "this is a defect of the loop; please report it with the run folder",
            )
    values = [version - rollout.oldest_version for rollout in rollouts]
    return [Metric("staleness/mean", sum(values) / len(values)), Metric("staleness/max", max(values))]


def learned_tokens(update: Sequence[Metric]) -> tuple[int, int]:
    """Tokens that an update trained, and those that it masked; a number that it does not give is 0."""
    values = reduce(update)
    return int(values.get("tokens/trained", 0)), int(values.get("tokens/masked", 0))


def summarize(rollouts: Sequence[Rollout], elapsed_s: float) -> list[Metric]:
    """Lengths, endings and speed of a batch."""
    num_trajectories = sum(len(r.ticket.seeds) for r in rollouts)
    num_tokens = sum(r.num_tokens for r in rollouts)
    return [
        Metric("trajectory/completion_tokens_mean", num_tokens / num_trajectories),
        Metric("trajectory/stopped_fraction", sum(r.num_stopped for r in rollouts) / num_trajectories),
        Metric("tokens/generated", num_tokens),
        Metric("throughput/generated_tokens_per_s", num_tokens / elapsed_s),
    ]
