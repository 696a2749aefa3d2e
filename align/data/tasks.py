"""Tasks with checkable answers, made on the spot from a seed: rows like those of a prompt file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.extras import extra


class Generated(BaseModel):
    """What every generator takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1, description="Number of prompts.")
    seed: int = Field(0, ge=0, description="Seed of the questions; another one for held-out prompts.")


class SumsConfig(Generated):
    """Additions: `34 + 57 =`, with the sum in column `answer`."""

    generator: Literal["sums"] = Field("sums", description="The generator.")
    max_digits: int = Field(2, ge=1, le=9, description="Both numbers have 1 to this many digits, each length as often.")


class GymConfig(Generated):
    """A generator of the package reasoning-gym, with its answer in column `answer` and its whole entry in `entry`."""

    generator: Literal["reasoning_gym"] = Field("reasoning_gym", description="The generator.")
    dataset: str = Field(description="Name of the task, e.g. 'chain_sum'.")
    options: dict[str, Any] = Field({}, description="Settings of the task, e.g. { max_terms = 2 }.")


TaskConfig = SumsConfig | GymConfig
TaskSection = Annotated[TaskConfig, Field(discriminator="generator")]
GENERATORS = {
    "sums": "additions",
    "reasoning_gym": "a task of the package reasoning-gym (the extra tasks), by the name of its `dataset`",
}
"""What each generator makes."""


def task_rows(cfg: TaskConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with columns `prompt` and `answer`, each with its place ("sums 17").

    Raises:
        ValueError: If the generator is not installed, not known, or refuses its options.
    """
    return _sums(cfg) if isinstance(cfg, SumsConfig) else _gym_entries(cfg)


def _sums(cfg: SumsConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = random.Random(cfg.seed)
    for index in range(cfg.size):
        num_digits = rng.randint(1, cfg.max_digits)
        least = 10 ** (num_digits - 1) if num_digits > 1 else 0
        terms = [rng.randint(least, 10**num_digits - 1) for _ in range(2)]
        yield f"sums {index}", {"prompt": f"{terms[0]} + {terms[1]} =", "answer": str(sum(terms))}


def _gym_entries(cfg: GymConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        dataset = reasoning_gym().create_dataset(cfg.dataset, seed=cfg.seed, size=cfg.size, **cfg.options)
    except (ValueError, TypeError, AssertionError) as error:  # it checks options by assertion
        raise ValueError(f"reasoning-gym refuses the task {cfg.dataset!r} with {cfg.options}: {error}") from None
    for index in range(cfg.size):
        entry = dataset[index]
        row = {"prompt": entry["question"], "answer": entry["answer"], "entry": entry}
        yield f"reasoning-gym {cfg.dataset} {index}", row


def reasoning_gym() -> Any:
    """The package.

    Raises:
        ValueError: If it is not installed.
    """
    return extra("reasoning_gym", "the package reasoning-gym cannot be imported ({error}); pip install 'align[tasks]'")
