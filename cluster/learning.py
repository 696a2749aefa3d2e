"""The learner actor: updates the policy, exports its weights, judges it, writes what it learned from to disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.algorithms import AlgorithmConfig
from align.batching import collate
from align.judges import JUDGES
from align.learner import Learner, LearnerConfig, NonFiniteUpdates
from align.losses import exact_kl
from align.metrics import Metric
from align.optimizer import OptimizerConfig
from align.policy import Policy
from align.types import FloatArray, Group, ScoredGroup, TokenRewards
from cluster import transcripts
from cluster.faults import TrainingDiverged
from cluster.scorer import completion_log_distributions
from cluster.weights import ExportedWeights, Link, WireWeights, export_weights, inspect

if TYPE_CHECKING:
    from cluster.engine.sender import Sender


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated completion.

    Attributes:
        prompt: Its text.
        completion: The sampled text.
        kl: Sum over the sampled tokens of the exact KL divergence to the reference, in nats.
        num_tokens: Sampled tokens.
        judged: The judge's verdict, or None without a judge.
    """

    prompt: str
    completion: str
    kl: float
    num_tokens: int
    judged: bool | None


class LearnerActor:
    """Holds the learner. A plain class; `placement.py` makes it a Ray actor.

    Args:
        model: Hugging Face folder of the initial policy, or of a checkpoint.
        algorithm: How rewards become a gradient.
        optimizer: Adam and its schedule.
        cfg: Memory and speed.
        compute_dtype: "float32" or "bfloat16".
        wire_dtype: Type in which engines take the weights.
        num_steps: Steps of the run.
        temperature: The sampler's.
        judge: Name of the evaluation's judge, or None.
        trajectories: Folder for the Parquet files.
        seed: The run's seed.
    """

    def __init__(
        self,
        model: Path,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        cfg: LearnerConfig,
        *,
        compute_dtype: str,
        wire_dtype: str,
        num_steps: int,
        temperature: float,
        judge: str | None,
        trajectories: Path,
        seed: int,
    ) -> None:
        torch.set_num_threads(cfg.num_threads)
        torch.manual_seed(seed)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products are refused
            torch.use_deterministic_algorithms(True)
        device = "cuda" if cfg.num_gpus else "cpu"
        self.policy = Policy.load(model, device=device, compute_dtype=compute_dtype)
        self.exact = Policy(self.policy.model, self.policy.tokenizer)  # float32, for evaluations
        self.learner = Learner(self.policy, algorithm, optimizer, cfg, num_steps, temperature)
        self.wire = WireWeights(self.policy.named_weights, wire_dtype)
        self.wire_dtype = wire_dtype
        self.sender: Sender | None = None
        self.judge = JUDGES[judge] if judge else None
        self.trajectories = trajectories

    def ready(self) -> None:
        """Returns once the policy is loaded."""

    def update(self, step: int, *parts: Group | tuple[TokenRewards, ...]) -> list[Metric]:
        """One optimizer step; `parts` are n groups followed by their n scores. Writes the trajectories of the step.

        The batch of an update that was not finite is written too, beside them.

        Raises:
            TrainingDiverged: After several updates in a row that were not finite.
        """
        half = len(parts) // 2
        pairs = zip(parts[:half], parts[half:], strict=True)
        groups = [ScoredGroup(group, scores) for group, scores in pairs]  # type: ignore[arg-type]
        transcripts.write(self.trajectories / f"step_{step:05d}.parquet", groups, self.policy.tokenizer, step)
        batch, path = collate(groups), self.trajectories / f"step_{step:05d}_not_finite.safetensors"
        try:
            stats = self.learner.update(batch)
        except NonFiniteUpdates as error:
            batch.save(path)
            advice = f"lower optimizer.lr, or look into {path}; the newest checkpoint is good"
            raise TrainingDiverged(str(error), advice) from None
        if stats.skipped:
            batch.save(path)
        return stats.metrics

    def export(self) -> tuple[ExportedWeights, tuple[int, int]]:
        """The current weights in the type that the engines take, with their fingerprint; and their (bytes, version)."""
        weights = export_weights(self.policy.named_weights(), self.learner.version, self.wire_dtype)
        return weights, (weights.num_bytes, weights.version)

    def connect(self, engines: Mapping[int, Any], link: Link) -> None:
        """Form a group with exactly these rollout actors (Ray's handles by rank; none leaves the learner alone).

        Raises:
            ActorLost: If one cannot be reached.
        """
        if self.sender is not None:
            self.sender.close()
            self.sender = None
        if engines:
            from cluster.engine.sender import connect

            self.sender = connect(engines, self.wire, link)

    def send(self) -> tuple[str, int, int]:
        """Bring the current weights to the engines of the group; returns their (fingerprint, bytes, version).

        The engines wait for `RolloutActor.commit` with this fingerprint.

        Raises:
            ActorLost: If an engine was lost on the way.
        """
        version = self.learner.version
        fingerprint, num_bytes = inspect(self.wire, version)
        if self.sender is not None:
            self.sender.send()
        return fingerprint, num_bytes, version

    def canary_sequences(self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int) -> list[list[int]]:
        """Sequences for the canary: prompts continued by 16 tokens that the policy samples, `max_tokens` in all."""
        completions = self.policy.sample(prompts, max_tokens=16, temperature=1.0, seed=seed)
        return [[*prompt, *completion][:max_tokens] for prompt, completion in zip(prompts, completions, strict=True)]

    @torch.no_grad()
    def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of tokens 1.. of each sequence under the current weights, at temperature 1."""
        ids = [torch.tensor([sequence], device=self.policy.device) for sequence in sequences]
        return [self.policy.token_logprobs(one).logprobs[0, 1:].tolist() for one in ids]

    @torch.no_grad()
    def evaluate(self, ref_log_distributions: list[FloatArray], *groups: Group) -> list[Answer]:
        """Exact KL to the reference along sampled completions, and the judge's verdict.

        Args:
            ref_log_distributions: From `ScorerActor.log_distributions` for the same groups.
            groups: Groups that the current policy sampled.
        """
        trajectories = [(group, t) for group in groups for t in group.trajectories]
        answers = []
        for (group, t), ref in zip(trajectories, ref_log_distributions, strict=True):
            own = completion_log_distributions(self.exact, t.token_ids, t.loss_mask, self.learner.temperature)
            shared = torch.tensor(ref[:, : own.shape[-1]], device=own.device)  # a reference may be padded further
            kl = exact_kl(own, shared).double().sum()
            completion = self.policy.tokenizer.decode(t.token_ids[t.loss_mask].tolist(), skip_special_tokens=True)
            text = group.ticket.prompt.text
            judged = self.judge(text + completion) if self.judge else None
            answers.append(Answer(text, completion, float(kl), t.num_completion_tokens, judged))
        return answers

    def save(self, directory: Path) -> None:
        """Write policy (Hugging Face folder) and optimizer into `directory`."""
        self.policy.save(directory / "policy")
        self.learner.save_optimizer(directory / "optimizer.safetensors")

    def restore(self, directory: Path, version: int) -> None:
        """Take up the optimizer of a checkpoint whose policy this learner was built from."""
        self.learner.load_optimizer(directory / "optimizer.safetensors", version)

    def export_policy(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        self.policy.save(directory)
