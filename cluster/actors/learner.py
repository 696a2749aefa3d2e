"""The learner actor: updates the policy, exports its weights, judges it, writes what it learned from to disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.algorithm.config import AlgorithmConfig
from align.algorithm.losses import exact_kl
from align.data.batching import Batch, collate
from align.data.sampling import Sampling
from align.data.types import FloatArray, Group, Prompt, ScoredGroup, TokenRewards, Trajectory
from align.demo.judges import JUDGES
from align.learner.critic import Critic, CriticConfig
from align.learner.learner import Learner, LearnerConfig, NonFiniteUpdates, UpdateStats
from align.learner.meeting import Meeting, host, join
from align.learner.optimizer import OptimizerConfig
from align.metrics import Metric
from align.model.adapters import Adapter, AdapterConfig
from align.model.policy import Policy
from align.model.value import ValueModel
from align.rewards.kinds import RewardConfig, verifier_of
from align.rewards.outcome import DEADLINE_S, verify
from cluster.actors.scorer import completion_log_distributions
from cluster.actors.weights import ExportedWeights, Link, WireWeights, export_weights, inspect
from cluster.faults import TrainingDiverged
from cluster.loop.answer import Answer
from cluster.record import transcripts

if TYPE_CHECKING:
    from cluster.actors.engine.sender import Sender


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank of the learner is among the others.

    Attributes:
        rank: Its number.
        node_address: Gives the address of the node that it is called on.
        timeout_s: Longest wait of a rank for another one.
    """

    rank: int
    node_address: Callable[[], str]
    timeout_s: float


