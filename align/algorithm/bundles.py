"""Algorithms as bundles: the name of a paper, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_GROUP_RELATIVE = {"rewards": "outcome", "baseline": "group_outcome_mean", "group_std": True, "importance": "none"}

BUNDLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The project's own: policy gradient with reward-to-go of token rewards; the defaults of the fields.
        "reinforce": {},
        # Hu (2025), REINFORCE++: outcome reward at the end, KL per token in the reward, whitening over the batch, PPO's clip.
        # KL 0.01 is the default of the author's code (OpenRLHF 3c3be6234).
        "reinforce++": {
            "whiten": True,
            "surrogate": "ppo_clip",
            "importance": "none",
            "aggregation": "token_mean",
            "kl": "reward",
            "kl_estimator": "k1",
            "kl_coefficient": 0.01,
        },
        # Ahmadian et al. (2024), Back to Basics: REINFORCE on whole trajectories, KL in the reward; KL 0.03 is of its appendix C,
        # as TRL's index of papers quotes it. Departs: off-policy tokens are weighted by truncated pi/mu; the paper is on-policy.
        "rloo": {
            "rewards": "outcome",
            "baseline": "leave_one_out",
            "aggregation": "trajectory_mean",
            "kl": "reward",
            "kl_estimator": "k1",
            "kl_coefficient": 0.03,
        },
        # Shao et al. (2024), DeepSeekMath, equation 3: KL 0.04 by k3 in the loss. The paper gives no epsilon; 0.2 is PPO's.
        "grpo": {
            **_GROUP_RELATIVE,
            "surrogate": "ppo_clip",
            "aggregation": "trajectory_token_mean",
            "kl": "loss",
            "kl_estimator": "k3",
            "kl_coefficient": 0.04,
        },
        # Liu et al. (2025), Dr. GRPO: neither the standard deviation nor the length of the trajectory divides; no KL.
        "dr_grpo": {
            **_GROUP_RELATIVE,
            "group_std": False,
            "surrogate": "ppo_clip",
            "aggregation": "constant_length",
        },
        # Yu et al. (2025), DAPO: clip 0.2/0.28, mean over tokens, no KL, no loss on truncated trajectories. Departs: without the
        # soft length penalty, and groups without signal stay unless filter.drop_without_signal is set.
        "dapo": {
            **_GROUP_RELATIVE,
            "surrogate": "ppo_clip",
            "clip_high": 0.28,
            "aggregation": "token_mean",
            "mask_overlong": True,
        },
        # Zheng et al. (2025), GSPO, section 5.1: clips 3e-4 and 4e-4 on the sequence's ratio (as in verl and TRL), no KL.
        "gspo": {
            **_GROUP_RELATIVE,
            "surrogate": "gspo",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "trajectory_token_mean",
        },
        # MiniMax (2025), MiniMax-M1: no lower bound, no KL, mean over tokens. The paper leaves the upper clip open; weights up
        # to 5 are what TRL's index of papers sets for ScaleRL.
        "cispo": {
            **_GROUP_RELATIVE,
            "surrogate": "cispo",
            "clip_low": 1.0,
            "clip_high": 4.0,
            "aggregation": "token_mean",
        },
        # Schulman et al. (2017), PPO, as Ziegler et al. (2019) apply it to language models: clips of 0.2 for ratio and value,
        # lambda 0.95, no discount, 4 passes over the batch (read in the code that they published); KL per token in the reward
        # with 0.02 (Ouyang et al. 2022, InstructGPT, appendix C). Departs: the critic is a model of its own with its own Adam,
        # so there is no coefficient of the value loss (0.1 there); rewards are not whitened, advantages are.
        "ppo": {
            "baseline": "critic",
            "gae_lambda": 0.95,
            "value_clip": 0.2,
            "whiten": True,
            "surrogate": "ppo_clip",
            "importance": "none",
            "num_epochs": 4,
            "aggregation": "token_mean",
            "kl": "reward",
            "kl_estimator": "k1",
            "kl_coefficient": 0.02,
        },
        # Khatri et al. (2025), The art of scaling RL compute, section 4 (ScaleRL): REINFORCE with truncated importance weights
        # (CISPO), mean over prompts, advantages scaled over the batch, no KL; weights up to 5 as in TRL's index of papers.
        # Departs: groups without signal and solved prompts stay (both are filters); the head computes in the learner's type.
        "scalerl": {
            **_GROUP_RELATIVE,
            "group_std": False,
            "batch_std": True,
            "surrogate": "cispo",
            "clip_low": 1.0,
            "clip_high": 4.0,
            "aggregation": "prompt_mean",
        },
        # Agarwal et al. (2023), GKD, on the policy's own samples; as a policy gradient by Lu (2025), On-Policy Distillation
        # (Thinking Machines): a token's advantage is -(log mu - log P_ref), discount 0, weighted by pi/mu, as in
        # tinker-cookbook's train_on_policy. Departs: the weight is truncated, the loss a mean over tokens.
        "on_policy_distillation": {
            "rewards": "none",
            "discount": 0.0,
            "aggregation": "token_mean",
            "kl": "reward",
            "kl_estimator": "k1",
            "kl_coefficient": 1.0,
        },
    }
)

BUNDLE_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "reinforce": "REINFORCE with reward-to-go of token rewards, every part at its default",
        "reinforce++": "REINFORCE++, advantages whitened over the batch, PPO's clip, KL in the reward",
        "rloo": "REINFORCE leave-one-out on whole trajectories, KL in the reward",
        "grpo": "group-relative outcomes over their standard deviation, PPO's clip, KL in the loss",
        "dr_grpo": "Dr. GRPO, GRPO without the divisions that bias it, no KL",
        "dapo": "GRPO with a wider upper clip, the mean over tokens, no loss on truncated trajectories, no KL",
        "gspo": "GRPO where ratio and clip belong to the sequence, no KL",
        "cispo": "group-relative outcomes, the importance weight is clipped and no token loses its gradient, no KL",
        "ppo": "a learned critic, generalized advantage estimation, four clipped passes over each batch, KL in the reward",
        "scalerl": "ScaleRL, CISPO with the mean over prompts and advantages scaled over the batch",
        "on_policy_distillation": "the reference grades every token of the policy's own samples",
    }
)
