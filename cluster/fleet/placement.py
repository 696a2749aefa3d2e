"""The processes of a run, made where it has its places: the only `ray.remote`."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.data.types import Ticket
from align.rewards.kinds import verifier_of
from cluster.actors.learner import LearnerActor, Place
from cluster.actors.rollout import RolloutActor, engine_settings
from cluster.actors.scorer import ScorerActor
from cluster.actors.weights import Link
from cluster.capacity.bill import SHARED_GPU
from cluster.fleet.canary import Canary
from cluster.fleet.learner import Deadlines, LearnerHandle
from cluster.fleet.publication import FleetHandle
from cluster.fleet.reservation import Reservation, Say, reserve
from cluster.fleet.rollout import RolloutHandle
from cluster.fleet.scorers import ScorerHandle, ScorerPool
from cluster.spec.config import RunConfig

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


@dataclass(frozen=True, slots=True)
class Workers:
    """The started actors of a run."""

    fleet: FleetHandle
    scorers: ScorerPool
    learner: LearnerHandle

    async def shutdown(self) -> None:
        """End the engines' processes in an orderly way; Ray ends the rest."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(10):
                await asyncio.gather(*(a.actor.shutdown.remote() for a in self.fleet.actors), return_exceptions=True)


async def start_workers(
    cfg: RunConfig, run_dir: Path, policy: Path, canary: list[Ticket], say: Say, warn: Say
) -> Workers:
    """Start learner, scorers and rollout actors side by side and wait until all are up.

    Args:
        cfg: The run.
        run_dir: The run folder.
        policy: Folder of the policy to start from.
        canary: Tickets whose prompts begin the canary sequences.
        say: Told of a wait for room.
        warn: Told of warnings.

    Raises:
        ActorLost: If one does not start within its deadline.
        ResourceError: If the cluster has no room for them.
    """
    reservation = await reserve(cfg, say, warn)
    learner = new_learner(cfg, run_dir, policy, reservation)

    def create_scorer(rank: int) -> Any:
        return _create_scorer(cfg, reservation.strategy("scorer", rank))

    def create_rollout(rank: int) -> Any:
        return _create_rollout(cfg, rank, reservation.strategy("rollout", rank))

    scorers = [new_scorer(cfg, rank, reservation) for rank in range(cfg.scorer.num_actors)]
    actors = [new_rollout(cfg, rank, reservation) for rank in range(cfg.rollout.num_actors)]
    await asyncio.gather(learner.ready(), *(s.ready() for s in scorers), *(a.ready() for a in actors))
    prompts = [ticket.prompt.token_ids for ticket in canary]
    sequences = await learner.canary_sequences(prompts, cfg.rollout.max_model_len - 1, cfg.run.seed)
    fleet = FleetHandle(
        actors,
        create_rollout,
        learner,
        cfg.rollout,
        Canary(sequences, cfg.weights.canary_limits(cfg.engine_dtype), warn),
        Link.of(cfg.weights, cfg.transport, cfg.rollout.num_gpus, cfg.rollout.load_deadline_s),
        warn,
    )
    scorer_pool = ScorerPool(scorers, create_scorer, cfg.scorer.max_restarts, warn)
    return Workers(fleet, scorer_pool, learner)


def new_learner(cfg: RunConfig, run_dir: Path, policy: Path, reservation: Reservation) -> LearnerHandle:
    """A learner that starts up, on all its ranks."""
    first, *others = _create_learners(cfg, run_dir, policy, reservation)
    deadlines = cfg.deadlines
    return LearnerHandle(first, Deadlines(deadlines.start_s, deadlines.update_s, deadlines.save_s), others)


def new_scorer(cfg: RunConfig, rank: int, reservation: Reservation) -> ScorerHandle:
    """A scorer that starts up."""
    actor = _create_scorer(cfg, reservation.strategy("scorer", rank))
    return ScorerHandle(actor, rank, cfg.scorer, cfg.quarantine.deadline_s if verifier_of(cfg.reward) else 0)


def new_rollout(cfg: RunConfig, rank: int, reservation: Reservation) -> RolloutHandle:
    """A rollout actor that starts up."""
    actor = _create_rollout(cfg, rank, reservation.strategy("rollout", rank))
    return RolloutHandle(actor, rank, cfg.rollout, max_groups_per_actor(cfg))


def on_node(kind: type, node_id: str) -> Any:
    """An actor of a plain class on this node of Ray's and no other. It takes nothing from a run, and sees all GPUs."""
    return (
        ray.remote(kind)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env={"env_vars": QUIET | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
        )
        .remote()
    )


