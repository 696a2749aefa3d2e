"""The tokens of trajectories as the pages show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.record.trajectories import Row, returns
from cluster.views.credit import Credit
from cluster.views.web.colours import MEASURES, Scale


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token.

    Attributes:
        number: Its place, from 0.
        text: What it says, white space made visible.
        version: The policy version that sampled it.
        values: Its measures by name; None where one is not recorded.
    """

    number: int
    text: str
    version: int
    values: Mapping[str, float | None]

    @property
    def title(self) -> str:
        """All numbers, for the pointer that rests on it."""
        known = [f"{MEASURES[name].label} {value:.4g}" for name, value in self.values.items() if value is not None]
        return f"token {self.number}, version {self.version}: " + ", ".join(known)


def tokens(row: Row, tokenizer: Any, credit: Credit | None) -> list[Token]:
    """Those of one trajectory; without a tokenizer they are shown by their ids."""
    num = len(row["token_ids"])
    unknown = [None] * num
    columns = {
        "advantage": credit.advantages if credit else unknown,
        "pull": credit.pulls if credit else unknown,
        "reward": row["rewards"],
        "return": returns(row["rewards"]),
        "logratio": _log_ratios(row) or unknown,
        "logprob": row["behavior_logprobs"],
        "reference": row["ref_logprobs"] or unknown,
    }
    return [
        Token(
            number,
            f"[{token_id}]" if tokenizer is None else visible(tokenizer.decode([token_id])),
            row["versions"][number],
            {name: column[number] for name, column in columns.items()},
        )
        for number, token_id in enumerate(row["token_ids"])
    ]


def _log_ratios(row: Row) -> list[float | None]:
    """None for a token without loss; nothing if the update did not end."""
    pairs = zip(row.get("policy_logprobs") or [], row["behavior_logprobs"], strict=False)
    return [None if math.isnan(policy) else policy - behavior for policy, behavior in pairs]


def visible(text: str) -> str:
    """The text with line ends, tabs and nothing at all made visible."""
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"


@dataclass(frozen=True, slots=True)
class Colouring:
    """What the colours of a page mean.

    Attributes:
        measure: Name of the measure, one of `offered`.
        offered: Measures that have a number on this page.
        scale: Of the measure.
        signed: Whether a value is above zero.
    """

    measure: str
    offered: tuple[str, ...]
    scale: Scale
    signed: bool

    @staticmethod
    def of(shown: Sequence[Token], wanted: str | None) -> Colouring:
        """By the measure that is wanted, or the first that is there."""
        offered = tuple(name for name in MEASURES if any(t.values[name] is not None for t in shown))
        measure = wanted if wanted in offered else offered[0]
        values = [t.values[measure] for t in shown]
        return Colouring(measure, offered, Scale.over(values), any(v is not None and v > 0 for v in values))

    def level(self, token: Token) -> str:
        """Class of its colour."""
        return self.scale.level(token.values[self.measure])

    @property
    def legend(self) -> list[tuple[str, float]]:
        """The colours in use, lowest first, each with the end that is farther from zero."""
        return self.scale.legend(self.signed) if self.scale.limit else []
