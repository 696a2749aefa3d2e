"""Quarantine: trajectories whose reward failed are not trained, are kept with their traceback, and are counted."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from align.metrics import Metric
from align.types import Ticket
from cluster.faults import RewardError


class QuarantineConfig(BaseModel):
    """What becomes of trajectories whose verifier raised, hung, or returned no finite number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_s: float = Field(10, gt=0, description="Time for a verifier to judge one trajectory.")
    max_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
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

    Args:
        cfg: The settings.
        path: quarantine.jsonl of the run folder; lines are added. A prompt that a resumed run rolls out again may be there twice.
        recent: From `state`, after a resume.
    """

    def __init__(self, cfg: QuarantineConfig, path: Path, recent: Sequence[int] = ()) -> None:
        self.cfg = cfg
        self._path = path
        self._recent = deque(recent, cfg.window)  # 1 for a failure, newest last
        self._num_judged = self._num_failed = 0  # since the last step

    def drops(self, ticket: Ticket, failures: Sequence[Failure]) -> bool:
        """Whether too few trajectories of a group are left; its failures are on record then.

        Raises:
            RewardError: If the newest trajectories have more failures than the limit.
        """
        num = len(ticket.seeds)
        self._recent.extend([1] * len(failures) + [0] * (num - len(failures)))
        self._num_judged += num
        self._num_failed += len(failures)
        if failures:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(failure)) + "\n" for failure in failures)
            self._check(failures[-1])
        return num - len(failures) < min(2, num)

    def _check(self, newest: Failure) -> None:
        failed, limit = sum(self._recent), self.cfg.max_fraction * self.cfg.window
        if failed > limit:
            raise RewardError(
                f"the reward failed for {failed} of the last {len(self._recent)} trajectories; the limit is "
                f"quarantine.max_fraction {self.cfg.max_fraction:g} of {self.cfg.window}. The newest was of prompt "
                f"{newest.prompt_id!r}, completion {newest.completion[:200]!r}:\n{newest.traceback}",
                f"correct the reward, or take such prompts out; all failures are in {self._path}",
            )

    def end_step(self) -> list[Metric]:
        """The share of failures among the trajectories judged since the last call."""
        judged, failed = self._num_judged, self._num_failed
        self._num_judged = self._num_failed = 0
        return [Metric("reward/quarantined_fraction", failed / max(judged, 1))]

    def state(self) -> list[int]:
        """Everything that a resumed run needs, ready for JSON."""
        return list(self._recent)
