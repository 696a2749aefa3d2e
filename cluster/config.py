"""RunConfig: one TOML file, with overrides, checked as a whole before anything starts. Never mutated afterwards."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from align.algorithms import GROUP_BASELINES, AlgorithmConfig
from align.judges import JUDGES
from align.learner import LearnerConfig
from align.optimizer import OptimizerConfig
from align.prompts import PromptConfig
from align.rewards.reference import ReferenceRewardConfig
from cluster.faults import ConfigError
from cluster.processor import native_dtype
from cluster.rollout import RolloutConfig, SamplingConfig
from cluster.scorer import ScorerConfig
from cluster.sinks import WandbConfig
from cluster.weights import WeightsConfig


class Section(BaseModel):
    """A part of the run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Section):
    """The run as a whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="Name, used for the folder and in W&B.")
    dir: Path | None = Field(
        None, description="Run folder; left out: runs/NAME-DATE-TIME. A stopped run resumes there."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    prompts_per_step: int = Field(ge=1, description="Prompts (groups) of one step.")
    group_size: int = Field(1, ge=1, description="Trajectories per prompt.")
    max_staleness: int = Field(0, ge=0, description="Versions a trajectory may be late; 0 is exact on-policy training.")


class ModelSection(Section):
    """A model folder."""

    model: Path = Field(description="Hugging Face folder of a causal language model.")


class EvaluationSection(Section):
    """Evaluations on fixed prompts: sampling, exact KL to the reference, a judge."""

    heldout: PromptConfig | None = Field(None, description="Prompts that are never trained on.")
    every: int = Field(
        10, ge=1, description="Steps between evaluations; the first is before step 1, the last at the end."
    )
    max_prompts: int = Field(64, ge=1, description="Prompts per set.")
    group_size: int = Field(1, ge=1, description="Trajectories per prompt.")
    judge: str | None = Field(None, description="Judge of finished text: 'grammatical', or left out.")
    num_samples: int = Field(
        8, ge=0, description="Prompts per set whose answers are shown before, after and by the reference."
    )


class CheckpointSection(Section):
    """Checkpoints."""

    every: int = Field(20, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")


class DeadlinesSection(Section):
    """Times for the learner's work; those of other roles are in their sections."""

    start_s: float = Field(300, gt=0, description="Time for the learner to load the policy.")
    update_s: float = Field(1800, gt=0, description="Time for one update or one part of an evaluation.")
    save_s: float = Field(600, gt=0, description="Time to export weights or write a checkpoint.")


class RunConfig(Section):
    """Everything a run needs."""

    run: RunSection
    policy: ModelSection
    reference: ModelSection
    prompts: PromptConfig
    reward: ReferenceRewardConfig = ReferenceRewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    scorer: ScorerConfig = ScorerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str | None]:
        rollout, sampling, algorithm = self.rollout, self.sampling, self.algorithm
        return [
            "sampling.top_p and top_k must be 1 and 0: the learner's log-probabilities cover all tokens, and a truncated "
            "sampler would not match them"
            if sampling.top_p != 1 or sampling.top_k != 0
            else None,
            "algorithm.importance = 'none' needs run.max_staleness = 0; with stale tokens use 'truncated'"
            if self.run.max_staleness > 0 and algorithm.importance == "none" and algorithm.surrogate == "reinforce"
            else None,
            f"algorithm.baseline = {algorithm.baseline!r} needs run.group_size of at least 2"
            if algorithm.baseline in GROUP_BASELINES and self.run.group_size < 2
            else None,
            f"sampling.max_tokens ({sampling.max_tokens}) leaves no room for a prompt in rollout.max_model_len "
            f"({rollout.max_model_len})"
            if sampling.max_tokens >= rollout.max_model_len
            else None,
            f"run.group_size ({self.run.group_size}) is above rollout.max_num_seqs ({rollout.max_num_seqs}): a group would "
            "never run at once"
            if self.run.group_size > rollout.max_num_seqs
            else None,
            f"evaluation.judge is {self.evaluation.judge!r}; there are: {', '.join(JUDGES)}"
            if self.evaluation.judge is not None and self.evaluation.judge not in JUDGES
            else None,
            f"weights.transport = {self.weights.transport!r} needs GPUs for learner and engines"
            if self.weights.transport in ("nccl", "ipc") and not (self.learner.num_gpus and rollout.num_gpus)
            else None,
            "weights.transport = 'ipc' is for one engine on the learner's GPU: rollout.num_actors = 1 and num_gpus = 1"
            if self.weights.transport == "ipc" and (rollout.num_actors, rollout.num_gpus) != (1, 1)
            else None,
            *self._problems_of_ranks(),
        ]

    def _problems_of_ranks(self) -> list[str | None]:
        learner, num_trajectories = self.learner, self.run.prompts_per_step * self.run.group_size
        if learner.num_ranks == 1:
            return []
        return [
            f"learner.num_ranks ({learner.num_ranks}) is above the {num_trajectories} trajectories of a step "
            "(run.prompts_per_step * run.group_size): some ranks would have nothing to train on"
            if learner.num_ranks > num_trajectories
            else None,
            "learner.num_ranks above 1 needs learner.num_cpus or num_gpus above 0, by which Ray places the ranks"
            if not (learner.num_cpus or learner.num_gpus)
            else None,
            "weights.transport = 'ipc' is for a learner on one GPU; with learner.num_ranks above 1 use 'nccl'"
            if self.weights.transport == "ipc"
            else None,
        ]

    @cached_property
    def engine_dtype(self) -> str:
        """Type of the engines' weights and activations."""
        if self.rollout.dtype != "auto":
            return self.rollout.dtype
        return native_dtype(on_gpu=self.rollout.num_gpus > 0).dtype

    @property
    def learner_dtype(self) -> str:
        """Type of the learner's matrix products: that of the engines, so that the two agree as well as they can."""
        return self.engine_dtype

    @property
    def scorer_dtype(self) -> str:
        """Type of the scorer's matrix products."""
        return self.engine_dtype

    @property
    def transport(self) -> str:
        """How weights travel."""
        if self.weights.transport != "auto":
            return self.weights.transport
        return "nccl" if self.learner.num_gpus and self.rollout.num_gpus else "object_store"


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides `section.key=value` (the value in TOML, or a bare string), and check it.

    Raises:
        ConfigError: Naming the place, what was expected and what came.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"run file {path} does not exist", "see deploy/runs/ for complete ones") from None
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read: {error.strerror}", "name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} is not valid TOML: {error}", "correct the line that is named") from None
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: " + "\n".join(map(_explain, error.errors())), "correct the keys that are named"
        ) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} is not of the form section.key=value", "e.g. --set run.steps=10")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section", "check the key")
    tree[last] = value


def _explain(error: Any) -> str:
    """One of pydantic's errors in our words."""
    place = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {place!r}{_nearest(error['loc'])}"
        case "missing":
            return f"{place!r} is missing"
        case "value_error":
            return f"{place + ': ' if place else ''}{error['ctx']['error']}"
    return f"{place}: {error['msg']}, got {error['input']!r}"


def _nearest(location: tuple[Any, ...]) -> str:
    model: Any = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(part)
        model = field and _section_of(field.annotation)
        if model is None:
            return ""
    names = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
