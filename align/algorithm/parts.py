"""The parts that an algorithm is made of: every field of a run file's section [algorithm]."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from align.algorithm.bundles import BUNDLE_MEANINGS
from align.choices import choices

KL_HORIZON = 10_000  # of Ziegler et al. (2019), in the code that they published


class AlgorithmParts(BaseModel):
    """Each part by itself; `AlgorithmConfig` knows which of them go together."""

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
    ] = Field("reinforce", description=choices("The bundle that the other fields start from.", BUNDLE_MEANINGS))
    rewards: Literal["token", "outcome", "process", "none"] = Field(
        "token",
        description=choices(
            "Where rewards are paid.",
            {
                "token": "each token's where it is",
                "outcome": "the trajectory's sum at its last token",
                "process": "each step's at its end, less the mean over all steps of the group",
                "none": "no reward, but only what kl = 'reward' charges",
            },
        ),
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
        description=choices(
            "What is subtracted from the return.",
            {
                "none": "nothing",
                "batch_mean": "the mean over all tokens of the batch",
                "position_mean": "the mean over the tokens at the same place of their completions",
                "group_mean": "the mean over all tokens of the group",
                "group_outcome_mean": "the mean outcome of the group's trajectories",
                "leave_one_out": "the mean outcome of the group's other trajectories (RLOO)",
                "critic": "the value that a critic learns (section [critic])",
            },
        ),
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
        description=choices(
            "What is differentiated, A being the advantage. All but reinforce have the ratio r = pi/mu of policy and behaviour "
            "in them.",
            {
                "reinforce": "A log pi",
                "importance_weighted": "r A, without a clip",
                "ppo_clip": "min(r A, clip(r) A), r clipped to [1 - clip_low, 1 + clip_high] (PPO)",
                "gspo": "the same with one ratio per sequence, the geometric mean of those of its tokens (GSPO)",
                "cispo": "clip(r) A log pi, where the clipped ratio is a constant and no token loses its gradient (CISPO)",
                "soft_gate": "a sigmoid of r - 1 times A, whose gradient fades as r leaves 1 (SAPO)",
            },
        ),
    )
    proximal: Literal["behavior", "recomputed", "interpolated"] = Field(
        "behavior",
        description=choices(
            "Where the surrogate's ratio starts: at the behaviour, or at the policy at the start of the update (decoupled PPO: "
            "importance then weights by proximal/mu).",
            {
                "behavior": "the behaviour (PPO)",
                "recomputed": "the policy at the start of the update, by a forward pass",
                "interpolated": "the same, guessed from each token's version",
            },
        ),
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
        description=choices(
            "How losses of tokens become one: their sum over a denominator of the whole batch.",
            {
                "sum": "over 1",
                "token_mean": "over the sampled tokens",
                "trajectory_mean": "over the trajectories: the mean of their sums",
                "trajectory_token_mean": "the mean over trajectories of the means over their tokens",
                "prompt_mean": "the mean over prompts of the means over the tokens of their trajectories",
                "constant_length": "over trajectories times loss_length",
            },
        ),
    )
    loss_length: int = Field(
        0, ge=0, description="Tokens, for constant_length: the longest completion that is allowed."
    )
    importance: Literal["none", "truncated", "masked", "rejected"] = Field(
        "truncated",
        description=choices(
            "Weights pi/mu of tokens, and what becomes of one that is out of bounds. They are for reinforce; rejected is for any "
            "surrogate.",
            {
                "none": "no weights; refused when max_staleness > 0",
                "truncated": "it is moved to the bound",
                "masked": "it is made 0",
                "rejected": "its token is dropped, and no other one is weighted",
            },
        ),
    )
    importance_level: Literal["token", "sequence_mean", "sequence_sum"] = Field(
        "token",
        description=choices(
            "What pi/mu is taken of.",
            {
                "token": "each token",
                "sequence_mean": "the trajectory: the geometric mean over its tokens",
                "sequence_sum": "the trajectory: the exact product over its tokens",
            },
        ),
    )
    min_importance_weight: float = Field(0.0, ge=0, le=1, description="Lower bound of importance weights; 0 for none.")
    max_importance_weight: float = Field(2.0, ge=1, description="Upper bound of importance weights.")
    kl: Literal["none", "reward", "loss"] = Field(
        "none",
        description=choices(
            "Where KL(policy || reference) is charged; the reference is taken at temperature 1.",
            {
                "none": "nowhere",
                "reward": "in each token's reward, where it is that of the behaviour",
                "loss": "in the loss",
            },
        ),
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3_grad_k2"] = Field(
        "k3",
        description=choices(
            "How that KL is estimated from a sampled token, with d = log pi - log P_ref.",
            {
                "k1": "d",
                "k2": "d^2/2",
                "k3": "exp(-d) - 1 + d",
                "k3_grad_k2": "the value of k3 with the gradient of k2",
            },
        ),
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
        description=choices(
            "What becomes of the tokens whose log-probability and advantage vary together most.",
            {
                "none": "nothing",
                "clip_cov": "they lose their gradient",
                "kl_cov": "they pay guard_coefficient * KL(mu || pi), estimated by k3",
            },
        ),
    )
    guard_fraction: float = Field(2e-4, gt=0, le=1, description="Share of the batch's tokens that are guarded.")
    guard_band: tuple[float, float] = Field(
        (1.0, 5.0), description="clip_cov: (least, largest) covariance of a token that may be guarded."
    )
    guard_coefficient: float = Field(1.0, gt=0, description="kl_cov: weight of the KL divergence.")
    distillation: Literal["none", "reverse_kl", "forward_kl", "jensen_shannon"] = Field(
        "none",
        description=choices(
            "Divergence from the reference's next-token distribution in the loss.",
            {
                "none": "none",
                "reverse_kl": "KL(pi || ref)",
                "forward_kl": "KL(ref || pi)",
                "jensen_shannon": "the generalized Jensen-Shannon divergence",
            },
        ),
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
