"""How numbers become colours: the measures of a token, and the scale that all tokens of a page share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.views.credit import PULL, PULL_MEANING

LEVELS = 6


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that each token has.

    Attributes:
        label: Its short name.
        meaning: One sentence.
    """

    label: str
    meaning: str


MEASURES = {
    "advantage": Measure("advantage", "What the token earned more than the baseline; positive ones are made likelier."),
    "pull": Measure("pull", f"{PULL}. {PULL_MEANING}"),
    "reward": Measure("reward", "What the reward gave to the token itself."),
    "return": Measure("return", "Rewards from the token to the end, not discounted."),
    "logratio": Measure(
        "log-ratio",
        "log π − log μ: the policy when the update began, less the sampler. Fresh tokens show the mismatch of engine and "
        "learner, stale ones how far the policy has moved since.",
    ),
    "logprob": Measure("log-prob", "Log-probability when the token was sampled, in nats; 0 is certain."),
    "reference": Measure("reference", "Log-probability under the reference, in nats; 0 is certain."),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """Levels of colour for sizes up to a limit: level k is `limit * ((k - 1) / n)^2 < |value| <= limit * (k / n)^2`.

    The square keeps small values apart where one is large.

    Attributes:
        limit: The largest size.
    """

    limit: float

    @staticmethod
    def over(values: Iterable[float | None]) -> Scale:
        """The scale up to the largest finite size among the values."""
        return Scale(max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0))

    def level(self, value: float | None) -> str:
        """Class of a colour: "p1" to "p6" above zero, "n1" to "n6" below, "zero", or "none" where there is no number."""
        if value is None or not math.isfinite(value):
            return "none"
        level = math.ceil(LEVELS * math.sqrt(abs(value) / self.limit) - 1e-9) if self.limit else 0
        return f"{'p' if value > 0 else 'n'}{level}" if level else "zero"

    def legend(self, signed: bool) -> list[tuple[str, float]]:
        """(class, end that is farther from zero) of each colour, lowest first; without positive ones unless `signed`."""
        edges = [self.limit * (k / LEVELS) ** 2 for k in range(1, LEVELS + 1)]
        below = [(f"n{k}", -edges[k - 1]) for k in range(LEVELS, 0, -1)]
        above = [(f"p{k}", edges[k - 1]) for k in range(1, LEVELS + 1)] if signed else []
        return [*below, ("zero", 0.0), *above]
