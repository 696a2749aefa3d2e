"""RunConfig: one TOML file, with overrides, checked as a whole before anything starts. Never mutated afterwards."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from align.algorithm.config import GROUP_BASELINES, OUTCOME_BASELINES, AlgorithmConfig
from align.data.prompts import PromptConfig
from align.demo.judges import JUDGES
from align.learner.critic import CriticConfig
from align.learner.learner import LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.adapters import AdapterConfig
from align.rewards.kinds import RewardSection, kinds_in, reads_reference, verifier_of
from align.rewards.overlong import OverlongConfig
from align.rewards.reference import ReferenceRewardConfig
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
    trace: bool = Field(False, description="Write trace.json: what each process did when, for ui.perfetto.dev.")


class ModelSection(Section):
    """A model folder."""

    model: Path = Field(description="Hugging Face folder of a causal language model.")


class PolicySection(ModelSection):
    """The policy: its folder, and what of it is trained."""

    adapter: AdapterConfig | None = Field(
        None, description="Trained instead of the weights; left out: all weights are."
    )

    @property
    def engine_adapter(self) -> AdapterConfig | None:
        """The adapter that engines have as such; None where they have one set of weights."""
        return self.adapter if self.adapter and self.adapter.publish == "adapter" else None


class ReferenceSection(ModelSection):
    """The reference: its folder, and whether it follows the policy."""

    refresh_every: int = Field(
        0,
        ge=0,
        description="Steps after which the reference takes the policy's weights; 0 = never. Evaluations measure the KL to the "
        "first reference all the same.",
    )


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
    """Times for the start and the learner's work; those of other roles are in their sections."""

    room_s: float = Field(3600, ge=0, description="Time to wait for room on a cluster that others keep busy.")
    start_s: float = Field(300, gt=0, description="Time for the learner to load the policy.")
    update_s: float = Field(1800, gt=0, description="Time for one update or one part of an evaluation.")
    save_s: float = Field(600, gt=0, description="Time to export weights or write a checkpoint.")


