"""The bill of a run: its processes, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from align.learner.optimizer import OptimizerConfig
from cluster.actors.rollout import CPU_KV_CACHE_BYTES
from cluster.spec.config import RunConfig
from cluster.spec.shape import ModelShape, model_shape

BYTES = {"float32": 4, "bfloat16": 2}
_ACTIVATION_BYTES = 34  # per token, width and layer, in 16 bits, without scores: Korthikanti et al. 2022, table 2
SHARED_GPU = 0.25  # what learner and engine each ask of Ray when they share a GPU; it limits nothing
# What Python, torch, vLLM and Ray take before any model, resident, measured in the demo on CPUs (make demo, two cores).
_PROCESS_BYTES = {"controller": 900 << 20, "learner": 500 << 20, "rollout": 1400 << 20, "scorer": 450 << 20}
_MADE_OF = {
    "controller": "the controller, Ray and W&B of one machine",
    "learner": "weights, gradient, two moments in float32: 16 B x parameters / ranks (with an adapter 4 B, and 16 B x its own; "
    "moments in 8 bits 2.1 B of the 16, offloaded ones in host memory; taken out of either, those of one matrix in float32; a "
    "critic 16 B x its own on every rank); on many ranks embeddings, head and one layer whole; activations 34 x tokens x width "
    "x layers (16-bit; 34 + 2 x layers with activation_checkpointing); logits, at most max_logits_bytes, twice; in host memory "
    "at times all weights (4 B), on many ranks all moments (8 B)",
    "rollout": "weights in the engine's type, keys and values of one longest sequence at least; on CPU a staged copy of the "
    "weights",
    "scorer": "the reference in float32 (4 B), on CPU a bfloat16 copy where it computes in it (2 B), where it is refreshed the "
    "first one and the one being read (8 B), logits 4 B x tokens x vocabulary",
}


@dataclass(frozen=True, slots=True)
class Role:
    """What one process of a role needs, and how many there are.

    Attributes:
        host_bytes: Host memory of one process.
        gpu_bytes: Memory on each of its GPUs.
        formula: What the bytes are made of.
    """

    name: str
    count: int
    cpus: float
    gpus: float
    host_bytes: int
    gpu_bytes: int
    formula: str


Bill = Callable[[RunConfig], Sequence[Role]]
"""What the processes of a run need: `roles` with the shapes of its models, or `places`."""


def model_shapes(cfg: RunConfig) -> tuple[ModelShape, ModelShape | None, ModelShape | None]:
    """The shapes of policy, reference and critic, as far as there are any.

    Raises:
        ConfigError: If a model folder has no config.json.
    """
    policy = model_shape(cfg.policy.model, cfg.policy.adapter)
    reference = model_shape(cfg.reference.model) if cfg.reference else None
    return policy, reference, critic_shape(cfg)


def critic_shape(cfg: RunConfig) -> ModelShape | None:
    """The shape of the critic's trunk, if there is a critic."""
    return None if cfg.critic is None else model_shape(cfg.critic.model or cfg.policy.model)


def roles(
    cfg: RunConfig, policy: ModelShape, reference: ModelShape | None, critic: ModelShape | None = None
) -> list[Role]:
    """Controller, learner, rollout actors and scorers of a run; host memory with what a process takes before any model."""
    controller = Role("controller", 1, 0, 0, 0, 0, _MADE_OF["controller"])
    learner, rollout = _learner(cfg, policy, critic), _rollout(cfg, policy)
    if cfg.transport == "ipc":  # both on one GPU
        both = learner.gpu_bytes + rollout.gpu_bytes
        learner, rollout = (replace(role, gpus=SHARED_GPU, gpu_bytes=both) for role in (learner, rollout))
    found = [controller, learner, rollout, _scorer(cfg, reference)]
    return [replace(role, host_bytes=role.host_bytes + _PROCESS_BYTES[role.name]) for role in found]


def places(cfg: RunConfig) -> list[Role]:
    """What Ray is asked to set aside, which is CPUs and GPUs: it knows no memory, so none is counted here.

    By default scorers set no CPU aside, since on one machine they compute while others wait. Learner and engine that share a
    GPU ask for one place.
    """
    learner, rollout, scorer = cfg.learner, cfg.rollout, cfg.scorer
    asked = [
        ("learner", learner.num_ranks, learner.num_cpus, float(learner.num_gpus)),
        ("rollout", rollout.num_actors, rollout.num_cpus, float(rollout.num_gpus)),
    ]
    if cfg.transport == "ipc":
        asked = [("learner", 1, learner.num_cpus + rollout.num_cpus, 2 * SHARED_GPU)]
    asked.append(("scorer", scorer.num_actors, scorer.num_cpus, scorer.num_gpus))
    return [Role(name, count, cpus, gpus, 0, 0, "") for name, count, cpus, gpus in asked]


