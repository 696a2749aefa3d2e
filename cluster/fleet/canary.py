"""The canary: a few fixed sequences on which every engine has to agree with the learner after it has taken weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from cluster.faults import WrongWeights


class Canary:
    """The sequences, and how far engine and learner may be apart on them.

    Args:
        sequences: Token ids.
        limits: Gaps in nats above which a warning is given, and the run stopped.
        warn: Told of a gap above the first limit.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], limits: tuple[float, float], warn: Callable[[str], None]
    ) -> None:
        self.sequences = sequences
        self._limits = limits
        self._warn = warn

    def check(
        self, measured: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], rank: int, version: int
    ) -> float:
        """The gap of one engine.

        Args:
            measured: The engine's log-probabilities of tokens 1.. of each sequence.
            expected: The learner's.
            rank: Of the rollout actor.
            version: That both of them serve.

        Raises:
            WrongWeights: If the gap is above the stop limit.
        """
        gap = canary_gap(measured, expected)
        warn, stop = self._limits
        message = f"version {version}: rollout {rank} and learner differ by {gap:.2g} nats on the canary"
        if not gap <= stop:
            raise WrongWeights(
                f"{message}; the stop limit is {stop:g}",
                "the engine does not serve what was published; check the vLLM version against the tested ones",
            )
        if gap > warn:
            self._warn(f"{message} (warn limit {warn:g}, stop limit {stop:g})")
        return gap


def canary_gap(measured: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference in nats over all tokens; a value that is not finite makes it infinite.

    The mean separates a wrong weight from rounding better than the largest difference does: in bfloat16 single tokens
    differ by half a nat although nothing is wrong, while the mean stays near 0.05.
    """
    pairs = list(zip(itertools.chain(*measured), itertools.chain(*expected), strict=True))
    mean = sum(abs(a - b) for a, b in pairs) / len(pairs)
    return mean if math.isfinite(mean) else math.inf
