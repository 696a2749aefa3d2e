"""The scorer actor: it gives the rewards; a frozen reference, where there is one, gives whole distributions too."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from align.data.types import FloatArray, Group, Prompt, TokenRewards, Trajectory
from align.model.folder import load_tokenizer
from align.model.policy import Policy
from align.rewards.kinds import RewardConfig, WithReference, make_reward, reads_reference
from align.rewards.outcome import DEADLINE_S
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig
from align.rewards.reward import Reward
from cluster.actors.weights import inspect
from cluster.loop.quarantine import Failure
from cluster.redaction import redact


class ScorerConfig(BaseModel):
    """Scorer actors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_actors: int = Field(1, ge=1, description="Scorer actors, each with a copy of the reference if there is one.")
    num_gpus: float = Field(0, ge=0, le=1, description="GPUs of one scorer; a fraction shares one.")
    num_cpus: float = Field(0, ge=0, description="CPUs that Ray sets aside for one scorer.")
    num_threads: int = Field(1, ge=1, description="CPU threads of one scorer.")
    max_tokens_per_micro_batch: int = Field(8192, ge=1, description="Tokens per forward pass.")
    max_restarts: int = Field(3, ge=0, description="Scorers that may be replaced in a run before it ends.")
    start_deadline_s: float = Field(300, gt=0, description="Time for a scorer to start.")
    score_deadline_s: float = Field(
        600,
        gt=0,
        description="Time to score one group, besides quarantine.deadline_s for each trajectory that a verifier judges.",
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the controller needs to know about a scored group.

    Attributes:
        outcomes: Sum of the rewards of each trajectory that was judged.
        failures: The trajectories whose reward failed.
        began_s: When it began, in seconds since the epoch.
        ended_s: When it ended.
    """

    outcomes: tuple[float, ...]
    failures: tuple[Failure, ...] = ()
    began_s: float = 0.0
    ended_s: float = 0.0


class ScorerActor:
    """Judges groups. A plain class; `placement.py` makes it a Ray actor.

    Args:
        policy: Hugging Face folder of the policy, for its tokenizer.
        reference: Hugging Face folder of the reference, or None where nothing asks one.
        reward: What to pay.
        with_ref_logprobs: Whether a KL term or a distillation needs what the reference says beside the rewards.
        cfg: Threads and micro-batches.
        compute_dtype: "float32" or "bfloat16".
        num_top: The reference's likeliest tokens at each place, for a distillation: how many, 0 for all, None for none.
        verifier_deadline_s: Time for a verifier to judge one trajectory.
    """

    def __init__(
        self,
        policy: Path,
        reference: Path | None,
        reward: RewardConfig,
        with_ref_logprobs: bool,
        cfg: ScorerConfig,
        compute_dtype: str,
        num_top: int | None = None,
        verifier_deadline_s: float = DEADLINE_S,
    ) -> None:
        torch.set_num_threads(cfg.num_threads)
        self.cfg = cfg
        self.num_top = num_top
        self.tokenizer = load_tokenizer(policy)
        if reference is not None:
            self._load_reference(reference, compute_dtype)
        self.reward: Reward = make_reward(reward, self._decode, self._reference_reward, verifier_deadline_s)
        if with_ref_logprobs and not reads_reference(reward):
            self.reward = WithReference(self.reward, self._reference_reward(ReferenceRewardConfig()))

    def _load_reference(self, folder: Path, compute_dtype: str) -> None:
        self.exact = Policy.load(folder, device="cuda" if self.cfg.num_gpus else "cpu")  # float32, for evaluations
        self.reference = self.exact if compute_dtype == "float32" else _in_bfloat16(self.exact)
        if self.cfg.num_gpus:
            self.exact = self.reference  # one copy: the memory of a GPU is for the engine

    def _reference_reward(self, cfg: ReferenceRewardConfig) -> ReferenceReward:
        return ReferenceReward(self.reference, cfg, self.cfg.max_tokens_per_micro_batch, self.num_top)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def ready(self) -> None:
        """Returns once everything is loaded."""

    def load_reference(self, model: Path) -> str:
        """Score under the weights of another model of the same shape; evaluations stay with those of the first one.

        Returns:
            The fingerprint of what was read, in float32.
        """
        fresh = Policy.load(model)
        fingerprint, _ = inspect(fresh.named_weights(), 0)
        if self.exact is self.reference:
            self.exact = Policy(copy.deepcopy(self.reference.model), self.reference.tokenizer)
        self.reference.model.load_state_dict(fresh.model.state_dict())
        return fingerprint

    def score(self, group: Group) -> tuple[tuple[TokenRewards, ...], Verdict]:
        """Rewards of the trajectories of a group; and the verdict, for the controller."""
        began_s = time.time()
        scores = self.reward(group)
        pairs = list(zip(group.trajectories, scores, strict=True))
        outcomes = tuple(outcome(t, score) for t, score in pairs if score.failure is None)
        failures = tuple(self._failure(group, t, score.failure) for t, score in pairs if score.failure is not None)
        return scores, Verdict(outcomes, failures, began_s, time.time())

    def _failure(self, group: Group, trajectory: Trajectory, traceback: str) -> Failure:
        prompt, completion = group.ticket.prompt, trajectory.token_ids[trajectory.loss_mask]
        return Failure(
            ticket=group.ticket.number,
            prompt_id=prompt.id,
            prompt=prompt.text,
            completion=self._decode(completion.tolist()),
            seed=trajectory.seed,
            num_tokens=len(completion),
            traceback=redact(traceback),  # here, where the secrets are known that it may hold
        )

    @torch.no_grad()
    def log_distributions(self, *groups: Group) -> tuple[list[FloatArray], None]:
        """`log P_ref(v | s_t)` for every sampled token t of every trajectory: arrays [C, V], in float32; and a None."""
        arrays = [
            completion_log_distributions(self.exact, t.token_ids, t.loss_mask, temperature=1.0).cpu().numpy()
            for group in groups
            for t in group.trajectories
        ]
        return arrays, None

    def sample(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[str]:
        """What the reference itself answers, one completion per prompt, as text."""
        token_ids = [prompt.token_ids for prompt in prompts]
        completions = self.exact.sample(token_ids, max_tokens=max_tokens, temperature=1.0, seed=seed)
        return [self._decode(ids) for ids in completions]


def outcome(trajectory: Trajectory, score: TokenRewards) -> float:
    """Sum of the rewards of the sampled tokens, rounded as `align.algorithm.returns.outcomes` rounds it."""
    return float(np.float32(score.rewards[trajectory.loss_mask].sum(dtype=np.float64)))


def _in_bfloat16(policy: Policy) -> Policy:
    """A copy whose weights are bfloat16: frozen weights are cast once, not at every forward pass."""
    return Policy(copy.deepcopy(policy.model).to(torch.bfloat16), policy.tokenizer, "bfloat16")


def completion_log_distributions(
    policy: Policy, token_ids: np.ndarray, loss_mask: np.ndarray, temperature: float
) -> torch.Tensor:
    """`log softmax(logits / temperature)` for every token in the loss mask: [C, V]."""
    start = int(loss_mask.argmax())
    logits = policy.logits(torch.from_numpy(token_ids)[None].to(policy.device), start)[0]
    return torch.log_softmax(logits[torch.from_numpy(loss_mask[start:])].float() / temperature, dim=-1)
