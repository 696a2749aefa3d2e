"""The rollout actor: one vLLM engine that samples groups and serves published weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.choices import choices
from align.data.sampling import Sampling
from align.data.types import FinishReason, Group, Ticket, Trajectory
from align.model.adapters import AdapterConfig
from align.rules import Rule
from cluster.actors.usage import BusyClock
from cluster.actors.weights import ExportedWeights
from cluster.faults import ActorLost
from cluster.loop.span import Span

if TYPE_CHECKING:
    from cluster.actors.engine.engine import Completion

CPU_KV_CACHE_BYTES = 256 << 20


class SamplingConfig(BaseModel):
    """The distribution that completions are sampled from: temperature first, then top-k and top-p, renormalised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(64, ge=1, description="Most tokens of a completion.")
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides the logits; the learner uses the same."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus, of what top_k keeps; 1 for all. Below 1 on-policy only."
    )
    top_k: int = Field(0, ge=0, description="Most likely tokens; 0 for all. Above 0 on-policy only.")
    stop_token_ids: tuple[int, ...] = Field((), description="Tokens that end a completion besides the model's own.")

    @property
    def distribution(self) -> Sampling:
        """What engine and learner have to agree on."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be sampled."""
        return self.distribution.truncates

    def rules_in_a_run(
        self, *, max_staleness: int, optimizer_steps: int, distillation: str, max_model_len: int
    ) -> list[Rule]:
        """What sampling asks of the run around it.

        Args:
            max_staleness: Versions that a trajectory may be late.
            optimizer_steps: Of one batch.
            distillation: The divergence in the loss, or "none".
            max_model_len: Longest prompt plus completion, in tokens.
        """
        return [
            (
                self.truncates and max_staleness > 0,
                "sampling.top_p < 1 or top_k > 0 needs run.max_staleness = 0: the learner renormalises over the tokens that its "
                "own policy keeps, which is what the sampler kept at equal version only",
            ),
            (
                self.truncates and optimizer_steps > 1,
                "sampling.top_p < 1 or top_k > 0 needs algorithm.num_epochs = 1 and num_minibatches = 1: after the first "
                "optimizer step the policy keeps other tokens than the sampler did",
            ),
            (
                self.truncates and distillation != "none",
                f"algorithm.distillation = {distillation!r} needs sampling.top_p = 1 and top_k = 0: the divergence is that of "
                "whole distributions",
            ),
            (
                self.max_tokens >= max_model_len,
                f"sampling.max_tokens ({self.max_tokens}) leaves no room for a prompt in rollout.max_model_len ({max_model_len})",
            ),
        ]


class RolloutConfig(BaseModel):
    """Rollout actors and their engines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_actors: int = Field(1, ge=1, description="Rollout actors, each with an engine of its own.")
    num_gpus: int = Field(0, ge=0, description="GPUs of one engine (tensor parallel); 0 = CPU.")
    num_cpus: float = Field(1, ge=0, description="CPUs that Ray sets aside for one actor; a fraction shares one.")
    num_threads: int = Field(1, ge=1, description="CPU threads of one engine.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description=choices(
            "Type of weights and activations.",
            {
                "auto": "bfloat16 where the processor has it, else float32",
                "float32": "32 bits",
                "bfloat16": "16 bits, half the memory",
            },
        ),
    )
    max_model_len: int = Field(512, ge=8, description="Longest prompt plus completion, in tokens.")
    max_num_seqs: int = Field(256, ge=1, description="Sequences that one engine generates at once.")
    kv_cache_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="Memory for keys and values of one engine; left out: 256 MiB on CPU, on GPUs what "
        "gpu_memory_utilization allows.",
    )
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="Share of a GPU's memory for the engine.")
    max_restarts: int = Field(3, ge=0, description="Rollout actors that may be replaced in a run before it ends.")
    start_deadline_s: float = Field(300, gt=0, description="Time for an engine to start.")
    rollout_deadline_s: float = Field(600, gt=0, description="Time for one group; a later answer condemns the actor.")
    load_deadline_s: float = Field(300, gt=0, description="Time to load one version.")

    def rules_in_a_run(self, group_size: int) -> list[Rule]:
        """What an engine asks of the number of trajectories of a prompt."""
        return [
            (
                group_size > self.max_num_seqs,
                f"run.group_size ({group_size}) is above rollout.max_num_seqs ({self.max_num_seqs}): a group would never run at "
                "once",
            )
        ]


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the controller needs to know about a group, and when it was sampled."""

    oldest_version: int
    num_tokens: int
    num_stopped: int
    span: Span


