"""What moved the loss at a step: its trajectories and tokens by the size of their pull."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.record.trajectories import Row
from cluster.views.credit import Credits
from cluster.views.web.tokens import visible

TRAJECTORIES, TOKENS = 20, 30
_BEFORE = 8  # tokens of context


@dataclass(frozen=True, slots=True)
class Mover:
    """A trajectory or a token.

    Attributes:
        row: The trajectory.
        pull: Signed for a token; for a trajectory the sum of the sizes of its tokens' pulls.
        share: Of the sizes of all pulls of the step.
        number: The token's place; None for a trajectory.
        advantage: The token's; the first token's for a trajectory.
        before: The tokens before it, as text.
        text: The token.
    """

    row: Row
    pull: float
    share: float
    number: int | None
    advantage: float
    before: str = ""
    text: str = ""

    @property
    def probability(self) -> float:
        """The token's, when it was sampled."""
        return math.exp(self.row["behavior_logprobs"][self.number])


@dataclass(frozen=True, slots=True)
class Moved:
    """What moved a step.

    Attributes:
        trajectories: The strongest first.
        tokens: The strongest first.
        total: Sum of the sizes of all pulls.
        half: Fewest trajectories that have half of it.
        num: Trajectories of the step.
    """

    trajectories: list[Mover]
    tokens: list[Mover]
    total: float
    half: int
    num: int


def moved(rows: Sequence[Row], credits: Credits, tokenizer: Any) -> Moved:
    """The strongest trajectories and tokens of the rows of a step."""
    with_credit = [(row, credits[row["ticket"], row["repeat"]]) for row in rows]
    with_credit.sort(key=lambda pair: -pair[1].pull)
    total = sum(credit.pull for _, credit in with_credit)
    trajectories = [
        Mover(row, credit.pull, credit.pull / total, None, credit.advantages[0])
        for row, credit in with_credit[:TRAJECTORIES]
        if credit.pull > 0
    ]
    single = [(abs(pull), row, credit, t) for row, credit in with_credit for t, pull in enumerate(credit.pulls) if pull]
    single.sort(key=lambda found: -found[0])
    tokens = [
        Mover(row, credit.pulls[t], size / total, t, credit.advantages[t], *_context(row, t, tokenizer))
        for size, row, credit, t in single[:TOKENS]
    ]
    return Moved(trajectories, tokens, total, _half([credit.pull for _, credit in with_credit], total), len(rows))


def _context(row: Row, number: int, tokenizer: Any) -> tuple[str, str]:
    ids = row["token_ids"]
    if tokenizer is None:
        return "", f"[{ids[number]}]"
    return tokenizer.decode(ids[max(0, number - _BEFORE) : number]), visible(tokenizer.decode([ids[number]]))


def _half(pulls: Sequence[float], total: float) -> int:
    so_far = 0.0
    for count, pull in enumerate(pulls, start=1):
        so_far += pull
        if so_far >= total / 2:
            return count
    return len(pulls)
