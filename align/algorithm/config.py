"""Algorithms as named bundles of orthogonal parts. A run file names a bundle and overrides parts of it."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from align.algorithm.bundles import BUNDLES

KL_HORIZON = 10_000  # of Ziegler et al. (2019), in the code that they published
GROUP_BASELINES = ("group_mean", "group_outcome_mean", "leave_one_out")
OUTCOME_BASELINES = ("group_outcome_mean", "leave_one_out")


class AlgorithmConfig(BaseModel):
    """How rewards become a gradient. What is not set comes from the bundle, and what the bundle leaves open from the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal[
        "reinforce",
        "reinforce++",
        "rloo",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "ppo",
        "scalerl",
        "on_policy_distillation",
    ] = Field("reinforce", description="The bundle that the other fields start from.")
    rewards: Literal["token", "outcome", "process", "none"] = Field(
        "token",
        description="Pay each token's reward where it is; the trajectory's sum at its last token; each step's reward at its "
        "end, less the mean over all steps of the group; or no reward, but only what kl = 'reward' charges.",
    )
    reward_range: tuple[float, float] | None = Field(
        None, description="[least, largest] of a token's or an outcome's reward, before KL; leave out for none."
    )
    discount: float = Field(
        1.0, ge=0, le=1, description="Discount of the return, per sampled token; 0 = immediate reward."
    )
    baseline: Literal[
        "none", "batch_mean", "position_mean", "group_mean", "group_outcome_mean", "leave_one_out", "critic"
    ] = Field(
        "none",
        description="What is subtracted from the return: nothing; a mean over all tokens of the batch, of the position or of "
        "the group; the mean outcome of the group's trajectories, or of its other trajectories (RLOO); the value that a critic "
        "learns (section [critic]).",
    )
    gae_lambda: float | None = Field(
        None,
        ge=0,
        le=1,
        description="critic: GAE's lambda; 1 is the whole return less the value, 0 the one-step error.",
    )
    value_clip: float | None = Field(
        None,
        gt=0,
        description="critic: a batch pays for moving a value by this much and no more; left out, or inf, for no limit.",
    )
    group_std: bool = Field(
        False,
        description="Divide advantages by the group's standard deviation of outcomes (GRPO), or of the rewards of steps where "
        "rewards = 'process'.",
    )
    group_std_epsilon: float = Field(
        0.0, ge=0, description="Added to that standard deviation; not needed, but others use 1e-4 to 1e-9."
    )
    whiten: bool = Field(False, description="Scale advantages to mean 0 and standard deviation 1 over the batch.")
    batch_std: bool = Field(
        False, description="Divide advantages by their standard deviation over the trajectories of the batch (ScaleRL)."
    )
    max_advantage: float | None = Field(
        None, gt=0, description="Advantages are cut to +- this, last of all; leave out for none."
    )
    surrogate: Literal["reinforce", "importance_weighted", "ppo_clip", "gspo", "cispo", "soft_gate"] = Field(
        "reinforce",
        description="What is differentiated. All but reinforce have the ratio pi/mu of policy and behaviour in them.",
    )
    proximal: Literal["behavior", "recomputed", "interpolated"] = Field(
        "behavior",
        description="Where the surrogate's ratio starts: the behaviour (PPO), or the policy at the start of the update "
        "(decoupled PPO: importance then weights by proximal/mu), by a forward pass or guessed from each token's version.",
    )
    num_epochs: int = Field(1, ge=1, description="Passes over each batch.")
    num_minibatches: int = Field(
        1,
        ge=1,
        description="Optimizer steps of one pass; each has its share of the trajectories, drawn anew in every pass.",
    )
    clip_low: float = Field(0.2, ge=0, le=1, description="Ratios are clipped at 1 - this; 1 is no lower clip.")
    clip_high: float = Field(0.2, ge=0, description="Ratios are clipped at 1 + this.")
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="ppo_clip: the loss of a token with negative advantage A is at most -this * A; leave out for none.",
    )
    gate_positive: float = Field(
        1.0, gt=0, description="soft_gate: how fast the gradient fades off-policy where the advantage is positive."
    )
    gate_negative: float = Field(1.05, gt=0, description="soft_gate: the same where it is not.")
    aggregation: Literal[
        "sum", "token_mean", "trajectory_mean", "trajectory_token_mean", "prompt_mean", "constant_length"
    ] = Field(
        "sum",
        description="Global denominator of the gradient: 1; sampled tokens; trajectories (of sums, or of means over tokens); "
        "prompts (of means over the tokens of their trajectories); trajectories times loss_length.",
    )
    loss_length: int = Field(
        0, ge=0, description="Tokens, for constant_length: the longest completion that is allowed."
    )
    importance: Literal["none", "truncated", "masked", "rejected"] = Field(
        "truncated",
        description="For reinforce: weight each token by pi/mu; out of bounds it is moved to the bound, or made 0. `none` is "
        "refused when max_staleness > 0. For any surrogate: `rejected` drops what is out of bounds and weights nothing.",
    )
    importance_level: Literal["token", "sequence_mean", "sequence_sum"] = Field(
        "token", description="pi/mu of the token, the trajectory's geometric mean over tokens, or its exact product."
    )
    min_importance_weight: float = Field(0.0, ge=0, le=1, description="Lower bound of importance weights; 0 for none.")
    max_importance_weight: float = Field(2.0, ge=1, description="Upper bound of importance weights.")
    kl: Literal["none", "reward", "loss"] = Field(
        "none",
        description="Where KL(policy || reference) is charged: nowhere, in each token's reward (of the behaviour then), or in "
        "the loss. The reference is taken at temperature 1.",
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3_grad_k2"] = Field(
        "k3", description="d; d^2/2; exp(-d) - 1 + d; the last with the gradient of the second. d = log pi - log P_ref."
    )
    kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the KL term; the first one where kl_target adapts it."
    )
    kl_target: float | None = Field(
        None, gt=0, description="Adapt kl_coefficient until a trajectory's KL is this, in nats; leave out to keep it."
    )
    kl_horizon: int = Field(
        KL_HORIZON, ge=1, description="kl_target: trajectories in which the coefficient changes by at most 20%."
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of the entropy bonus in the loss, per token.")
    entropy_guard: Literal["none", "clip_cov", "kl_cov"] = Field(
        "none",
        description="Tokens whose log-probability and advantage vary together most lose their gradient (clip_cov), or pay "
        "guard_coefficient * KL(mu || pi), estimated by k3 (kl_cov).",
    )
    guard_fraction: float = Field(2e-4, gt=0, le=1, description="Share of the batch's tokens that are guarded.")
    guard_band: tuple[float, float] = Field(
        (1.0, 5.0), description="clip_cov: (least, largest) covariance of a token that may be guarded."
    )
    guard_coefficient: float = Field(1.0, gt=0, description="kl_cov: weight of the KL divergence.")
    distillation: Literal["none", "reverse_kl", "forward_kl", "jensen_shannon"] = Field(
        "none",
        description="Divergence from the reference's next-token distribution in the loss: KL(pi || ref), KL(ref || pi), or "
        "the generalized Jensen-Shannon divergence.",
    )
    distillation_top_k: int = Field(
        0,
        ge=0,
        description="Tokens that the reference ranks highest, all others counting as one; 0 is the whole vocabulary, "
        "which has to travel: for small ones.",
    )
    distillation_coefficient: float = Field(1.0, gt=0, description="Weight of the divergence in the loss, per token.")
    distillation_mixture: float = Field(
        0.5, gt=0, lt=1, description="jensen_shannon: weight of the reference in the mixture (beta in GKD)."
    )
    supervised_coefficient: float = Field(
        0.0, ge=0, description="Weight of -log pi in the loss, for trajectories that earned supervised_min_outcome."
    )
    supervised_min_outcome: float | None = Field(
        None, description="Least sum of rewards of a trajectory that is imitated, e.g. 1 for a right answer."
    )
    mask_overlong: bool = Field(
        False, description="Trajectories cut off by length carry no loss; they still count in baselines."
    )

    @property
    def num_top(self) -> int | None:
        """How many of the reference's likeliest tokens are needed at each place: 0 for all, None for none."""
        return None if self.distillation == "none" else self.distillation_top_k

    @property
    def reads_reference(self) -> bool:
        """Whether a term beside the reward asks the reference."""
        return self.kl != "none" or self.distillation != "none"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_bundle(cls, data: Any) -> Any:
        """Parts that are set win over those of the bundle."""
        name = data.get("name", "reinforce") if isinstance(data, dict) else None
        return {**BUNDLES[name], **data} if isinstance(name, str) and name in BUNDLES else data

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AlgorithmConfig:
        if problems := [problem for problem, is_so in (self._contradictions() | self._unread()).items() if is_so]:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> dict[str, bool]:
        """Parts that do not go together: what is wrong, and whether it is so."""
        outcome_baseline, critic = self.baseline in OUTCOME_BASELINES, self.baseline == "critic"
        decoupled, several_steps = self.proximal != "behavior", self.num_epochs * self.num_minibatches > 1
        low, high = self.reward_range or (-math.inf, math.inf)
        return {
            f"baseline = {self.baseline!r} compares whole trajectories: it needs rewards = 'outcome' and discount = 1": (
                outcome_baseline and (self.rewards != "outcome" or self.discount != 1)
            ),
            "group_std = true needs baseline = 'group_outcome_mean' or 'leave_one_out', or rewards = 'process'": (
                self.group_std and not outcome_baseline and self.rewards != "process"
            ),
            "rewards = 'process' are compared within the group already: baseline must be 'none'": (
                self.rewards == "process" and self.baseline != "none"
            ),
            "rewards = 'process' with kl = 'reward' would compare the KL of steps; charge it in the loss": (
                self.rewards == "process" and self.kl == "reward"
            ),
            "rewards = 'none' leaves nothing to learn from: it needs kl = 'reward' or a distillation": (
                self.rewards == "none" and self.kl != "reward" and self.distillation == "none"
            ),
            "batch_std = true beside group_std or whiten would scale advantages twice": (
                self.batch_std and (self.group_std or self.whiten)
            ),
            f"reward_range = [{low}, {high}] is empty": not low < high,
            f"surrogate = {self.surrogate!r} has the ratio pi/mu in it: importance must be 'none', or it would count twice": (
                self.surrogate != "reinforce" and not decoupled and self.importance not in ("none", "rejected")
            ),
            f"guard_band = {list(self.guard_band)} is empty": not self.guard_band[0] < self.guard_band[1],
            "supervised_coefficient and supervised_min_outcome need each other": (
                (self.supervised_coefficient > 0) != (self.supervised_min_outcome is not None)
            ),
            "baseline = 'critic' needs gae_lambda, e.g. 0.95, or 1 for the whole return": critic
            and self.gae_lambda is None,
            f"proximal = {self.proximal!r} is where a ratio starts, and surrogate = 'reinforce' has none": (
                decoupled and self.surrogate == "reinforce"
            ),
            "surrogate = 'gspo' has one ratio per sequence: importance_level must be sequence_mean or sequence_sum": (
                self.surrogate == "gspo" and self.importance != "none" and self.importance_level == "token"
            ),
            "num_epochs or num_minibatches above 1 leaves the sampler's policy behind after the first optimizer step: "
            "surrogate = 'reinforce' needs importance = 'truncated' or 'masked' then": (
                several_steps and self.surrogate == "reinforce" and self.importance == "none"
            ),
            "aggregation = 'constant_length' needs loss_length, e.g. the value of sampling.max_tokens": (
                self.aggregation == "constant_length" and self.loss_length == 0
            ),
            f"kl = {self.kl!r} needs a kl_coefficient above 0": self.kl != "none" and self.kl_coefficient == 0,
            "kl_estimator = 'k1' in the loss has an expected gradient of 0; choose k2, k3 or k3_grad_k2": (
                self.kl == "loss" and self.kl_estimator == "k1"
            ),
            "kl_estimator = 'k3_grad_k2' differs from k3 in its gradient only, and a reward has none; choose k3": (
                self.kl == "reward" and self.kl_estimator == "k3_grad_k2"
            ),
        }

    def _unread(self) -> dict[str, bool]:
        """Numbers that were set and change nothing: what is wrong, and whether it is so."""
        critic = self.baseline == "critic"
        return {
            "reward_range is read by nothing: rewards is 'none'": (
                self.rewards == "none" and self.reward_range is not None
            ),
            "group_std_epsilon is read by nothing: group_std is false": self.group_std_epsilon > 0
            and not self.group_std,
            "gate_positive and gate_negative are read by surrogate = 'soft_gate' alone": (
                self.surrogate != "soft_gate" and self._is_set("gate_positive", "gate_negative")
            ),
            "guard_fraction, guard_band and guard_coefficient are read by nothing: entropy_guard is 'none'": (
                self.entropy_guard == "none" and self._is_set("guard_fraction", "guard_band", "guard_coefficient")
            ),
            "distillation_top_k, distillation_coefficient and distillation_mixture are read by nothing: distillation is 'none'": (
                self.distillation == "none"
                and self._is_set("distillation_top_k", "distillation_coefficient", "distillation_mixture")
            ),
            "gae_lambda is read by baseline = 'critic' alone": self.gae_lambda is not None and not critic,
            "value_clip is read by baseline = 'critic' alone": self.value_clip is not None and not critic,
            "kl_target is read by nothing: kl is 'none'": self.kl == "none" and self.kl_target is not None,
            "kl_horizon is read by nothing: there is no kl_target": self.kl_target is None
            and self.kl_horizon != KL_HORIZON,
            "dual_clip is read by surrogate = 'ppo_clip' alone": (
                self.dual_clip is not None and self.surrogate != "ppo_clip"
            ),
            "loss_length is read by aggregation = 'constant_length' alone": (
                self.loss_length > 0 and self.aggregation != "constant_length"
            ),
            "kl_coefficient is read by nothing: kl is 'none'": self.kl == "none" and self.kl_coefficient > 0,
        }

    def _is_set(self, *names: str) -> bool:
        """Whether one of the fields differs from its default."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in names)
