"""A learner on one rank or several: how it is made, and what one rank can tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from align import metrics
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.policy import Policy
from align.model.ranks import Ranks, full_tensor
from tests.fakes.models import character_tokenizer, random_qwen3

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]
STEPS = 5


def new_learner(ranks: Ranks, tied: bool, policy: Policy | None = None, **settings: Any) -> Learner:
    """A learner whose passes are small, so that every rank has several and not all have the same number."""
    policy = policy or Policy(random_qwen3(seed=0, tied=tied), character_tokenizer())
    policy.shard(ranks)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.01)
    cfg = LearnerConfig(max_tokens_per_micro_batch=33)
    return Learner(policy, AlgorithmConfig(**settings), optimizer, cfg, num_steps=10)


def weights(learner: Learner) -> Arrays:
    """The whole policy, by its own publication; empty on all ranks but the first."""
    return gathered(learner, learner.policy.named_weights)


def gathered(learner: Learner, publish: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Arrays:
    """What the first rank publishes while the others help to gather it."""
    ranks = learner.policy.ranks
    if not ranks.first:
        learner.policy.help_gather()
        return {}
    found = {name: weight.detach().cpu().numpy().copy() for name, weight in publish()}
    ranks.end_gathering()
    return found


def step(learner: Learner, batch: Batch) -> dict[str, float]:
    """The reduced metrics of one update, less the one that is a time."""
    values = metrics.reduce(learner.update(batch).metrics)
    del values["throughput/trained_tokens_per_s"]
    del values["throughput/padding_fraction"]  # a pass that only keeps step is work for nothing
    return values


def shards(learner: Learner) -> Arrays:
    """What this rank holds of the weights and of Adam's state."""
    found = {}
    for name, parameter in learner.policy.model.named_parameters():
        state = learner.optimizer.adam.state[parameter]
        for key, value in {"weight": parameter.detach(), **state}.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            found[f"{name} {key}"] = local.numpy().copy()
    return found


def adam_state(learner: Learner) -> Arrays:
    """All of Adam's state."""
    named = [(name, p) for name, p in learner.policy.model.named_parameters() if p.requires_grad]
    states = {f"{name} {key}": value for name, p in named for key, value in learner.optimizer.adam.state[p].items()}
    return {name: full_tensor(value).numpy().copy() for name, value in states.items()}


@torch.no_grad()
def look(learner: Learner) -> None:
    """A forward pass without a backward, as for the canary and evaluations; it leaves a part of the weights whole."""
    learner.policy.token_logprobs(torch.tensor([[5, 6, 7]]))


PLAIN = {"aggregation": "sum", "importance": "none", "baseline": "none"}