class RolloutActor:
    """Samples groups with one engine. A plain class; `placement.py` makes it a Ray actor.

    Args:
        rank: Number of this actor.
        settings: Keyword arguments of `cluster.actors.engine.engine.EngineSettings`.
        sampling: How to sample.
    """

    def __init__(self, rank: int, settings: dict[str, Any], sampling: SamplingConfig) -> None:
        from cluster.actors.engine.engine import CompletionSettings, Engine, EngineSettings

        self.rank = rank
        self.engine = Engine(EngineSettings(**settings))
        self.sampling = CompletionSettings(sampling.max_tokens, sampling.distribution, sampling.stop_token_ids)
        self.clock = BusyClock()

    async def ready(self) -> int:
        """The rank, once the engine is up."""
        return self.rank

    async def rollout(self, ticket: Ticket) -> tuple[Group, GroupSummary]:
        """Sample the group of a ticket, one request per seed.

        Raises:
            ActorLost: If the engine died or gave a request up.
        """
        began_s, prompt_ids = time.time(), ticket.prompt.token_ids
        requests = (self.engine.generate(prompt_ids, self.sampling, seed) for seed in ticket.seeds)
        with self.clock.working():
            completions = await self._guard("generate", asyncio.gather(*requests))
        if any(c.finish_reason is FinishReason.ABORT or not c.token_ids for c in completions):
            raise ActorLost("rollout", self.rank, "generate", "the engine gave a request up before it was done")
        pairs = zip(completions, ticket.seeds, strict=True)
        group = Group(ticket, tuple(_trajectory(prompt_ids, completion, seed) for completion, seed in pairs))
        return group, summarize(group, Span("rollout", self.rank, began_s, time.time()))

    async def load(self, weights: ExportedWeights) -> int:
        """Serve other weights; returns the version that is served now. Raises WrongWeights, ActorLost."""
        self.clock.pause(True)
        await self._guard("load", self.engine.load(weights))
        self.clock.pause(False)
        return self.engine.version

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """One of the calls by which the learner sends weights over NCCL or CUDA IPC; see its `Engine`."""
        await self._guard("connect", self.engine.init_weight_transfer_engine(init_info))

    async def begin_update(self) -> None:
        """As above. Until `commit` or `abandon_update` requests wait."""
        self.clock.pause(True)
        await self._guard("load", self.engine.begin_update())

    async def start_weight_update(self) -> None:
        """As above."""
        await self._guard("load", self.engine.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """As above."""
        await self._guard("load", self.engine.update_weights(update_info))

    async def finish_weight_update(self) -> None:
        """As above."""
        await self._guard("load", self.engine.finish_weight_update())

    async def commit(self, version: int, fingerprint: str) -> int:
        """Serve what the learner sent; returns the version that is served now. Raises WrongWeights, ActorLost."""
        await self._guard("load", self.engine.commit(version, fingerprint))
        self.clock.pause(False)
        return self.engine.version

    async def abandon_update(self) -> bool:
        """Give up an update; whether the old weights serve on."""
        whole: bool = await self._guard("load", self.engine.abandon_update())
        self.clock.pause(not whole)
        return whole

    async def canary(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of tokens 1.. of each sequence under the serving weights."""
        return list(
            await self._guard("canary", asyncio.gather(*(self.engine.score(sequence) for sequence in sequences)))
        )

    async def usage(self) -> tuple[float, float]:
        """Seconds with a request in flight that is not held up by a load, and all seconds, since the last call."""
        return self.clock.read()

    async def shutdown(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()

    async def _guard(self, phase: str, work: Any) -> Any:
        """A dead engine is a lost actor."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await work
        except EngineDeadError as error:
            raise ActorLost("rollout", self.rank, phase, f"the vLLM engine died ({error})") from None


def _trajectory(prompt_ids: Sequence[int], completion: Completion, seed: int) -> Trajectory:
    return Trajectory.from_completion(
        prompt_ids, completion.token_ids, completion.logprobs, completion.versions, completion.finish_reason, seed
    )


def summarize(group: Group, span: Span) -> GroupSummary:
    """Oldest version, sampled tokens and completions that stopped by themselves."""
    trajectories = group.trajectories
    return GroupSummary(
        oldest_version=min(t.oldest_version for t in trajectories),
        num_tokens=sum(t.num_completion_tokens for t in trajectories),
        num_stopped=sum(t.finish_reason is FinishReason.STOP for t in trajectories),
        span=span,
    )


def engine_settings(
    model: Path, cfg: RolloutConfig, dtype: str, seed: int, transport: str, adapter: AdapterConfig | None
) -> dict[str, Any]:
    """Keyword arguments of `cluster.actors.engine.engine.EngineSettings`."""
    return {
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": cfg.max_model_len,
        "max_num_seqs": cfg.max_num_seqs,
        "kv_cache_bytes": cfg.kv_cache_bytes or (None if cfg.num_gpus else CPU_KV_CACHE_BYTES),
        "transport": transport,
        "on_gpu": cfg.num_gpus > 0,
        "tensor_parallel_size": max(cfg.num_gpus, 1),
        "gpu_memory_utilization": cfg.gpu_memory_utilization,
        "adapter": adapter,
    }
