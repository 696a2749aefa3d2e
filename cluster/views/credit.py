"""Who got the credit: advantages of a step's tokens and their pull on its loss, from what is on disk.

The advantages are those that the update recorded. An update that did not end has recorded none: then the run's own code
(its objective) turns the recorded rewards into the same advantages, unless it takes a critic, whose values are not there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from align.algorithm.config import AlgorithmConfig
from align.data.types import FinishReason, Group, Prompt, ScoredGroup, Ticket, TokenRewards, Trajectory, VersionSpan
from cluster.record.history import read_rows
from cluster.record.trajectories import Row, Trajectories

if TYPE_CHECKING:
    from align.data.batching import Batch

PULL = "pull = w × A × (1 − p)"
PULL_MEANING = (
    "w is the trajectory's weight in the loss, A the token's advantage, p its probability when it was sampled: how far the "
    "gradient pushes the token's logit, as long as the policy is the one that sampled it. Positive: made likelier."
)


class CreditUnknown(ValueError):
    """What is on disk does not determine the advantages."""


@dataclass(frozen=True, slots=True)
class Credit:
    """What the C sampled tokens of a trajectory were given.

    Attributes:
        advantages: [C].
        pulls: [C] `w * A * (1 - p)`; 0 where a token carries no loss.
    """

    advantages: list[float]
    pulls: list[float]

    @property
    def pull(self) -> float:
        """Sum of the sizes of all its tokens' pulls."""
        return float(np.abs(self.pulls).sum())


Credits = Mapping[tuple[int, int], Credit]
"""Of a step, by (ticket, repeat)."""


def step_credits(trajectories: Trajectories, step: int) -> Credits:
    """Those of all trajectories of a step.

    Raises:
        CreditUnknown: If they need something that is not recorded.
        ConfigError: If there is no such step.
    """
    try:
        tree = tomllib.loads((trajectories.run / "config.toml").read_text(encoding="utf-8"))
        algorithm = AlgorithmConfig.model_validate(tree["algorithm"])
    except (OSError, KeyError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise CreditUnknown(
            f"the algorithm of the run is not known: its config.toml cannot be read ({error})"
        ) from None
    return credits(trajectories.rows(step), algorithm, _kl_coefficient(trajectories, step))


def _kl_coefficient(trajectories: Trajectories, step: int) -> float | None:
    """What an adaptive coefficient was at that step, from metrics.jsonl."""
    path = trajectories.run / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return next((row["kl/coefficient"] for row in rows if row["step"] == step and "kl/coefficient" in row), None)


def credits(rows: Sequence[Row], algorithm: AlgorithmConfig, kl_coefficient: float | None = None) -> Credits:
    """Those of the rows of one step.

    A step of several minibatches has a denominator for each; here it is that of the whole batch.

    Args:
        rows: All that the step learned from.
        algorithm: The run's.
        kl_coefficient: What KL cost at that step, where it changes from step to step.

    Raises:
        CreditUnknown: If they need something that is not recorded.
    """
    from align.algorithm.objective import Objective
    from align.data.batching import collate

    objective = Objective(algorithm)
    if kl_coefficient is not None:
        objective.kl_coefficient = kl_coefficient
    ordered = sorted(rows, key=lambda row: (row["ticket"], row["repeat"]))
    batch = collate([_scored(list(group)) for _, group in groupby(ordered, key=lambda row: row["ticket"])])
    advantages = _advantages(objective, batch, ordered)
    pulls = _pulls(objective, batch, advantages)
    return {
        (row["ticket"], row["repeat"]): Credit(advantages[index][mask].tolist(), pulls[index][mask].tolist())
        for index, (row, mask) in enumerate(zip(ordered, batch.loss_mask, strict=True))
    }


def _advantages(objective: Any, batch: Batch, ordered: Sequence[Row]) -> Any:
    """[B, T], as recorded or computed again."""
    if all(row.get("advantages") is not None for row in ordered):
        advantages = batch.rewards.new_zeros(batch.rewards.shape)
        advantages[batch.loss_mask] = advantages.new_tensor([value for row in ordered for value in row["advantages"]])
        return advantages
    if objective.cfg.baseline == "critic":
        raise CreditUnknown("the update did not end, and a critic's values are not recorded")
    try:
        return objective.advantages(batch)[0]
    except ValueError as error:
        raise CreditUnknown(str(error)) from None


def _pulls(objective: Any, batch: Batch, advantages: Any) -> Any:
    """[B, T]."""
    with_loss, _ = objective.with_loss(batch)
    guarded, _ = objective.with_guard(with_loss, advantages)
    slope = -advantages.double() * batch.behavior_logprobs.double().expm1()
    pulls = objective.weights(with_loss)[:, None] * slope.where(with_loss.loss_mask, 0.0)
    if guarded.guarded is not None and objective.cfg.entropy_guard == "clip_cov":
        pulls = pulls.masked_fill(guarded.guarded, 0.0)
    return pulls


def _scored(rows: Sequence[Row]) -> ScoredGroup:
    """The group as it was, but for its prompt's tokens, which carry no loss and are not recorded: one stands for all."""
    prompt = Prompt(rows[0]["prompt_id"], rows[0]["prompt"], (0,))
    ticket = Ticket(rows[0]["ticket"], prompt, tuple(row["seed"] for row in rows))
    trajectories = tuple(
        Trajectory.from_completion(
            prompt.token_ids,
            row["token_ids"],
            row["behavior_logprobs"],
            _spans(row["versions"]),
            FinishReason(row["finish_reason"]),
            row["seed"],
        )
        for row in rows
    )
    return ScoredGroup(Group(ticket, trajectories), tuple(map(_rewards, rows)))


def _spans(versions: Sequence[int]) -> list[VersionSpan]:
    ends = [t for t in range(1, len(versions) + 1) if t == len(versions) or versions[t] != versions[t - 1]]
    return [VersionSpan(versions[start], start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _rewards(row: Row) -> TokenRewards:
    def padded(values: Sequence[Any] | None, kind: Any) -> Any:
        return None if values is None else np.asarray([0, *values], kind)

    ref, ends = padded(row["ref_logprobs"], np.float32), padded(row.get("step_ends"), np.bool_)
    return TokenRewards(padded(row["rewards"], np.float32), ref, step_ends=ends)
