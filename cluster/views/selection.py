"""Which trajectories are looked at, in which order, and which are extreme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.record.trajectories import Brief, Trajectories


@dataclass(frozen=True, slots=True)
class Order:
    """A way to sort trajectories.

    Attributes:
        first: What the first one is.
        key: Sorts it to the front.
    """

    first: str
    key: Callable[[Brief], float]


ORDERS = {
    "highest": Order("highest reward", lambda brief: -brief.reward),
    "lowest": Order("lowest reward", lambda brief: brief.reward),
    "longest": Order("longest", lambda brief: -brief.num_tokens),
    "shortest": Order("shortest", lambda brief: brief.num_tokens),
    "stalest": Order("stalest", lambda brief: -brief.staleness),
    "farthest": Order("far from reference", lambda brief: -abs(brief.ref_gap or 0.0)),
    "drifted": Order("largest log-ratio", lambda brief: -(brief.log_ratio or 0.0)),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Limits that are all inclusive; None asks for nothing.

    Attributes:
        first_step: The first step.
        last_step: The last step.
        prompt: Id of the prompt, or a part of its text.
        ending: Finish reason.
        min_reward: Least reward.
        max_reward: Largest reward.
        min_staleness: Least staleness.
        max_staleness: Largest staleness.
    """

    first_step: int | None = None
    last_step: int | None = None
    prompt: str | None = None
    ending: str | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    min_staleness: int | None = None
    max_staleness: int | None = None

    def of(self, trajectories: Trajectories) -> list[Brief]:
        """All that match, by step."""
        steps = [step for step in trajectories.files if _within(step, self.first_step, self.last_step)]
        return [brief for step in steps for brief in trajectories.briefs(step) if self.matches(brief)]

    def matches(self, brief: Brief) -> bool:
        """Whether the trajectory is wanted, apart from its step."""
        return (
            (self.prompt is None or self.prompt == brief.prompt_id or self.prompt in brief.prompt)
            and self.ending in (None, brief.finish_reason)
            and _within(brief.reward, self.min_reward, self.max_reward)
            and _within(brief.staleness, self.min_staleness, self.max_staleness)
        )


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def extremes(briefs: Sequence[Brief]) -> list[tuple[str, Brief]]:
    """(what it is, which): the first trajectory in each order in which they differ."""
    found = ((order.first, order.key, min(briefs, key=order.key)) for order in ORDERS.values() if briefs)
    return [(first, brief) for first, key, brief in found if len({key(other) for other in briefs}) > 1]


def ends(briefs: Iterable[Brief], limit: int) -> list[Brief]:
    """By reward, lowest first; of more than `limit` the lowest and the highest halves."""
    found = sorted(briefs, key=ORDERS["lowest"].key)
    half = limit // 2
    return found if len(found) <= limit else found[: limit - half] + (found[-half:] if half else [])


@dataclass(frozen=True, slots=True)
class Summary:
    """Some trajectories in a line.

    Attributes:
        num: How many.
        reward_mean: Mean reward.
        reward_min: Least reward.
        reward_max: Largest reward.
        tokens_mean: Mean number of sampled tokens.
        endings: How many ended for which reason.
        staleness_mean: Mean staleness.
        staleness_max: Largest staleness.
        ref_gap: Mean over all their tokens of `log mu - log P_ref`, in nats; None without a reference.
    """

    num: int
    reward_mean: float
    reward_min: float
    reward_max: float
    tokens_mean: float
    endings: Mapping[str, int]
    staleness_mean: float
    staleness_max: int
    ref_gap: float | None

    @staticmethod
    def of(briefs: Sequence[Brief]) -> Summary:
        """Of at least one trajectory."""
        rewards, staleness = [brief.reward for brief in briefs], [brief.staleness for brief in briefs]
        num, num_tokens = len(briefs), sum(brief.num_tokens for brief in briefs)
        gaps = [brief.ref_gap * brief.num_tokens for brief in briefs if brief.ref_gap is not None]
        return Summary(
            num,
            sum(rewards) / num,
            min(rewards),
            max(rewards),
            num_tokens / num,
            Counter(brief.finish_reason for brief in briefs),
            sum(staleness) / num,
            max(staleness),
            sum(gaps) / num_tokens if gaps else None,
        )
