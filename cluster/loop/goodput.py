"""Goodput: which of the sampled tokens were trained, and what became of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.metrics import Metric

FATES = ("trained", "filtered", "masked", "skipped", "quarantined", "returned", "redone", "left", "waiting")
"""What becomes of a sampled token; the glossary explains each as goodput/FATE_tokens."""


class Goodput:
    """Counts sampled tokens by fate, over all processes of a run: `sampled = sum of all fates`, at any moment.

    `goodput = trained / sampled`. A token counts as sampled once its actor has handed its whole group over: what an actor had
    begun when it died, nobody knows. Evaluations are apart: their tokens are for no update. The record of a run that is
    resumed is its metrics.jsonl, so what was sampled after the last line there is on no record either.

    Attributes:
        counts: Tokens by fate so far; at first those that are given, see `resumed`.
    """

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self.counts = dict.fromkeys(FATES, 0) | dict(counts or {})
        self._last = dict(self.counts)  # at the end of the last step

    @classmethod
    def resumed(cls, lines: Sequence[Mapping[str, Any]], version: int) -> Goodput:
        """What a process takes up that resumes at `version`, from the lines that the run has logged, oldest first.

        Tokens that were waiting at the last line are left; those that were trained beyond `version` are redone.
        """
        lines = [line for line in lines if "goodput/sampled_tokens" in line]
        if not lines:
            return cls()
        counts = {fate: int(lines[-1].get(f"goodput/{fate}_tokens", 0)) for fate in FATES}
        kept = [line for line in lines if line["step"] <= version]
        redone = counts["trained"] - (int(kept[-1]["goodput/trained_tokens"]) if kept else 0)
        moved = {"trained": -redone, "redone": redone, "left": counts["waiting"], "waiting": -counts["waiting"]}
        return cls({fate: counts[fate] + moved.get(fate, 0) for fate in FATES})

    def sample(self, num_tokens: int) -> None:
        """Tokens were handed over; they wait for their fate."""
        self.counts["waiting"] += num_tokens

    def settle(self, num_tokens: int, fate: str) -> None:
        """What became of so many of the waiting tokens."""
        self.counts["waiting"] -= num_tokens
        self.counts[fate] += num_tokens

    def train(self, num_tokens: int, trained: int, masked: int) -> None:
        """An update took so many of the waiting tokens; those that it neither trained nor masked were skipped."""
        for fate, num in (("trained", trained), ("masked", masked), ("skipped", num_tokens - trained - masked)):
            assert num >= 0, "an update trains no more tokens than it was given"
            self.settle(num, fate)

    def metrics(self) -> list[Metric]:
        """The counts, and the goodput of the tokens whose fate was decided since the last call."""
        counts = dict(self.counts)
        settled = {fate: counts[fate] - self._last[fate] for fate in FATES if fate != "waiting"}
        self._last = counts
        return [
            Metric("goodput/sampled_tokens", sum(counts.values())),
            *(Metric(f"goodput/{fate}_tokens", counts[fate]) for fate in FATES),
            Metric("goodput/trained_fraction", settled["trained"] / max(sum(settled.values()), 1)),
        ]


def shares(row: Mapping[str, Any]) -> dict[str, float]:
    """Share of every fate among the sampled tokens, from a row of metrics; they add up to 1. Empty if none were sampled."""
    total = row.get("goodput/sampled_tokens", 0)
    return {fate: row.get(f"goodput/{fate}_tokens", 0) / total for fate in FATES} if total else {}
