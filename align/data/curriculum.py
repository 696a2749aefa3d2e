"""The difficulty curriculum: prompts that the policy nearly always or hardly ever solves are visited less."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.data.prompts import derive_seed
from align.data.types import Ticket


class CurriculumConfig(BaseModel):
    """Visits by the running pass rate of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float = Field(0.0, ge=0, le=1, description="Prompts with a running pass rate below this are visited less.")
    high: float = Field(1.0, ge=0, le=1, description="Prompts with a running pass rate above this are visited less.")
    newest_weight: float = Field(
        0.5, gt=0, le=1, description="Weight of the newest visit in the running pass rate; 1 forgets the earlier ones."
    )
    visit_probability: float = Field(
        0.25, ge=0.01, le=1, description="Chance that such a prompt is visited all the same when its turn comes."
    )

    @model_validator(mode="after")
    def _low_is_below_high(self) -> CurriculumConfig:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} and high = {self.high} leave no pass rate between them")
        return self


class PassRates:
    """Running pass rates by prompt, and who is visited.

    After a visit with pass rate p: `r = p` if it was the first one, else `r = r + w * (p - r)` with w = newest_weight.
    A prompt with `low <= r <= high`, or that was never visited, is always visited; any other with visit_probability, by a
    draw that (seed, ticket number) decides. So a visit depends on the history of the rates and on nothing else.

    Args:
        cfg: The curriculum.
        seed: The run's seed.
        rates: Running pass rates by prompt id (after a resume).
    """

    def __init__(self, cfg: CurriculumConfig, seed: int, rates: Mapping[str, float] | None = None) -> None:
        self.cfg = cfg
        self.seed = seed
        self.rates: dict[str, float] = dict(rates or {})

    def update(self, prompt_id: str, pass_rate: float) -> None:
        """A group of the prompt had this share of trajectories that passed."""
        before = self.rates.get(prompt_id, pass_rate)
        self.rates[prompt_id] = before + self.cfg.newest_weight * (pass_rate - before)

    def visits(self, ticket: Ticket) -> bool:
        """Whether the prompt of a new ticket is rolled out in its turn."""
        rate = self.rates.get(ticket.prompt.id)
        if rate is None or self.cfg.low <= rate <= self.cfg.high:
            return True
        return derive_seed(self.seed, "visit", ticket.number) < self.cfg.visit_probability * 2**63
