"""Dynamic sampling: groups without signal are dropped and replaced; and what their outcomes say about the prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from align.algorithm.spread import ROUNDING
from align.data.curriculum import CurriculumConfig, PassRates
from align.data.types import Ticket
from align.metrics import Metric
from align.rules import Rule
from cluster.faults import NoSignal
from cluster.loop.fate import Entry, Fate


class FilterConfig(BaseModel):
    """Which groups are not trained, and which prompts are visited less."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop_without_signal: bool = Field(
        False,
        description="Drop groups whose trajectories all have the same outcome (their advantages are 0), and roll out other "
        "prompts in their place until the batch is full.",
    )
    max_dropped_batches: int = Field(
        10, ge=1, description="Groups that may be dropped for one step, in batches; one more ends the run."
    )
    pass_mark: float = Field(
        0.5, allow_inf_nan=False, description="A trajectory passes if its outcome is at least this."
    )
    curriculum: CurriculumConfig | None = Field(
        None, description="Visit prompts less that are too easy or too hard; leave out for none."
    )

    def rules_in_a_run(self, *, outcome_baseline: bool, kl_in_reward: bool, max_staleness: int) -> list[Rule]:
        """What dropping groups asks of the run around it.

        Args:
            outcome_baseline: Whether trajectories are compared by their outcomes alone.
            kl_in_reward: Whether the KL is charged in the reward.
            max_staleness: Versions that a trajectory may be late.
        """
        drops = self.drop_without_signal
        return [
            (
                drops and not outcome_baseline,
                "filter.drop_without_signal needs algorithm.baseline = 'group_outcome_mean' or 'leave_one_out': with another "
                "one, groups whose outcomes are all equal have advantages that are not 0",
            ),
            (
                drops and kl_in_reward,
                "filter.drop_without_signal does not go with algorithm.kl = 'reward': groups whose outcomes are all equal would "
                "still have KL in their advantages; use kl = 'loss' or 'none'",
            ),
            (
                drops and self.max_dropped_batches <= max_staleness,
                f"filter.max_dropped_batches ({self.max_dropped_batches}) must be above run.max_staleness ({max_staleness}): as "
                "many batches are in flight beside the one that is waited for",
            ),
        ]


class Filter:
    """Judges groups by the outcomes of their trajectories, and keeps the pass rates of the prompts.

    Source: Yu et al. (2025), DAPO, section 3.2: only prompts with `0 < number of right answers < G` are trained, and sampling
    goes on until the batch is full of them. Departs: outcomes need not be 0 or 1, a group without signal is one whose outcomes
    are all equal; and a dropped group is replaced by one other prompt, so that nothing is sampled beyond the batch.

    Pass rates change at the end of a step only, in the order of tickets, so they do not depend on which group was ready first.

    Args:
        cfg: The settings.
        groups_per_step: Groups of a batch.
        seed: The run's seed.
        outcome_range: [least, largest] outcome that the learner pays, or None.
        state: From `state`, after a resume.
    """

    def __init__(
        self,
        cfg: FilterConfig,
        groups_per_step: int,
        seed: int,
        outcome_range: tuple[float, float] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        state = state or {"rates": {}, "num_skipped": 0}
        self.cfg = cfg
        self.max_dropped = cfg.max_dropped_batches * groups_per_step
        self.outcome_range = outcome_range
        self.num_skipped: int = state["num_skipped"]
        self._pass_rates = PassRates(cfg.curriculum, seed, state["rates"]) if cfg.curriculum else None

    def visits(self, ticket: Ticket) -> bool:
        """Whether a new ticket is rolled out or skipped; see `align.data.prompts.PromptStream`."""
        if self._pass_rates is None or self._pass_rates.visits(ticket):
            return True
        self.num_skipped += 1
        return False

    def drops(self, outcomes: tuple[float, ...], entries: Iterable[Entry]) -> bool:
        """Whether a group is dropped.

        Args:
            outcomes: Of its trajectories.
            entries: From `Ledger.judge`; those that were filtered count towards the limit.

        Raises:
            NoSignal: If it is one more for this step than the limit.
        """
        if not self.cfg.drop_without_signal or has_signal(outcomes, self.outcome_range):
            return False
        earlier = [entry.pass_rate for entry in entries if entry.fate is Fate.FILTERED]
        rates = [*earlier, self.pass_rate(outcomes)]
        if len(rates) > self.max_dropped:
            easy = sum(rate == 1 for rate in rates)
            raise NoSignal(
                f"{len(rates)} groups of one step were without signal ({easy} too easy: all trajectories reach "
                f"filter.pass_mark; {len(rates) - easy} too hard: none does); the limit is {self.max_dropped}",
                "take easier or harder prompts, a larger run.group_size, or raise filter.max_dropped_batches",
            )
        return True

    def pass_rate(self, outcomes: tuple[float, ...]) -> float:
        """Share of the trajectories that pass; 0 if none was judged."""
        return sum(outcome >= self.cfg.pass_mark for outcome in outcomes) / max(len(outcomes), 1)

    def end_step(self, settled: Iterable[Entry]) -> list[Metric]:
        """Take up the pass rates of the groups that were trained or filtered since the last step, from `Ledger.end_step`."""
        if not self.cfg.drop_without_signal and self._pass_rates is None:
            return []
        settled = list(settled)
        trained = [entry for entry in settled if entry.fate is Fate.TRAINED]
        filtered = [entry for entry in settled if entry.fate is Fate.FILTERED]
        if self._pass_rates:
            for entry in sorted([*trained, *filtered], key=lambda entry: entry.number):
                self._pass_rates.update(entry.prompt_id, entry.pass_rate)
        passed = sum(entry.pass_rate == 1 for entry in filtered)
        return [
            Metric("filter/dropped_passed", passed),
            Metric("filter/dropped_failed", len(filtered) - passed),
            Metric("filter/skipped", self.num_skipped),
            *(Metric("filter/pass_rate", entry.pass_rate) for entry in (*trained, *filtered)),
        ]

    def state(self, settled: Iterable[Entry]) -> dict[str, Any]:
        """Everything that a resumed run needs, ready for JSON.

        Args:
            settled: What the ledger has settled since the last step; see `settled_before`.
        """
        filtered = [entry for entry in settled if entry.fate is Fate.FILTERED]
        dropped = [[entry.number, entry.prompt_id, entry.pass_rate] for entry in filtered]
        rates = self._pass_rates.rates if self._pass_rates else {}
        return {"dropped": dropped, "rates": dict(rates), "num_skipped": self.num_skipped}


def has_signal(outcomes: tuple[float, ...], outcome_range: tuple[float, float] | None) -> bool:
    """Whether outcomes, cut to the range that the learner pays, differ by more than rounding, as the learner counts it.

    A group with an outcome that is not finite is no case for a filter: it goes to the learner, which refuses it.
    """
    if not all(map(math.isfinite, outcomes)):
        return True
    low, high = outcome_range or (-math.inf, math.inf)
    paid = [min(max(outcome, low), high) for outcome in outcomes]
    return not max(paid) - min(paid) <= ROUNDING * max(map(abs, paid))
