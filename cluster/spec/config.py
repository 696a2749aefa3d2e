"""RunConfig: one TOML file, with overrides, checked as a whole before anything starts. Never mutated afterwards."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from align.algorithm.config import AlgorithmConfig
from align.choices import choices
from align.data.prompts import PromptConfig
from align.learner.critic import CriticConfig
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.rewards.kinds import KINDS, RewardSection, kinds_in, reads_reference, verifier_of
from align.rewards.overlong import OverlongConfig
from align.rewards.reference import ReferenceRewardConfig
from align.rules import Rule, check
from cluster.actors.rollout import RolloutConfig, SamplingConfig
from cluster.actors.scorer import ScorerConfig
from cluster.actors.weights import WeightsConfig
from cluster.faults import ConfigError
from cluster.loop.filtering import FilterConfig
from cluster.loop.quarantine import QuarantineConfig
from cluster.record.alerts import AlertConfig
from cluster.record.sinks.wandb.settings import WandbConfig
from cluster.spec.explanation import explain
from cluster.spec.processor import native_dtype
from cluster.spec.sections import (
    CheckpointSection,
    DeadlinesSection,
    EvaluationSection,
    PolicySection,
    ReferenceSection,
    RunSection,
    Section,
)


class RunConfig(Section):
    """Everything a run needs."""

    run: RunSection
    policy: PolicySection
    reference: ReferenceSection | None = Field(
        None, description="The frozen reference, where reward or KL reads one; evaluations then show the KL to it."
    )
    prompts: PromptConfig
    reward: RewardSection = Field(
        ReferenceRewardConfig(),
        description=choices("What is paid; `kind` says which of these, without one it is reference.", KINDS),
    )
    sampling: SamplingConfig = SamplingConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    filter: FilterConfig = FilterConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    scorer: ScorerConfig = ScorerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    deadlines: DeadlinesSection = DeadlinesSection()
    wandb: WandbConfig = WandbConfig()
    alerts: AlertConfig = AlertConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        check(self._rules())
        return self

    def _rules(self) -> Iterator[Rule]:
        """What the sections ask of each other; the words stand with the section that asks."""
        yield from self._rules_of_the_reference()
        yield from self.algorithm.rules_in_a_run(
            group_size=self.run.group_size,
            max_staleness=self.run.max_staleness,
            num_trajectories=self.run.num_trajectories,
            fewest_trajectories=self.fewest_trajectories,
            has_critic=self.critic is not None,
        )
        yield from self.filter.rules_in_a_run(
            outcome_baseline=self.algorithm.outcome_baseline,
            kl_in_reward=self.algorithm.kl == "reward",
            max_staleness=self.run.max_staleness,
        )
        yield from self.rollout.rules_in_a_run(self.run.group_size)
        yield from self.evaluation.rules_in_a_run()
        yield from self._rules_of_the_weights()
        yield from self._rules_of_sampling()
        yield from self.learner.rules_in_a_run(self.fewest_trajectories)
        yield from self.weights.rules_of_ranks(self.learner.num_ranks)
        for section, optimizer in self.optimizers.items():
            yield from optimizer.rules_in_a_run(section, on_gpu=self.learner.num_gpus > 0)

    def _rules_of_the_reference(self) -> list[Rule]:
        return [
            (
                self.reference is None and bool(self.reference_readers),
                f"a [reference] is needed for {' and '.join(self.reference_readers)}",
            ),
            (
                self.refresh_every > 0 and not self.reference_readers,
                "reference.refresh_every moves a reference that only evaluations read; they stay with the first one",
            ),
        ]

    def _rules_of_the_weights(self) -> Iterator[Rule]:
        engine_gpus = self.rollout.num_gpus
        yield from self.weights.rules_in_a_run(
            learner_gpus=self.learner.num_gpus, num_engines=self.rollout.num_actors, engine_gpus=engine_gpus
        )
        yield from self.policy.rules_in_a_run(transport=self.weights.transport, engine_gpus=engine_gpus)

    def _rules_of_sampling(self) -> Iterator[Rule]:
        for part in kinds_in(self.reward):
            if isinstance(part, OverlongConfig):
                yield from part.rules_in_a_run(self.sampling.max_tokens)
        yield from self.sampling.rules_in_a_run(
            max_staleness=self.run.max_staleness,
            optimizer_steps=self.algorithm.num_epochs * self.algorithm.num_minibatches,
            distillation=self.algorithm.distillation,
            max_model_len=self.rollout.max_model_len,
        )

    @property
    def fewest_trajectories(self) -> int:
        """Trajectories that every step has: where a verifier may fail, two of each group are sure to be left."""
        size = self.run.group_size
        return self.run.prompts_per_step * (min(size, 2) if verifier_of(self.reward) else size)

    @property
    def optimizers(self) -> dict[str, OptimizerConfig]:
        """Those of policy and critic, by their sections."""
        of_critic = {} if self.critic is None else {"critic.optimizer": self.critic.optimizer}
        return {"optimizer": self.optimizer, **of_critic}

    @property
    def reference_readers(self) -> list[str]:
        """What in this run asks the reference at every step; evaluations use one that is there."""
        readers = {
            "the reward": reads_reference(self.reward),
            f"algorithm.kl = {self.algorithm.kl!r}": self.algorithm.kl != "none",
            f"algorithm.distillation = {self.algorithm.distillation!r}": self.algorithm.distillation != "none",
        }
        return [name for name, reads in readers.items() if reads]

    @property
    def refresh_every(self) -> int:
        """Steps between refreshes of the reference; 0 for none."""
        return self.reference.refresh_every if self.reference else 0

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
        on_gpus = self.learner.num_gpus and self.rollout.num_gpus
        return "nccl" if on_gpus and not self.policy.engine_adapter else "object_store"


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
            f"{path}: " + "\n".join(explain(one, RunConfig) for one in error.errors()),
            "correct the keys that are named",
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
