"""The arithmetic of a run: the numbers of a batch, of staleness, and of what travels and is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.capacity.bill import BYTES, moment_bytes
from cluster.spec.config import RunConfig
from cluster.spec.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The numbers of a batch, of staleness and of what travels and is stored.

    Attributes:
        optimizer_steps: Of one batch.
        max_micro_batches: Of one rank in a step, if all trajectories are as long as they can be.
    """

    groups_in_flight: int
    trajectories_per_step: int
    max_tokens_per_step: int
    optimizer_steps: int
    max_micro_batches: int
    publish_bytes: int
    published_bytes_per_step: int
    checkpoint_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, cfg: RunConfig, model: ModelShape, critic: ModelShape | None = None) -> Arithmetic:
        """From the run file and the shapes of policy and critic."""
        trajectories = cfg.run.prompts_per_step * cfg.run.group_size
        per_row = max(cfg.learner.max_tokens_per_micro_batch // cfg.rollout.max_model_len, 1)
        minibatches = cfg.algorithm.num_minibatches
        of_a_rank = math.ceil(math.ceil(trajectories / minibatches) / cfg.learner.num_ranks)
        optimizer_steps = cfg.algorithm.num_epochs * minibatches
        published = model.num_trained if cfg.policy.engine_adapter else model.num_parameters
        publish = BYTES[cfg.engine_dtype] * published
        checkpoint = 4 * (model.num_parameters + model.num_adapter_parameters)
        checkpoint += moment_bytes(cfg.optimizer, model)
        if cfg.critic is not None and critic is not None:
            checkpoint += 4 * critic.num_parameters + moment_bytes(cfg.critic.optimizer, critic)
        return cls(
            groups_in_flight=(cfg.run.max_staleness + 1) * cfg.run.prompts_per_step,
            trajectories_per_step=trajectories,
            max_tokens_per_step=trajectories * cfg.rollout.max_model_len,
            optimizer_steps=optimizer_steps,
            max_micro_batches=optimizer_steps * math.ceil(of_a_rank / per_row),
            publish_bytes=publish,
            published_bytes_per_step=publish * cfg.rollout.num_actors,
            checkpoint_bytes=checkpoint,
            disk_bytes=(cfg.checkpoint.keep + 1) * checkpoint + 4 * model.num_parameters,
        )
