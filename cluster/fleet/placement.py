"""Where processes run: Ray's start, the resource arithmetic, and the only `ray.remote`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.data.types import Ticket
from align.rewards.kinds import verifier_of
from cluster.actors.learner import LearnerActor, Place
from cluster.actors.rollout import RolloutActor, engine_settings
from cluster.actors.scorer import ScorerActor
from cluster.actors.weights import Link
from cluster.capacity.bill import SHARED_GPU, places
from cluster.capacity.fit import Node
from cluster.capacity.machines import nodes
from cluster.capacity.remedies import check_fit, settings_that_fit
from cluster.faults import ResourceError
from cluster.fleet.handles import Deadlines, LearnerHandle, RolloutHandle
from cluster.fleet.publication import FleetHandle
from cluster.fleet.reservation import Reservation, grows_to, reserve
from cluster.fleet.scorers import ScorerHandle, ScorerPool
from cluster.record.sinks.console import Console
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
class Demand:
    """What a run asks of Ray, in all."""

    num_cpus: float
    num_gpus: float

    @classmethod
    def of(cls, cfg: RunConfig) -> Demand:
        """Sums over the roles."""
        asked = places(cfg)
        return cls(sum(r.count * r.cpus for r in asked), sum(r.count * r.gpus for r in asked))

    def check(self, num_cpus: float, num_gpus: float, where: str) -> None:
        """Raise ResourceError if this can never fit."""
        for kind, needed, there in (("CPUs", self.num_cpus, num_cpus), ("GPUs", self.num_gpus, num_gpus)):
            if needed > there:
                raise ResourceError(
                    f"the run needs {needed:g} {kind}, {where} has {there:g}",
                    f"lower rollout.num_actors, learner.num_ranks or num_{kind.lower()} of the roles, "
                    f"or use a cluster with {needed:g} {kind}",
                )


def check_memory(cfg: RunConfig, weights_bytes: int, memory_bytes: int) -> None:
    """Raise ResourceError if what surely lies in host memory is more than there is."""
    needed = _host_bytes(cfg, weights_bytes)
    if needed > memory_bytes:
        fits = settings_that_fit(cfg, lambda other: _host_bytes(other, weights_bytes) <= memory_bytes)
        changes = [*itertools.islice(fits, 1), f"a machine with {math.ceil(needed / 2**30)} GiB", "a smaller model"]
        raise ResourceError(
            f"the run needs at least {needed / 2**30:.1f} GiB of memory, this machine has {memory_bytes / 2**30:.1f} GiB",
            "would fit: " + ", or ".join(changes[:2]),
        )


def _host_bytes(cfg: RunConfig, weights_bytes: int) -> int:
    """What surely lies in host memory.

    On CPUs: weights, gradients and Adam's two moments of the learner in float32 (4 x, shared by its ranks, each of which loads
    all weights at first), the weights and the keys and values of every engine, and every copy of the reference, if there is
    one, which is taken to be as large as the policy; where it is refreshed, the first one is kept beside the newest.
    """
    learner = 0 if cfg.learner.num_gpus else max(4, cfg.learner.num_ranks) * weights_bytes
    engine = 0 if cfg.rollout.num_gpus else weights_bytes + (cfg.rollout.kv_cache_bytes or 0)
    copies = 0 if cfg.scorer.num_gpus or cfg.reference is None else 1 + bool(cfg.refresh_every)
    scorer = copies * weights_bytes
    return learner + cfg.rollout.num_actors * engine + cfg.scorer.num_actors * scorer


def _gpus(cfg: RunConfig, num_gpus: int) -> float:
    """GPUs that Ray sets aside for the learner or an engine. With "ipc" both are on one, which scorers may share."""
    return SHARED_GPU if cfg.transport == "ipc" else num_gpus


@contextlib.contextmanager
def ray_session(cfg: RunConfig | None, weights_bytes: int) -> Iterator[str]:
    """Join the cluster that RAY_ADDRESS names (as in a Ray job), else start Ray on this machine alone.

    A local Ray listens on 127.0.0.1 only and has no dashboard; its environment was set by `cluster.run.entry.closed_ray`.

    Args:
        cfg: The run, or None to look at the cluster whatever it has.
        weights_bytes: Size of the policy's weights on disk.

    Yields:
        Ray's session folder with its logs.

    Raises:
        ResourceError: If the run can never fit.
    """
    try:
        with _interrupts_held():
            context = _join(cfg, address) if (address := cluster_address()) else _start(weights_bytes)
        yield str(context.address_info.get("session_dir", ""))
    finally:
        with _interrupts_held():
            ray.shutdown()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold a Ctrl-C until the block is over: Ray that is interrupted while it starts or ends crashes the process later."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            raise KeyboardInterrupt


def _join(cfg: RunConfig | None, address: str) -> Any:
    context = _init(f"join the cluster at {address}", address=address)
    if cfg is not None:
        check_cluster(cfg, address)
    return context


def check_cluster(cfg: RunConfig, address: str) -> None:
    """Raise ResourceError if the cluster that was joined can never hold the run."""
    where = f"the cluster at {address}"
    if most := grows_to():
        Demand.of(cfg).check(*within_reach(ray.cluster_resources(), most), where)
    else:
        machines = nodes(machine["Resources"] for machine in ray.nodes() if machine["Alive"])
        check_fit(cfg, places, machines, f"of {where}")


def within_reach(now: Mapping[str, float], most: Mapping[str, float]) -> tuple[float, float]:
    """CPUs and GPUs that a cluster has now or, where it grows by itself, may have."""
    return max(now.get("CPU", 0), most.get("CPU", 0)), max(now.get("GPU", 0), most.get("GPU", 0))


def _start(weights_bytes: int) -> Any:
    return _init(
        "start Ray on this machine",
        address="local",
        num_cpus=num_local_cpus(),
        num_gpus=_local_gpus(),
        include_dashboard=False,
        object_store_memory=(256 << 20) + 4 * weights_bytes,
        _node_ip_address="127.0.0.1",
    )


def _init(what: str, **options: Any) -> Any:
    try:
        return ray.init(namespace="align", logging_level="ERROR", log_to_driver=False, **options)
    except Exception as error:  # Ray raises a bare one when a node takes longer than 30 s to come up
        raise ResourceError(
            f"could not {what}: {error}", "check RAY_ADDRESS and the cluster's token, or try again"
        ) from None


def check_machine(cfg: RunConfig, weights_bytes: int) -> None:
    """Raise ResourceError if a local run can never fit this machine; before anything is started."""
    here = Node(cpus=num_local_cpus(), gpus=_local_gpus(), memory_gib=math.inf, gpu_memory_gib=math.inf)
    check_fit(cfg, places, [here], "here", can_join=False)
    check_memory(cfg, weights_bytes, psutil.virtual_memory().total)


def num_local_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names, or None for a Ray of the run's own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


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


async def start_workers(cfg: RunConfig, run_dir: Path, policy: Path, canary: list[Ticket], console: Console) -> Workers:
    """Start learner, scorers and rollout actors side by side and wait until all are up.

    Args:
        cfg: The run.
        run_dir: The run folder.
        policy: Folder of the policy to start from.
        canary: Tickets whose prompts begin the canary sequences.
        console: Told of warnings.

    Raises:
        ActorLost: If one does not start within its deadline.
        ResourceError: If the cluster has no room for them.
    """
    reservation = await reserve(cfg, console.say, console.warn)
    learner = new_learner(cfg, run_dir, policy, reservation)

    def create_scorer(rank: int) -> Any:
        return _create_scorer(cfg, reservation.strategy("scorer", rank))

    def create_rollout(rank: int) -> Any:
        return _create_rollout(cfg, rank, reservation.strategy("rollout", rank))

    scorers = [new_scorer(cfg, rank, reservation) for rank in range(cfg.scorer.num_actors)]
    actors = [new_rollout(cfg, rank, reservation) for rank in range(cfg.rollout.num_actors)]
    await asyncio.gather(learner.ready(), *(s.ready() for s in scorers), *(a.ready() for a in actors))
    prompts = [ticket.prompt.token_ids for ticket in canary]
    fleet = FleetHandle(
        actors,
        create_rollout,
        learner,
        cfg.rollout,
        cfg.weights,
        cfg.engine_dtype,
        await learner.canary_sequences(prompts, cfg.rollout.max_model_len - 1, cfg.run.seed),
        Link.of(cfg.weights, cfg.transport, cfg.rollout.num_gpus, cfg.rollout.load_deadline_s),
        console.warn,
    )
    scorer_pool = ScorerPool(scorers, create_scorer, cfg.scorer.max_restarts, console.warn)
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
