"""Inner epochs: the optimizer steps that share a batch, and what the policy said before the first of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from align.data.batching import Batch
from align.data.prompts import derive_seed
from align.data.sampling import Sampling
from align.data.token_budget import TokenBudget
from align.learner.shares import passes
from align.model.policy import Policy


def minibatches(num_trajectories: int, num_epochs: int, num_minibatches: int, version: int) -> Iterator[list[int]]:
    """The rows of every optimizer step of a batch: `num_epochs` passes, each of `num_minibatches` steps.

    In each pass every row comes once, in an order that the version and the pass decide, so that a resumed run repeats it; the
    shares differ by at most one row. A pass of one step keeps the order of the batch.

    Args:
        num_trajectories: Rows of the batch.
        num_epochs: Passes.
        num_minibatches: Steps of a pass.
        version: The learner's policy version before the batch.

    Raises:
        ValueError: If there are more steps in a pass than rows.

    Source: Schulman et al. (2017), Proximal Policy Optimization, algorithm 1 (K epochs, minibatches of M samples); here a sample
    is a trajectory, since the loss of some surrogates is.
    """
    if num_minibatches > num_trajectories:
        raise ValueError(f"{num_minibatches} minibatches of {num_trajectories} trajectories: one would be empty")
    for epoch in range(num_epochs):
        order = list(range(num_trajectories))
        if num_minibatches > 1:
            random.Random(derive_seed("minibatches", version, epoch)).shuffle(order)
        bounds = [i * num_trajectories // num_minibatches for i in range(num_minibatches + 1)]
        yield from (order[start:end] for start, end in pairwise(bounds))


@torch.no_grad()
def old_logprobs(policy: Policy, batch: Batch, budget: TokenBudget, sampling: Sampling) -> Tensor:
    """Log-probabilities of the batch's loss tokens under the policy as it is, every rank its share. [B, T], 0 elsewhere.

    Args:
        policy: The policy.
        batch: The batch.
        budget: Of a forward pass.
        sampling: The distribution that the batch was sampled from.
    """
    result = torch.zeros_like(batch.behavior_logprobs)
    for one in passes(policy.ranks, batch.lengths.tolist(), budget.cut):
        part = batch.rows(one.rows)
        lengths = part.lengths if budget.packs else None
        output = policy.token_logprobs(part.token_ids, wanted=part.loss_mask, lengths=lengths, sampling=sampling)
        if one.counts:
            result[one.rows, : part.token_ids.shape[1]] = output.logprobs
    return policy.ranks.sum(result)
