"""Small learners, what one update does to them, and what can be read off them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import metrics
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch
from align.data.sampling import Sampling
from align.learner.learner import Learner, LearnerConfig, UpdateStats
from align.learner.optimizer import OptimizerConfig
from align.model.policy import Policy
from tests.fakes.batches import ragged_batch
from tests.fakes.critics import new_critic
from tests.oracles.tabular import TabularLM

Gradients = dict[str, Tensor]
PolicyFactory = Callable[[], Policy]


def new_learner(policy: Policy, max_tokens: int = 10_000, num_steps: int = 10, **settings: Any) -> Learner:
    """A learner without clipping whose Adam is smooth around 0, so that rounding in a gradient stays rounding."""
    optimizer = {"lr": 1e-2, "eps": 1.0, "max_grad_norm": math.inf}
    optimizer |= {k: settings.pop(k) for k in list(settings) if k in OptimizerConfig.model_fields}
    cfg = {"max_tokens_per_micro_batch": max_tokens}
    cfg |= {k: settings.pop(k) for k in list(settings) if k in LearnerConfig.model_fields}
    temperature = settings.pop("temperature", 1.0)
    of_critic = {"warmup_steps": settings.pop("critic_warmup_steps", 0), "max_tokens": max_tokens}
    algorithm = AlgorithmConfig(**settings)
    critic = new_critic(value_clip=algorithm.value_clip, **of_critic) if algorithm.baseline == "critic" else None
    return Learner(
        policy, algorithm, OptimizerConfig(**optimizer), LearnerConfig(**cfg), num_steps, Sampling(temperature), critic
    )


def update(learner: Learner, batch: Batch) -> tuple[Gradients, UpdateStats]:
    """One update, and the gradient as Adam got it (after clipping)."""
    gradients: Gradients = {}

    def record(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in learner.policy.model.named_parameters() if p.grad is not None})

    hook = learner.optimizer.adam.register_step_pre_hook(record)
    stats = learner.update(batch)
    hook.remove()
    return gradients, stats


def weights(learner: Learner) -> Gradients:
    return {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}


def adam_state(learner: Learner) -> dict[str, Tensor]:
    named = learner.policy.model.named_parameters()
    return {f"{n}.{k}": v.clone() for n, p in named for k, v in learner.optimizer.adam.state.get(p, {}).items()}


def reduced(stats: UpdateStats) -> dict[str, float]:
    """The metrics of an update, less the one that is a time."""
    values = metrics.reduce(stats.metrics)
    del values["throughput/trained_tokens_per_s"]
    return values


def trained_and_restored(
    policy: Policy, folder: Path, batch: Callable[[int], Batch] = ragged_batch, **settings: Any
) -> tuple[Learner, Learner]:
    """A learner after updates with batches 0 and 1, and another one of what the first saved then."""
    learner = new_learner(policy, **settings)
    for seed in (0, 1):
        update(learner, batch(seed))
    learner.policy.save(folder / "policy")
    learner.save_optimizer(folder / "optimizer.safetensors")
    restored = new_learner(Policy.load(folder / "policy"), **settings)
    restored.load_optimizer(folder / "optimizer.safetensors", version=2)
    return learner, restored


def bandit(probabilities: list[float]) -> Policy:
    return Policy(TabularLM(torch.tensor([probabilities]).log()), tokenizer=None)


EXTRA = {"dr_grpo": {"loss_length": 12}}
"""What a bundle asks the run for."""
