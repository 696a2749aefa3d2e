"""A decision process that ends by itself, small enough to enumerate every *batch* of trajectories that a policy can sample.

3 tokens, at most 3 of them, token 0 ends: 15 trajectories of 1, 2 or 3 tokens and 13 states, numbered as in `TabularLM`. A
batch of G trajectories is a multiset; 120 of them for G = 2, 3,060 for G = 4. The project's `Objective` is run on each, so
the expectation and the variance of its gradient are sums, without a sampling error.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from align.algorithm import losses
from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch, collate
from align.data.token_logprobs import TokenLogprobs
from align.data.types import ScoredGroup, TokenRewards
from tests.fakes.trajectories import make_group, make_trajectory

V, T, END, NUM_STATES = 3, 3, 0, 1 + 3 + 9


def _completions() -> list[tuple[int, ...]]:
    """Every sequence up to the first end token or to T tokens."""
    whole = itertools.product(range(V), repeat=T)
    return sorted({actions[: actions.index(END) + 1] if END in actions else actions for actions in whole})


COMPLETIONS = _completions()


def _states() -> Tensor:
    """The state that each token of each completion is drawn in [N, T]; 0 behind the end."""
    states = torch.zeros(len(COMPLETIONS), T, dtype=torch.long)
    for row, actions in enumerate(COMPLETIONS):
        for t, action in enumerate(actions[:-1]):
            states[row, t + 1] = V * states[row, t] + 1 + action
    return states


STATES = _states()
ACTIONS = torch.tensor([[*actions, *[0] * (T - len(actions))] for actions in COMPLETIONS])
MASK = torch.tensor([[t < len(actions) for t in range(T)] for actions in COMPLETIONS])


def table(seed: int, scale: float = 0.7) -> Tensor:
    """Logits or rewards [states, V], float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_STATES, V, dtype=torch.float64, generator=generator)


def logprobs_of(logits: Tensor) -> Tensor:
    """`log pi(a_t | s_t)` of every completion [N, T], 0 behind its end."""
    return logits.log_softmax(dim=-1)[STATES, ACTIONS].masked_fill(~MASK, 0.0)


