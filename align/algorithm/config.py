"""Algorithms as named bundles of orthogonal parts. A run file names a bundle and overrides parts of it."""

from __future__ import annotations

import math
from typing import Any

from pydantic import model_validator

from align.algorithm.bundles import BUNDLES
from align.algorithm.parts import KL_HORIZON, AlgorithmParts
from align.rules import Rule, check

GROUP_BASELINES = ("group_mean", "group_outcome_mean", "leave_one_out")
OUTCOME_BASELINES = ("group_outcome_mean", "leave_one_out")


class AlgorithmConfig(AlgorithmParts):
    """How rewards become a gradient. What is not set comes from the bundle, and what the bundle leaves open from the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_bundle(cls, data: Any) -> Any:
        """Parts that are set win over those of the bundle."""
        name = data.get("name", "reinforce") if isinstance(data, dict) else None
        return {**BUNDLES[name], **data} if isinstance(name, str) and name in BUNDLES else data

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AlgorithmConfig:
        check([*self._rules_of_rewards(), *self._rules_of_the_loss(), *self._rules_of_kl(), *self._rules_of_unread()])
        return self

    @property
    def outcome_baseline(self) -> bool:
        """Whether trajectories are compared by their outcomes alone: where all of a group are equal, advantages are 0."""
        return self.baseline in OUTCOME_BASELINES

    def rules_in_a_run(
        self,
        *,
        group_size: int,
        max_staleness: int,
        num_trajectories: int,
        fewest_trajectories: int,
        has_critic: bool,
    ) -> list[Rule]:
        """What the algorithm asks of the run around it.

        Args:
            group_size: Trajectories per prompt.
            max_staleness: Versions that a trajectory may be late.
            num_trajectories: Trajectories of a step.
            fewest_trajectories: Those of them that are sure to be trained.
            has_critic: Whether there is a section [critic].
        """
        critic = self.baseline == "critic"
        weighted = self.surrogate == "reinforce" or self.proximal != "behavior"
        return [
            (
                self.rewards == "process" and group_size < 2,
                "algorithm.rewards = 'process' needs run.group_size of at least 2: steps are compared within the group",
            ),
            (
                self.importance == "none" and weighted and max_staleness > 0,
                "algorithm.importance = 'none' needs run.max_staleness = 0; with stale tokens use 'truncated'",
            ),
            (
                critic and not has_critic,
                "algorithm.baseline = 'critic' (bundle ppo has it) needs a section [critic], e.g. with "
                "critic.optimizer.lr = 1e-5",
            ),
            (
                has_critic and not critic,
                "the section [critic] is read by algorithm.baseline = 'critic' alone",
            ),
            (
                self.num_minibatches > fewest_trajectories,
                f"algorithm.num_minibatches ({self.num_minibatches}) is above the {fewest_trajectories} trajectories of a step "
                "(two of a group where a verifier may fail on the others): one would be empty",
            ),
            (
                self.kl_target is not None and self.kl_horizon < num_trajectories,
                f"algorithm.kl_horizon ({self.kl_horizon}) is below the {num_trajectories} trajectories of a step: the "
                "coefficient would jump",
            ),
            (
                self.baseline in GROUP_BASELINES and group_size < 2,
                f"algorithm.baseline = {self.baseline!r} needs run.group_size of at least 2",
            ),
        ]

    def _rules_of_rewards(self) -> list[Rule]:
        """Rewards, baselines and what advantages are divided by."""
        low, high = self.reward_range or (-math.inf, math.inf)
        return [
            (
                self.outcome_baseline and (self.rewards != "outcome" or self.discount != 1),
                f"baseline = {self.baseline!r} compares whole trajectories: it needs rewards = 'outcome' and discount = 1",
            ),
            (
                self.group_std and not self.outcome_baseline and self.rewards != "process",
                "group_std = true needs baseline = 'group_outcome_mean' or 'leave_one_out', or rewards = 'process'",
            ),
            (
                self.rewards == "process" and self.baseline != "none",
                "rewards = 'process' are compared within the group already: baseline must be 'none'",
            ),
            (
                self.rewards == "process" and self.kl == "reward",
                "rewards = 'process' with kl = 'reward' would compare the KL of steps; charge it in the loss",
            ),
            (
                self.rewards == "none" and self.kl != "reward" and self.distillation == "none",
                "rewards = 'none' leaves nothing to learn from: it needs kl = 'reward' or a distillation",
            ),
            (
                self.batch_std and (self.group_std or self.whiten),
                "batch_std = true beside group_std or whiten would scale advantages twice",
            ),
            (not low < high, f"reward_range = [{low}, {high}] is empty"),
        ]

    def _rules_of_the_loss(self) -> list[Rule]:
        """Surrogates, their ratios and weights, and what else is in the loss of a token."""
        reinforce, decoupled = self.surrogate == "reinforce", self.proximal != "behavior"
        several_steps = self.num_epochs * self.num_minibatches > 1
        return [
            (
                not reinforce and not decoupled and self.importance not in ("none", "rejected"),
                f"surrogate = {self.surrogate!r} has the ratio pi/mu in it: importance must be 'none', or it would count twice",
            ),
            (
                not self.guard_band[0] < self.guard_band[1],
                f"guard_band = {list(self.guard_band)} is empty",
            ),
            (
                (self.supervised_coefficient > 0) != (self.supervised_min_outcome is not None),
                "supervised_coefficient and supervised_min_outcome need each other",
            ),
            (
                self.baseline == "critic" and self.gae_lambda is None,
                "baseline = 'critic' needs gae_lambda, e.g. 0.95, or 1 for the whole return",
            ),
            (
                reinforce and decoupled,
                f"proximal = {self.proximal!r} is where a ratio starts, and surrogate = 'reinforce' has none",
            ),
            (
                self.surrogate == "gspo" and self.importance != "none" and self.importance_level == "token",
                "surrogate = 'gspo' has one ratio per sequence: importance_level must be sequence_mean or sequence_sum",
            ),
            (
                reinforce and several_steps and self.importance == "none",
                "num_epochs or num_minibatches above 1 leaves the sampler's policy behind after the first optimizer step: "
                "surrogate = 'reinforce' needs importance = 'truncated' or 'masked' then",
            ),
            (
                self.aggregation == "constant_length" and self.loss_length == 0,
                "aggregation = 'constant_length' needs loss_length, e.g. the value of sampling.max_tokens",
            ),
        ]

    def _rules_of_kl(self) -> list[Rule]:
        """The KL to the reference."""
        return [
            (self.kl != "none" and self.kl_coefficient == 0, f"kl = {self.kl!r} needs a kl_coefficient above 0"),
            (
                self.kl == "loss" and self.kl_estimator == "k1",
                "kl_estimator = 'k1' in the loss has an expected gradient of 0; choose k2, k3 or k3_grad_k2",
            ),
            (
                self.kl == "reward" and self.kl_estimator == "k3_grad_k2",
                "kl_estimator = 'k3_grad_k2' differs from k3 in its gradient only, and a reward has none; choose k3",
            ),
        ]

    def _rules_of_unread(self) -> list[Rule]:
        """Numbers that were set and change nothing."""
        critic = self.baseline == "critic"
        return [
            (
                self.rewards == "none" and self.reward_range is not None,
                "reward_range is read by nothing: rewards is 'none'",
            ),
            (
                not self.group_std and self.group_std_epsilon > 0,
                "group_std_epsilon is read by nothing: group_std is false",
            ),
            (
                self.surrogate != "soft_gate" and self._is_set("gate_positive", "gate_negative"),
                "gate_positive and gate_negative are read by surrogate = 'soft_gate' alone",
            ),
            (
                self.entropy_guard == "none" and self._is_set("guard_fraction", "guard_band", "guard_coefficient"),
                "guard_fraction, guard_band and guard_coefficient are read by nothing: entropy_guard is 'none'",
            ),
            (
                self.distillation == "none"
                and self._is_set("distillation_top_k", "distillation_coefficient", "distillation_mixture"),
                "distillation_top_k, distillation_coefficient and distillation_mixture are read by nothing: distillation is "
                "'none'",
            ),
            (not critic and self.gae_lambda is not None, "gae_lambda is read by baseline = 'critic' alone"),
            (not critic and self.value_clip is not None, "value_clip is read by baseline = 'critic' alone"),
            (self.kl == "none" and self.kl_target is not None, "kl_target is read by nothing: kl is 'none'"),
            (
                self.kl_target is None and self.kl_horizon != KL_HORIZON,
                "kl_horizon is read by nothing: there is no kl_target",
            ),
            (
                self.surrogate != "ppo_clip" and self.dual_clip is not None,
                "dual_clip is read by surrogate = 'ppo_clip' alone",
            ),
            (
                self.aggregation != "constant_length" and self.loss_length > 0,
                "loss_length is read by aggregation = 'constant_length' alone",
            ),
            (self.kl == "none" and self.kl_coefficient > 0, "kl_coefficient is read by nothing: kl is 'none'"),
        ]

    def _is_set(self, *names: str) -> bool:
        """Whether one of the fields differs from its default."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in names)