def _learner(cfg: RunConfig, model: ModelShape, critic: ModelShape | None) -> Role:
    learner, bytes_each = cfg.learner, BYTES[cfg.learner_dtype]
    tokens, num_ranks = learner.max_tokens_per_micro_batch, learner.num_ranks
    states, host_states = _states(cfg.optimizer, model, num_ranks)
    if cfg.critic is not None and critic is not None:  # whole on every rank
        of_critic = _states(cfg.critic.optimizer, critic, num_ranks=1)
        states, host_states = states + of_critic[0], host_states + of_critic[1]
    adapter = 4 * model.num_adapter_parameters // num_ranks
    activations = _held_of_a_token(model, learner.activation_checkpointing) * bytes_each // 2 * tokens
    gathered = _cast_bytes(bytes_each, model.num_parameters) if num_ranks == 1 else _gathered_bytes(bytes_each, model)
    logits = 2 * min(4 * tokens * model.vocab_size, learner.max_logits_bytes)
    total = states + adapter + activations + gathered + logits
    on_gpu = learner.num_gpus > 0
    loaded = 4 * model.num_parameters if num_ranks == 1 else 8 * model.num_parameters
    return Role(
        "learner",
        num_ranks,
        learner.num_cpus,
        learner.num_gpus,
        loaded + host_states if on_gpu else max(total + host_states, loaded),
        total if on_gpu else 0,
        _MADE_OF["learner"],
    )


def _held_of_a_token(model: ModelShape, checkpointing: bool) -> int:
    """Bytes of activations in 16 bits that a token holds for the way back; with checkpointing, of one layer and all inputs."""
    layers = _ACTIVATION_BYTES + 2 * model.num_layers if checkpointing else _ACTIVATION_BYTES * model.num_layers
    return layers * model.hidden_size


def moment_bytes(cfg: OptimizerConfig, model: ModelShape) -> int:
    """Bytes of Adam's two moments as they are kept, at most: in 8 bits with a float32 scale for every 64 numbers.

    The rows of an adapter's matrices may be too short for blocks.
    """
    eight_bits = cfg.moments == "8bit" and not model.num_adapter_parameters
    return 17 * model.num_trained // 8 if eight_bits else 8 * model.num_trained


def _states(cfg: OptimizerConfig, model: ModelShape, num_ranks: int) -> tuple[int, int]:
    """Weights, gradient and moments of a rank: bytes where it computes, and bytes of moments that are offloaded."""
    kept = moment_bytes(cfg, model) // num_ranks
    states = (4 * model.num_parameters + 4 * model.num_trained) // num_ranks
    if cfg.moments == "8bit" or cfg.offload:  # taken out for one parameter at a time
        states += 8 * model.vocab_size * model.hidden_size // num_ranks
    return (states, kept) if cfg.offload else (states + kept, 0)


def _cast_bytes(bytes_each: int, num_parameters: int) -> int:
    """A copy of float32 weights in the type of the products, where that is another."""
    return bytes_each * num_parameters if bytes_each < 4 else 0


def _gathered_bytes(bytes_each: int, model: ModelShape) -> int:
    """What a rank among many holds whole, at most: embeddings and head (taken as two), and one layer; with their gradients."""
    ends = 2 * model.vocab_size * model.hidden_size
    layer = max(model.num_parameters - ends, 0) // model.num_layers
    return 8 * (ends + layer) + _cast_bytes(bytes_each, layer)


def _rollout(cfg: RunConfig, model: ModelShape) -> Role:
    rollout = cfg.rollout
    bytes_each = BYTES[cfg.engine_dtype]
    shards = max(rollout.num_gpus, 1)
    weights = bytes_each * model.num_parameters // shards
    least_kv = model.kv_bytes_per_token(bytes_each) * rollout.max_model_len // shards
    kv = rollout.kv_cache_bytes or (least_kv if rollout.num_gpus else CPU_KV_CACHE_BYTES)
    on_gpu = rollout.num_gpus > 0
    return Role(
        "rollout",
        rollout.num_actors,
        rollout.num_cpus,
        rollout.num_gpus,
        bytes_each * model.num_parameters if on_gpu else 2 * weights + kv,
        weights + kv if on_gpu else 0,
        _MADE_OF["rollout"],
    )


def _scorer(cfg: RunConfig, model: ModelShape | None) -> Role:
    scorer = cfg.scorer
    processes = (scorer.num_actors, scorer.num_cpus, scorer.num_gpus)
    if model is None or cfg.reference is None:
        return Role("scorer", *processes, 0, 0, "rewards without a reference model")
    on_gpu = scorer.num_gpus > 0
    copies = 4 + (2 if cfg.scorer_dtype == "bfloat16" and not on_gpu else 0)
    copies += 8 if cfg.refresh_every else 0
    logits = 4 * scorer.max_tokens_per_micro_batch * model.vocab_size
    total = copies * model.num_parameters + logits
    return Role(
        "scorer",
        *processes,
        4 * model.num_parameters if on_gpu else total,
        total if on_gpu else 0,
        _MADE_OF["scorer"],
    )