@dataclass(frozen=True)
class Process:
    """Policy, behaviour, reference and rewards as tables [states, V].

    Attributes:
        policy: Logits of what is trained.
        behavior: Logits of what sampled.
        reference: Logits of what KL is charged against.
        rewards: Reward of every action.
    """

    policy: Tensor
    behavior: Tensor
    reference: Tensor
    rewards: Tensor

    @classmethod
    def new(cls, *, off_policy: bool = False, offset: float = 1.0) -> Process:
        """The process of the tests; rewards of size 1 around `offset`."""
        policy = table(0)
        behavior = policy + table(2, 0.5) if off_policy else policy
        return cls(policy, behavior, table(1), offset + table(3, 1.0))

    @cached_property
    def token_rewards(self) -> Tensor:
        """[N, T]."""
        return self.rewards[STATES, ACTIONS].masked_fill(~MASK, 0.0)

    @cached_property
    def probabilities(self) -> Tensor:
        """[N], under the behaviour."""
        return logprobs_of(self.behavior).sum(dim=1).exp()

    @cached_property
    def jacobian(self) -> Tensor:
        """[N, T, states, V] of the policy's log-probabilities by its logits."""
        return torch.autograd.functional.jacobian(logprobs_of, self.policy)

    def gradient(self, kl_coefficient: float = 0.0) -> Tensor:
        """Of `E_pi[sum_t R_t] - kl_coefficient * KL(pi || ref)` over whole trajectories, by autograd. [states, V]."""
        logits = self.policy.clone().requires_grad_()
        logprobs = logprobs_of(logits)
        paid = self.token_rewards - kl_coefficient * (logprobs - logprobs_of(self.reference))
        (gradient,) = torch.autograd.grad((logprobs.sum(dim=1).exp() * paid.sum(dim=1)).sum(), logits)
        return gradient

    def contract(self, coefficients: Tensor) -> Tensor:
        """`sum_bt c_bt grad log pi_bt`. [N, T] -> [states, V]."""
        return torch.einsum("bt,btsv->sv", coefficients, self.jacobian)

    @cached_property
    def everything(self) -> Batch:
        """All completions once, as the learner gets them."""
        behavior, reference = logprobs_of(self.behavior), logprobs_of(self.reference)
        group = make_group(
            [
                make_trajectory([0], actions, behavior[row, : len(actions)].tolist())
                for row, actions in enumerate(COMPLETIONS)
            ]
        )
        scores = tuple(
            TokenRewards(_with_prompt(self.token_rewards, row), _with_prompt(reference, row))
            for row in range(len(COMPLETIONS))
        )
        batch = collate([ScoredGroup(group, scores)])
        # float64 throughout, so that what is compared is the formula
        columns = {"behavior_logprobs": behavior, "rewards": self.token_rewards, "ref_logprobs": reference}
        return replace(batch, **{k: torch.nn.functional.pad(v, (1, 0)) for k, v in columns.items()})

    def coefficients(self, cfg: AlgorithmConfig, rows: tuple[int, ...]) -> Tensor:
        """What the loss on one batch, which is one group, multiplies each `-grad log pi_bt` with. [N, T]."""
        batch = self.everything.rows(rows)
        batch = replace(batch, group_index=torch.zeros(len(rows), dtype=torch.long))
        objective = Objective(cfg)
        advantages, _ = objective.advantages(batch)
        batch, _ = objective.with_loss(batch)
        leaf = self._policy_logprobs[list(rows), : batch.token_ids.shape[1]].requires_grad_()
        token_losses, _ = objective.token_losses(batch, TokenLogprobs(leaf, torch.zeros_like(leaf)), advantages)
        loss = losses.aggregate(token_losses, batch.loss_mask, objective.weights(batch))
        (by_logprob,) = torch.autograd.grad(loss, leaf)
        found = torch.zeros_like(self._policy_logprobs)
        found[:, : leaf.shape[1]].index_add_(0, torch.tensor(rows), by_logprob)
        return -found[:, 1:]

    @cached_property
    def _policy_logprobs(self) -> Tensor:
        """Behind the prompt's token [N, 1 + T]."""
        return torch.nn.functional.pad(logprobs_of(self.policy), (1, 0))

    def batches(self, group_size: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every multiset of trajectories with its probability."""
        p = self.probabilities.tolist()
        for rows in itertools.combinations_with_replacement(range(len(COMPLETIONS)), group_size):
            orders = math.factorial(group_size) / math.prod(map(math.factorial, Counter(rows).values()))
            yield rows, orders * math.prod(p[row] for row in rows)

    def moments(self, cfg: AlgorithmConfig, group_size: int) -> tuple[Tensor, float]:
        """Exact expectation [states, V] of the gradient estimate, and the sum of the variances of its entries."""
        by_logprob = self.jacobian.reshape(len(COMPLETIONS) * T, -1)
        products = by_logprob @ by_logprob.T
        mean, square = torch.zeros(len(COMPLETIONS), T, dtype=torch.float64), 0.0
        for rows, probability in self.batches(group_size):
            found = self.coefficients(cfg, rows)
            mean += probability * found
            square += probability * float(found.reshape(-1) @ products @ found.reshape(-1))
        gradient = self.contract(mean)
        return gradient, square - float(gradient.square().sum())

    def expectation(self, group_size: int = 2, **parts: Any) -> Tensor:
        """The expectation with these parts, by trajectory mean unless said otherwise."""
        return self.moments(AlgorithmConfig(**({"aggregation": "trajectory_mean"} | parts)), group_size)[0]


def _with_prompt(values: Tensor, row: int) -> Any:
    """A completion's values behind the prompt's single token, float32."""
    return torch.cat([torch.zeros(1), values[row, : len(COMPLETIONS[row])].float()]).numpy()
