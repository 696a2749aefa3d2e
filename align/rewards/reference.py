"""The reference model's log-probability as the reward of each token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from align.data.token_budget import TokenBudget
from align.data.types import FloatArray, Group, TokenRewards, TopTokens, Trajectory
from align.model.policy import Policy
from align.rewards.steps import paid_by_step, step_ends


class ReferenceRewardConfig(BaseModel):
    """`R_t = log P_ref(a_t | s_t) - alpha * log mu(a_t | s_t)`, clipped to +-clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["reference"] = Field("reference", description="Kind of the reward.")
    alpha: float = Field(
        0.0,
        ge=0,
        description="Weight of the entropy term: 0 is the plain reference log-probability, 1 makes the reference itself "
        "the optimum (the expected reward is then minus the KL divergence).",
    )
    clip: float | None = Field(None, gt=0, description="Token rewards are cut to [-clip, clip]; leave out for none.")
    step_separator: str | None = Field(
        None,
        min_length=1,
        description="What stands between two steps of an answer, such as a line break: a step's rewards are paid together at its "
        "last token. Left out: every token is a step.",
    )


def token_reward(ref_logprobs: FloatArray, behavior_logprobs: FloatArray, cfg: ReferenceRewardConfig) -> FloatArray:
    """`R_t = clip(log P_ref - alpha * log mu)`, elementwise.

    Args:
        ref_logprobs: [T] log-probability of each token under the reference at temperature 1.
        behavior_logprobs: [T] log-probability under the distribution that sampled it.
        cfg: alpha and clip.
    """
    rewards = ref_logprobs - np.float32(cfg.alpha) * behavior_logprobs
    return rewards if cfg.clip is None else np.clip(rewards, -cfg.clip, cfg.clip)


class ReferenceReward:
    """Scores trajectories under a frozen reference.

    Args:
        reference: The frozen policy.
        cfg: alpha and clip.
        max_tokens: Tokens per forward pass, with padding where the model cannot be packed; does not change the result beyond
            rounding.
        num_top: Give the reference's likeliest tokens at each place too: how many, 0 for the whole vocabulary, None for none.
    """

    def __init__(
        self, reference: Policy, cfg: ReferenceRewardConfig, max_tokens: int, num_top: int | None = None
    ) -> None:
        self.reference = reference
        self.cfg = cfg
        self.max_tokens = max_tokens
        self.num_top = num_top

    def __call__(self, group: Group) -> tuple[TokenRewards, ...]:
        """See `Reward`."""
        trajectories = group.trajectories
        scores: list[TokenRewards | None] = [None] * len(trajectories)
        budget = TokenBudget(self.max_tokens, self.reference.trunk.packs)
        for rows in budget.cut([len(t.token_ids) for t in trajectories]):
            for row, logprobs in zip(rows, self._ref_logprobs([trajectories[r] for r in rows]), strict=True):
                scores[row] = self._score(trajectories[row], logprobs)
        return tuple(score for score in scores if score is not None)

    def _score(self, trajectory: Trajectory, ref_logprobs: FloatArray) -> TokenRewards:
        rewards = token_reward(ref_logprobs, trajectory.behavior_logprobs, self.cfg)
        top = None if self.num_top is None else self._top(trajectory, self.num_top)
        rewards, ends = np.where(trajectory.loss_mask, rewards, np.float32(0)), None
        if self.cfg.step_separator is not None:
            pieces = [self._piece(token) for token in trajectory.token_ids.tolist()]
            ends = step_ends(pieces, trajectory.loss_mask, self.cfg.step_separator)
            rewards = paid_by_step(rewards, trajectory.loss_mask, ends)
        return TokenRewards(rewards, ref_logprobs, top, ends)

    def _piece(self, token: int) -> str:
        """The text of one token; empty for a special one."""
        return str(self.reference.tokenizer.decode([token], skip_special_tokens=True))

    def _top(self, trajectory: Trajectory, num_top: int) -> TopTokens:
        """One trajectory at a time, since a distribution per token is large."""
        first = int(trajectory.loss_mask.argmax())
        ids = torch.from_numpy(trajectory.token_ids)[None].to(self.reference.device)
        token_ids, logprobs = self.reference.top_tokens(ids, num_top, max(first, 1))
        sampled = torch.from_numpy(trajectory.loss_mask[max(first, 1) :])
        picked = [tensor[0].cpu()[sampled].numpy() for tensor in (token_ids.int(), logprobs)]
        return TopTokens(*picked)

    @torch.no_grad()
    def _ref_logprobs(self, trajectories: list[Trajectory]) -> list[FloatArray]:
        lengths = torch.tensor([len(t.token_ids) for t in trajectories])
        ids = torch.zeros(len(trajectories), int(lengths.max()), dtype=torch.long)
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        for row, trajectory in enumerate(trajectories):
            ids[row, : lengths[row]] = torch.from_numpy(trajectory.token_ids)
            wanted[row, : lengths[row]] = torch.from_numpy(trajectory.loss_mask)
        device = self.reference.device
        output = self.reference.token_logprobs(ids.to(device), wanted=wanted.to(device), lengths=lengths.to(device))
        rows = output.logprobs.cpu().numpy()
        return [row[: len(t.token_ids)] for t, row in zip(trajectories, rows, strict=True)]
