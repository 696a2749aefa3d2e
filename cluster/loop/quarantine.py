"""Quarantine: trajectories whose reward failed are not trained, are kept with their traceback, and are counted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from align.data.types import Ticket
from align.metrics import Metric
from cluster.faults import RewardError
from cluster.loop.fate import Entry
from cluster.redaction import redact


class QuarantineConfig(BaseModel):
    """What becomes of trajectories whose verifier raised, hung, or returned no finite number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_s: float = Field(10, gt=0, description="Time for a verifier to judge one trajectory.")
    max_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the last `window` trajectories that may be quarantined; more end the run. 0: none may.",
    )
    window: int = Field(200, ge=1, description="Newest judged trajectories that max_fraction is a share of.")


@dataclass(frozen=True, slots=True)
class Failure:
    """A trajectory whose reward failed.

    Attributes:
        ticket: Number of its ticket.
        prompt_id: Name of its prompt.
        prompt: The prompt's text.
        completion: The sampled text.
        seed: Its sampling seed.
        num_tokens: Sampled tokens.
        traceback: What the reward raised, and where.
    """

    ticket: int
    prompt_id: str
    prompt: str
    completion: str
    seed: int
    num_tokens: int
    traceback: str


class Quarantine:
    """Judges groups by their failures, writes each to quarantine.jsonl, and ends the run above a share of them.

    A trajectory in quarantine is as if it had never been sampled: it is in no baseline, no advantage and no denominator. A
    group of which fewer than two trajectories are left (of groups of one: none) is dropped, and another prompt takes its slot.
    That is for verifiers, which judge one trajectory with code of others. A reference model that fails, fails for all, so its
    errors end the run; and so does, by way of `scorer.max_restarts`, a verifier that takes its process down.

    What is on record for good is in the order of tickets, so it does not depend on which group was ready first.

    Args:
        cfg: The settings.
        path: quarantine.jsonl of the run folder; lines are added. A prompt that a resumed run rolls out again may be there twice.
        state: From `state`, after a resume.
    """

    def __init__(self, cfg: QuarantineConfig, path: Path, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"recent": ""}
        self.cfg = cfg
        self._path = path
        self._recent = deque(map(int, state["recent"]), cfg.window)  # 1 for a failure; of earlier steps, newest last

    def drops(self, ticket: Ticket, failures: Sequence[Failure], entries: Iterable[Entry]) -> bool:
        """Whether too few trajectories of a group are left; its failures are on record then.

        Args:
            ticket: Of the group.
            failures: Of the group.
            entries: From `Ledger.judge`.

        Raises:
            RewardError: If the newest trajectories have more failures than the limit.
        """
        if failures:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(asdict(failure) | {"traceback": redact(failure.traceback)}) + "\n"
                    for failure in failures
                )
            self._check(failures[-1], entries)
        num = len(ticket.seeds)
        return num - len(failures) < min(2, num)

    def _check(self, newest: Failure, entries: Iterable[Entry]) -> None:
        recent = deque([*self._recent, *_marks(entries)], self.cfg.window)
        if sum(recent) > self.cfg.max_fraction * self.cfg.window:
            raise RewardError(
                f"the reward failed for {sum(recent)} of the last {len(recent)} trajectories; the limit is "
                f"quarantine.max_fraction {self.cfg.max_fraction:g} of {self.cfg.window}. The newest was of prompt "
                f"{newest.prompt_id!r}, completion {newest.completion[:200]!r}:\n{newest.traceback}",
                f"correct the reward, or take such prompts out; all failures are in {self._path}",
            )

    def end_step(self, settled: Sequence[Entry]) -> list[Metric]:
        """The share of failures in the groups that were trained or dropped since the last step, from `Ledger.end_step`."""
        self._recent.extend(_marks(settled))
        failed, judged = sum(entry.num_failed for entry in settled), sum(entry.num_judged for entry in settled)
        return [Metric("reward/quarantined_fraction", failed / max(judged, 1))]

    def state(self, settled: Iterable[Entry]) -> dict[str, Any]:
        """Everything that a resumed run needs, ready for JSON. Groups in flight are judged again.

        Args:
            settled: What the ledger has settled since the last step; see `settled_before`.
        """
        decided = [[entry.number, entry.num_judged, entry.num_failed] for entry in _by_number(settled)]
        return {"recent": "".join(map(str, self._recent)), "decided": decided}


def _by_number(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.number)


def _marks(entries: Iterable[Entry]) -> Iterator[int]:
    """1 for each failure of a group and 0 for each other trajectory, group by group in the order of tickets."""
    for entry in _by_number(entries):
        yield from [1] * entry.num_failed + [0] * (entry.num_judged - entry.num_failed)