def max_groups_per_actor(cfg: RunConfig) -> int:
    """Groups in flight on one actor: its share of all slots, so that no actor takes what another could do."""
    slots = (cfg.run.max_staleness + 1) * cfg.run.prompts_per_step
    return math.ceil(slots / cfg.rollout.num_actors)


def _create_learners(cfg: RunConfig, run_dir: Path, policy: Path, reservation: Reservation) -> list[Any]:
    """All ranks of the learner."""
    num_ranks = cfg.learner.num_ranks
    strategies = [reservation.strategy("learner", rank) for rank in range(num_ranks)]
    if num_ranks == 1:
        return [_create_learner(cfg, run_dir, policy, strategies[0])]
    # No rank gives up on another before this process does: the longest of its deadlines, which for a send has four calls.
    deadlines = cfg.deadlines
    timeout_s = max(deadlines.start_s, deadlines.update_s, deadlines.save_s + 4 * cfg.rollout.load_deadline_s)
    spots = [Place(rank, ray.util.get_node_ip_address, timeout_s) for rank in range(num_ranks)]
    return [
        _create_learner(cfg, run_dir, policy, strategy, spot) for strategy, spot in zip(strategies, spots, strict=True)
    ]


def _create_learner(cfg: RunConfig, run_dir: Path, policy: Path, strategy: Any, place: Place | None = None) -> Any:
    options = {
        "num_cpus": cfg.learner.num_cpus,
        "num_gpus": _gpus(cfg, cfg.learner.num_gpus),
        "scheduling_strategy": strategy,
        "runtime_env": _environment(cfg.learner.num_threads),
    }
    return (
        ray.remote(LearnerActor)
        .options(**options)
        .remote(
            policy.resolve(),
            cfg.algorithm,
            cfg.optimizer,
            cfg.learner,
            compute_dtype=cfg.learner_dtype,
            wire_dtype=cfg.engine_dtype,
            num_steps=cfg.run.steps,
            sampling=cfg.sampling.distribution,
            judge=cfg.evaluation.judge,
            reward=cfg.reward,
            trajectories=run_dir.resolve() / "trajectories",
            seed=cfg.run.seed,
            critic=cfg.critic,
            adapter=cfg.policy.adapter,
            place=place,
            verifier_deadline_s=cfg.quarantine.deadline_s,
        )
    )


def _create_scorer(cfg: RunConfig, strategy: Any) -> Any:
    options = {
        "num_cpus": cfg.scorer.num_cpus,
        "num_gpus": cfg.scorer.num_gpus,
        "scheduling_strategy": strategy,
        "runtime_env": _environment(cfg.scorer.num_threads),
    }
    return (
        ray.remote(ScorerActor)
        .options(**options)
        .remote(
            policy=cfg.policy.model.resolve(),
            reference=cfg.reference and cfg.reference.model.resolve(),
            reward=cfg.reward,
            with_ref_logprobs=cfg.algorithm.reads_reference,
            cfg=cfg.scorer,
            compute_dtype=cfg.scorer_dtype,
            num_top=cfg.algorithm.num_top,
            verifier_deadline_s=cfg.quarantine.deadline_s,
        )
    )


def _create_rollout(cfg: RunConfig, rank: int, strategy: Any) -> Any:
    """Engines start from the initial policy, whatever the run stands at: before they serve, they get published weights."""
    on_gpu = cfg.rollout.num_gpus > 0
    environment = {} if on_gpu else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    if cfg.transport == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # CUDA's memory handles reach the engine pickled
    options = {
        "num_cpus": cfg.rollout.num_cpus,
        "num_gpus": _gpus(cfg, cfg.rollout.num_gpus),
        "scheduling_strategy": strategy,
        "runtime_env": _environment(cfg.rollout.num_threads, environment),
        # Training and an evaluation at once, with room for loads: a call beyond this number would wait for a group.
        "max_concurrency": 2 * max_groups_per_actor(cfg) + 16,
    }
    model, seed, adapter = cfg.policy.model.resolve(), cfg.run.seed + rank, cfg.policy.engine_adapter
    settings = engine_settings(model, cfg.rollout, cfg.engine_dtype, seed, cfg.transport, adapter)
    return ray.remote(RolloutActor).options(**options).remote(rank, settings, cfg.sampling)


def _environment(num_threads: int, more: dict[str, str] | None = None) -> dict[str, Any]:
    threads = {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {"env_vars": QUIET | threads | (more or {})}


def _gpus(cfg: RunConfig, num_gpus: int) -> float:
    """GPUs that Ray sets aside for the learner or an engine. With "ipc" both are on one, which scorers may share."""
    return SHARED_GPU if cfg.transport == "ipc" else num_gpus