class LearnerActor:
    """Holds the learner, or one rank of it. A plain class; `placement.py` makes it a Ray actor.

    Of several ranks all `join`, and then all are called for everything, in the same order, since each of their forward
    passes waits for the others. What only the first can do (`export`, `send`) the others `help_gather`.

    Args:
        model: Hugging Face folder of the initial policy, or of a checkpoint.
        algorithm: How rewards become a gradient.
        optimizer: Adam and its schedule.
        cfg: Memory and speed.
        compute_dtype: "float32" or "bfloat16".
        wire_dtype: Type in which engines take the weights.
        num_steps: Steps of the run.
        sampling: What the engines sample from.
        judge: Name of the evaluation's judge, or None.
        reward: The run's reward; if it verifies answers, evaluations show how many are right.
        trajectories: Folder for the Parquet files.
        seed: The run's seed.
        critic: The critic that the algorithm asks for, or None.
        adapter: What is trained instead of the policy's weights, or None; then `model` is the initial policy always.
        place: Where this rank is, if there are several.
        verifier_deadline_s: Time for the reward's verifier to judge one answer.
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
        sampling: Sampling,
        judge: str | None,
        reward: RewardConfig,
        trajectories: Path,
        seed: int,
        critic: CriticConfig | None = None,
        adapter: AdapterConfig | None = None,
        place: Place | None = None,
        verifier_deadline_s: float = DEADLINE_S,
    ) -> None:
        torch.set_num_threads(cfg.num_threads)
        torch.manual_seed(seed)
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products are refused
            torch.use_deterministic_algorithms(True)
        self.device = "cuda" if cfg.num_gpus else "cpu"
        # A GPU holds the whole policy only if it holds it alone: shards are moved there one by one.
        self.policy = Policy.load(model, device="cpu" if place else self.device, compute_dtype=compute_dtype)
        if adapter is not None:
            self.policy.adapter = Adapter(self.policy.model, adapter, seed)
        self.exact = Policy(self.policy.model, self.policy.tokenizer)  # float32, for evaluations
        self.place = place
        self.cfg = cfg
        value_critic = None
        if critic is not None:
            value_critic = Critic(
                ValueModel.load(critic.model or model, self.device),
                critic,
                num_steps,
                value_clip=algorithm.value_clip,
                max_tokens=cfg.max_tokens_per_micro_batch,
                compute_dtype=compute_dtype,
            )
        self._new_learner: Callable[[], Learner] = partial(
            Learner, self.policy, algorithm, optimizer, cfg, num_steps, sampling, value_critic
        )
        if place is None:
            self.learner = self._new_learner()
        as_adapter = adapter is not None and adapter.publish == "adapter"
        self._published = self.policy.named_factors if as_adapter else self.policy.named_weights
        self.wire = WireWeights(self.policy.named_weights, wire_dtype, self.policy.named_shapes)
        self.wire_dtype = wire_dtype
        self.sender: Sender | None = None
        self.judge = JUDGES[judge] if judge else None
        self.verifier = verifier_of(reward)
        self.verifier_deadline_s = verifier_deadline_s
        self.trajectories = trajectories

    def ready(self) -> None:
        """Returns once the policy is loaded."""

    def host(self) -> Meeting:
        """Open the place where the ranks meet; on the first alone."""
        assert self.place is not None
        self._store, meeting = host(self.place.node_address(), self.place.timeout_s)
        return meeting

    def join(self, meeting: Meeting) -> None:
        """Meet the other ranks and share the policy with them. Returns once all have come."""
        assert self.place is not None
        address, timeout_s = self.place.node_address(), self.place.timeout_s
        rank, num_ranks = self.place.rank, self.cfg.num_ranks
        self.policy.shard(join(meeting, rank, num_ranks, address=address, device=self.device, timeout_s=timeout_s))
        self.learner = self._new_learner()

    def help_gather(self) -> None:
        """Take part in what the first rank gathers for `export` or `send`, until it is done with it."""
        self.policy.help_gather()

    def update(self, step: int, *parts: Group | tuple[TokenRewards, ...]) -> list[Metric]:
        """One optimizer step; `parts` are n groups followed by their n scores. Writes the trajectories of the step.

        The batch of an update that was not finite is written too, beside them.

        Raises:
            TrainingDiverged: After several updates in a row that were not finite.
        """
        half = len(parts) // 2
        pairs = zip(parts[:half], parts[half:], strict=True)
        groups = [ScoredGroup(group, scores).judged() for group, scores in pairs]  # type: ignore[arg-type]
        self._record(step, groups)  # before the update, which may fail
        batch, path = collate(groups), self.trajectories / f"step_{step:05d}_not_finite.safetensors"
        try:
            stats = self.learner.update(batch)
        except NonFiniteUpdates as error:
            self._keep(batch, path)
            advice = f"lower optimizer.lr, or look into {path}; the newest checkpoint is good"
            raise TrainingDiverged(str(error), advice) from None
        if stats.skipped:
            self._keep(batch, path)
        self._record(step, groups, stats)
        return stats.metrics

    def _record(self, step: int, groups: Sequence[ScoredGroup], stats: UpdateStats | None = None) -> None:
        if self.policy.ranks.first:
            path = self.trajectories / f"step_{step:05d}.parquet"
            transcripts.write(path, groups, self.policy.tokenizer, step, stats)

    def _keep(self, batch: Batch, path: Path) -> None:
        if self.policy.ranks.first:
            batch.save(path)

    def export(self) -> tuple[ExportedWeights, tuple[int, int]]:
        """The current weights, or the adapter alone where engines have it as such; and their (bytes, version)."""
        with self._leading():
            weights = export_weights(self._published(), self.learner.version, self.wire_dtype)
        return weights, (weights.num_bytes, weights.version)

    @contextlib.contextmanager
    def _leading(self) -> Iterator[None]:
        """The other ranks help until the end of the block, however it comes."""
        try:
            yield
        finally:
            self.policy.ranks.end_gathering()

    def connect(self, engines: Mapping[int, Any], link: Link) -> None:
        """Form a group with exactly these rollout actors (Ray's handles by rank; none leaves the learner alone).

        Raises:
            ActorLost: If one cannot be reached.
        """
        if self.sender is not None:
            self.sender.close()
            self.sender = None
        if engines:
            from cluster.actors.engine.sender import connect

            self.sender = connect(engines, self.wire, link)

    def send(self) -> tuple[str, int, int]:
        """Bring the current weights to the engines of the group; returns their (fingerprint, bytes, version).

        The engines wait for `RolloutActor.commit` with this fingerprint.

        Raises:
            ActorLost: If an engine was lost on the way.
        """
        version = self.learner.version
        with self._leading():
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
    def evaluate(self, ref_log_distributions: list[FloatArray] | None, *groups: Group) -> list[Answer]:
        """Exact KL to the reference along sampled completions, the judge's verdict, and how right the answers are.

        Args:
            ref_log_distributions: From `ScorerActor.log_distributions` for the same groups; None without a reference.
            groups: Groups that the current policy sampled.
        """
        trajectories = [(group.ticket.prompt, t) for group in groups for t in group.trajectories]
        refs = [None] * len(trajectories) if ref_log_distributions is None else ref_log_distributions
        return [self._answer(prompt, t, ref) for (prompt, t), ref in zip(trajectories, refs, strict=True)]

    def _answer(self, prompt: Prompt, trajectory: Trajectory, ref: FloatArray | None) -> Answer:
        completion_ids = trajectory.token_ids[trajectory.loss_mask].tolist()
        completion = self.policy.tokenizer.decode(completion_ids, skip_special_tokens=True)
        verdict, failure = None, None
        if self.verifier:
            verdict, failure = verify(self.verifier, prompt, completion, self.verifier_deadline_s)
        return Answer(
            prompt.text,
            completion,
            None if ref is None else self._kl(trajectory, ref),
            trajectory.num_completion_tokens,
            self.judge(prompt.text + completion) if self.judge else None,
            verdict if failure is None else None,
            failed=failure is not None,
        )

    def _kl(self, trajectory: Trajectory, ref: FloatArray) -> float:
        temperature = self.learner.sampling.temperature
        own = completion_log_distributions(self.exact, trajectory.token_ids, trajectory.loss_mask, temperature)
        shared = torch.tensor(ref[:, : own.shape[-1]], device=own.device)  # a reference may be padded further
        return float(exact_kl(own, shared).double().sum())

    def save(self, directory: Path) -> None:
        """Write policy (Hugging Face folder), adapter, optimizer, KL coefficient and critic into `directory`."""
        self.export_policy(directory / "policy", with_adapter=True)
        self.learner.save_optimizer(directory / "optimizer.safetensors")

    def restore(self, directory: Path, version: int) -> None:
        """Take up optimizer, KL coefficient, adapter and critic of a checkpoint.

        Without an adapter this learner was built from the checkpoint's policy.
        """
        if self.policy.adapter is not None:
            self.policy.adapter.load(_adapter_beside(directory / "policy"))
        self.learner.load_optimizer(directory / "optimizer.safetensors", version)

    def export_policy(self, directory: Path, with_adapter: bool = False) -> None:
        """Write the policy as a Hugging Face folder, merged; on request also its adapter, if it has one, beside it."""
        self.policy.save(directory)
        if self.policy.adapter is not None and with_adapter:
            self.policy.adapter.save(_adapter_beside(directory), write=self.policy.ranks.first)

    def fingerprint(self) -> str:
        """Of the weights in float32. Raises TrainingDiverged if one is not finite."""
        with self._leading():
            fingerprint, _ = inspect(self.policy.named_weights(), self.learner.version)
        return fingerprint


def _adapter_beside(policy: Path) -> Path:
    """Not within: transformers takes a folder that holds an adapter's config for the adapter."""
    return policy.with_name(f"{policy.name}_adapter")
