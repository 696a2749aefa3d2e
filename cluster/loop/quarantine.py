"""Quarantine: trajectories whose reward failed are not trained, are kept with their traceback, and are counted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from align.data.types import Ticket
from align.metrics import Metric
from cluster.faults import RewardError
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
    """Counts failures, writes each to quarantine.jsonl, and ends the run above a share of them.

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
        state = state or {"recent": "", "decided": []}
        self.cfg = cfg
        self._path = path
        self._recent = deque(map(int, state["recent"]), cfg.window)  # 1 for a failure; of earlier steps, newest last
        self._judged = {ticket: (num, failed) for ticket, num, failed in state["decided"]}  # trajectories, since then

    def drops(self, ticket: Ticket, failures: Sequence[Failure]) -> bool:
        """Whether too few trajectories of a group are left; its failures are on record then.

        Raises:
            RewardError: If the newest trajectories have more failures than the limit.
        """
        num = len(ticket.seeds)
        self._judged[ticket.number] = (num, len(failures))
        if failures:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(asdict(failure) | {"traceback": redact(failure.traceback)}) + "\n"
                    for failure in failures
                )
            self._check(failures[-1])
        return num - len(failures) < min(2, num)

    def _check(self, newest: Failure) -> None:
        recent = deque(
            [*self._recent, *_marks(self._judged[ticket] for ticket in sorted(self._judged))], self.cfg.window
        )
        if sum(recent) > self.cfg.max_fraction * self.cfg.window:
            raise RewardError(
                f"the reward failed for {sum(recent)} of the last {len(recent)} trajectories; the limit is "
                f"quarantine.max_fraction {self.cfg.max_fraction:g} of {self.cfg.window}. The newest was of prompt "
                f"{newest.prompt_id!r}, completion {newest.completion[:200]!r}:\n{newest.traceback}",
                f"correct the reward, or take such prompts out; all failures are in {self._path}",
            )

    def end_step(self, in_flight: Container[int]) -> list[Metric]:
        """The share of failures in the groups that were trained or dropped since the last call: all but those in flight."""
        decided = [self._judged.pop(ticket) for ticket in sorted(self._judged) if ticket not in in_flight]
        self._recent.extend(_marks(decided))
        failed, judged = sum(failed for _, failed in decided), sum(num for num, _ in decided)
        return [Metric("reward/quarantined_fraction", failed / max(judged, 1))]

    def state(self, in_flight: Container[int]) -> dict[str, Any]:
        """Everything that a resumed run needs, ready for JSON. Groups in flight are judged again."""
        decided = [[ticket, *numbers] for ticket, numbers in sorted(self._judged.items()) if ticket not in in_flight]
        return {"recent": "".join(map(str, self._recent)), "decided": decided}


def _marks(groups: Iterable[tuple[int, int]]) -> Iterator[int]:
    """1 for each failure of a group and 0 for each other trajectory, from (trajectories, failures)."""
    for num, failed in groups:
        yield from [1] * failed + [0] * (num - failed)
