"""Measured rates, and the time of a step that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.faults import ConfigError
from cluster.spec.config import RunConfig


class Rates(BaseModel):
    """Measured rates, for the estimate of a step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generate: float = Field(gt=0, description="Completion tokens per second of one rollout actor.")
    train: float = Field(gt=0, description="Tokens (prompt and completion) per second of the learner.")
    publish_s: float = Field(0, ge=0, description="Seconds of one publication.")
    completion: float = Field(gt=0, description="Mean tokens of a completion.")
    prompt: float = Field(0, ge=0, description="Mean tokens of a prompt.")


def read_rates(settings: Sequence[str]) -> Rates:
    """Rates from `NAME=VALUE` texts.

    Raises:
        ConfigError: If a name is unknown, a value is no number, or one that is needed is missing.
    """
    try:
        return Rates.model_validate(dict(setting.split("=", 1) for setting in settings))
    except (ValidationError, ValueError) as error:
        names = ", ".join(f"{name} ({field.description})" for name, field in Rates.model_fields.items())
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "expected NAME=VALUE"
        raise ConfigError(f"--rate {' '.join(settings)}: {what}", f"there are: {names}") from None


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated times of a step, in seconds, and the idle shares."""

    generate_s: float
    update_s: float
    publish_s: float
    step_s: float
    learner_idle: float
    actors_idle: float

    @classmethod
    def of(cls, cfg: RunConfig, rates: Rates) -> StepTime:
        """Generation and update follow each other at staleness 0 and overlap above; a publication stops both.

        `step = generate + update + publish` or `max(generate, update) + publish`; idle share = 1 - own work / step.
        """
        trajectories = cfg.run.prompts_per_step * cfg.run.group_size
        generate = trajectories * rates.completion / (cfg.rollout.num_actors * rates.generate)
        update = trajectories * (rates.prompt + rates.completion) / rates.train
        work = max(generate, update) if cfg.run.max_staleness else generate + update
        step = work + rates.publish_s
        return cls(generate, update, rates.publish_s, step, 1 - update / step, 1 - generate / step)