class RunConfig(Section):
    """Everything a run needs."""

    run: RunSection
    policy: PolicySection
    reference: ReferenceSection | None = Field(
        None, description="The frozen reference, where reward or KL reads one; evaluations then show the KL to it."
    )
    prompts: PromptConfig
    reward: RewardSection = ReferenceRewardConfig()
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
    def _cross_checks(self) -> RunConfig:
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str | None]:
        rollout, algorithm = self.rollout, self.algorithm
        num_trajectories, fewest = self.run.prompts_per_step * self.run.group_size, self.fewest_trajectories
        weighted = algorithm.surrogate == "reinforce" or algorithm.proximal != "behavior"
        return [
            f"a [reference] is needed for {' and '.join(self.reference_readers)}"
            if self.reference is None and self.reference_readers
            else None,
            "reference.refresh_every moves a reference that only evaluations read; they stay with the first one"
            if self.refresh_every and not self.reference_readers
            else None,
            "algorithm.rewards = 'process' needs run.group_size of at least 2: steps are compared within the group"
            if algorithm.rewards == "process" and self.run.group_size < 2
            else None,
            "algorithm.importance = 'none' needs run.max_staleness = 0; with stale tokens use 'truncated'"
            if self.run.max_staleness > 0 and algorithm.importance == "none" and weighted
            else None,
            "algorithm.baseline = 'critic' (bundle ppo has it) needs a section [critic], e.g. with critic.optimizer.lr = 1e-5"
            if algorithm.baseline == "critic" and self.critic is None
            else None,
            "the section [critic] is read by algorithm.baseline = 'critic' alone"
            if algorithm.baseline != "critic" and self.critic is not None
            else None,
            f"algorithm.num_minibatches ({algorithm.num_minibatches}) is above the {fewest} trajectories of a step (two of a "
            "group where a verifier may fail on the others): one would be empty"
            if algorithm.num_minibatches > fewest
            else None,
            f"algorithm.kl_horizon ({algorithm.kl_horizon}) is below the {num_trajectories} trajectories of a step: the "
            "coefficient would jump"
            if algorithm.kl_target is not None and algorithm.kl_horizon < num_trajectories
            else None,
            f"algorithm.baseline = {algorithm.baseline!r} needs run.group_size of at least 2"
            if algorithm.baseline in GROUP_BASELINES and self.run.group_size < 2
            else None,
            "filter.drop_without_signal needs algorithm.baseline = 'group_outcome_mean' or 'leave_one_out': with another one, "
            "groups whose outcomes are all equal have advantages that are not 0"
            if self.filter.drop_without_signal and algorithm.baseline not in OUTCOME_BASELINES
            else None,
            "filter.drop_without_signal does not go with algorithm.kl = 'reward': groups whose outcomes are all equal would "
            "still have KL in their advantages; use kl = 'loss' or 'none'"
            if self.filter.drop_without_signal and algorithm.kl == "reward"
            else None,
            f"filter.max_dropped_batches ({self.filter.max_dropped_batches}) must be above run.max_staleness "
            f"({self.run.max_staleness}): as many batches are in flight beside the one that is waited for"
            if self.filter.drop_without_signal and self.filter.max_dropped_batches <= self.run.max_staleness
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
            f"policy.adapter.publish = 'adapter' needs weights.transport = 'object_store' (not {self.weights.transport!r}): vLLM "
            "takes adapters from files"
            if self.policy.engine_adapter and self.weights.transport in ("nccl", "ipc")
            else None,
            "policy.adapter.publish = 'adapter' needs rollout.num_gpus of at most 1: what each of several GPUs holds of it "
            "is not compared with what was published; 'merged' is"
            if self.policy.engine_adapter and rollout.num_gpus > 1
            else None,
            *self._problems_of_sampling(),
            *self._problems_of_ranks(),
            *(
                f"{name}.offload = true needs learner.num_gpus = 1: of a learner on a CPU the moments are in host memory anyway"
                for name, optimizer in self.optimizers.items()
                if optimizer.offload and not self.learner.num_gpus
            ),
        ]

    def _problems_of_sampling(self) -> list[str | None]:
        sampling, algorithm, rollout = self.sampling, self.algorithm, self.rollout
        penalties = [part for part in kinds_in(self.reward) if isinstance(part, OverlongConfig)]
        return [
            *(
                f"reward 'overlong' begins above {p.max_tokens - p.cache_tokens} tokens, which sampling.max_tokens "
                f"({sampling.max_tokens}) never lets a completion reach"
                for p in penalties
                if p.max_tokens - p.cache_tokens >= sampling.max_tokens
            ),
            "sampling.top_p < 1 or top_k > 0 needs run.max_staleness = 0: the learner renormalises over the tokens that its own "
            "policy keeps, which is what the sampler kept at equal version only"
            if sampling.truncates and self.run.max_staleness > 0
            else None,
            "sampling.top_p < 1 or top_k > 0 needs algorithm.num_epochs = 1 and num_minibatches = 1: after the first optimizer "
            "step the policy keeps other tokens than the sampler did"
            if sampling.truncates and algorithm.num_epochs * algorithm.num_minibatches > 1
            else None,
            f"algorithm.distillation = {algorithm.distillation!r} needs sampling.top_p = 1 and top_k = 0: the divergence is that "
            "of whole distributions"
            if sampling.truncates and algorithm.distillation != "none"
            else None,
            f"sampling.max_tokens ({sampling.max_tokens}) leaves no room for a prompt in rollout.max_model_len "
            f"({rollout.max_model_len})"
            if sampling.max_tokens >= rollout.max_model_len
            else None,
        ]

    def _problems_of_ranks(self) -> list[str | None]:
        learner = self.learner
        if learner.num_ranks == 1:
            return []
        return [
            f"learner.num_ranks ({learner.num_ranks}) is above the {self.fewest_trajectories} trajectories of a step "
            "(two of a group where a verifier may fail on the others): some ranks would have nothing to train on"
            if learner.num_ranks > self.fewest_trajectories
            else None,
            "learner.num_ranks above 1 needs learner.num_cpus or num_gpus above 0, by which Ray places the ranks"
            if not (learner.num_cpus or learner.num_gpus)
            else None,
            "weights.transport = 'ipc' is for a learner on one GPU; with learner.num_ranks above 1 use 'nccl'"
            if self.weights.transport == "ipc"
            else None,
        ]

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


def resolved(cfg: RunConfig) -> dict[str, Any]:
    """The whole config tree, ready for TOML: paths as text, unset values left out."""
    tree: dict[str, Any] = _without_none(cfg.model_dump(mode="json"))
    return tree


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(item) for item in tree] if isinstance(tree, list) else tree
