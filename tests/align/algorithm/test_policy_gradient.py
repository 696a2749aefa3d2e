"""The policy gradient itself: by hand, by enumeration of a whole decision process, and sampled within its error.

The process has 4 tokens and length 3: 64 trajectories and 21 states, so its expected return is a sum that autograd can
differentiate exactly, the entropy term included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from align.algorithm import corrections, losses, returns, surrogates
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch, collate
from align.data.types import ScoredGroup
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.model.policy import Policy
from align.rewards.reference import ReferenceReward, ReferenceRewardConfig, token_reward
from tests.fakes.trajectories import make_group, make_scored, make_trajectory
from tests.oracles.tabular import TabularLM

V, T, NUM_STATES = 4, 3, 1 + 4 + 16
TRAJECTORIES = torch.tensor(list(itertools.product(range(V), repeat=T)))
"""All 64 completions [64, T]."""
TOKEN_IDS = torch.cat([torch.zeros(64, 1, dtype=torch.long), TRAJECTORIES], dim=1)
"""The same behind the prompt's token [64, 1 + T]."""
ROWS, BATCHES = 2, 3000
"""Trajectories per sampled batch, and batches per estimate. Two rows make the bias of a baseline easy to see."""
BASELINES = ("none", "position_mean", "batch_mean")


def table(seed: int) -> Tensor:
    return 0.7 * torch.randn(NUM_STATES, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_logprobs(logits: Tensor) -> Tensor:
    """`log pi(a_t | s_t)` of all 64 trajectories [64, T], written apart from `Policy` and `TabularLM`."""
    log_pi = logits.log_softmax(dim=-1)
    rows = []
    for actions in TRAJECTORIES.tolist():
        state, row = 0, []
        for action in actions:
            row.append(log_pi[state, action])
            state = V * state + 1 + action
        rows.append(torch.stack(row))
    return torch.stack(rows)


@dataclass(frozen=True)
class Process:
    """The process under a policy and a reference, with everything the tests compare.

    Attributes:
        logprobs: [64, T] under the policy.
        jacobian: [64, T, states, V] of `logprobs` by the policy's logits.
        rewards: [64, T] by the project's `token_reward`.
        gradient: [states, V] of the expected return, by autograd over the enumeration.
    """

    logprobs: Tensor
    jacobian: Tensor
    rewards: Tensor
    gradient: Tensor

    @property
    def probabilities(self) -> Tensor:
        """[64] of the trajectories."""
        return self.logprobs.sum(dim=1).exp()


@cache
def process(alpha: float) -> Process:
    """Treat it as read-only."""
    policy, ref_logprobs = table(0).requires_grad_(), all_logprobs(table(1))
    logprobs = all_logprobs(policy)
    total = (ref_logprobs - alpha * logprobs).sum(dim=1)
    (gradient,) = torch.autograd.grad((logprobs.sum(dim=1).exp() * total).sum(), policy)
    cfg = ReferenceRewardConfig(alpha=alpha)
    rewards = token_reward(ref_logprobs.numpy(), logprobs.detach().numpy(), cfg)
    jacobian = torch.autograd.functional.jacobian(all_logprobs, policy.detach(), vectorize=True)
    return Process(logprobs.detach(), jacobian, torch.from_numpy(np.asarray(rewards)), gradient)


def advantages_of(rewards: Tensor, baseline: str) -> Tensor:
    """The project's returns less the project's baseline, for completions without padding."""
    mask = torch.ones_like(rewards, dtype=torch.bool)
    togo = returns.reward_to_go(rewards, mask)
    return togo if baseline == "none" else togo - getattr(returns, baseline)(togo, mask)


def ascent(case: Process, picked: Tensor, advantages: Tensor) -> Tensor:
    """Minus the gradient of the project's loss on the picked trajectories, per trajectory: [states, V]."""
    mask = torch.ones(len(picked), T, dtype=torch.bool)
    weights = losses.trajectory_weights("trajectory_mean", mask, torch.zeros(len(picked), dtype=torch.long))

    def loss(logprobs: Tensor) -> Tensor:
        return losses.aggregate(surrogates.reinforce(logprobs, advantages), mask, weights)

    by_logprob = torch.func.grad(loss)(case.logprobs[picked])
    return -torch.einsum("bt,btsv->sv", by_logprob, case.jacobian[picked])


def ascents(case: Process, drawn: Tensor, advantages: Callable[[Tensor], Tensor]) -> Tensor:
    """`ascent` of each batch by itself, their gradients all at once. [BATCHES, ROWS] -> [BATCHES, states, V]."""
    by_batch = torch.stack([advantages(rows) for rows in drawn])
    return torch.vmap(lambda rows, given: ascent(case, rows, given))(drawn, by_batch)


def samples(case: Process) -> Tensor:
    """[BATCHES, ROWS] trajectories drawn from the policy."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.multinomial(case.probabilities, BATCHES * ROWS, replacement=True, generator=generator)
    return drawn.reshape(BATCHES, ROWS)


def sigmas(estimates: Tensor, expected: Tensor) -> float:
    """Largest distance of the mean estimate from `expected`, in its standard errors. [BATCHES, states, V]."""
    error = estimates.std(dim=0) / math.sqrt(len(estimates))
    return float(((estimates.mean(dim=0) - expected).abs() / error).max())


def expectation_with(case: Process, baseline: str) -> Tensor:
    """The exact expectation of the estimate with a baseline that contains a row's own return.

    `position_mean` takes `1 / ROWS` of every own return away. `batch_mean` takes away `1 / (ROWS * T)` of the sum of all
    own returns; those of other rows are independent and take away nothing.
    """
    if baseline == "none":
        return case.gradient
    if baseline == "position_mean":
        return (1 - 1 / ROWS) * case.gradient
    own = advantages_of(case.rewards, "none").sum(dim=1)
    score = case.jacobian.sum(dim=1)
    return case.gradient - torch.einsum("b,b,bsv->sv", case.probabilities, own, score) / (ROWS * T)


# --- by enumeration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_the_expectation_of_reinforce_over_all_trajectories_is_the_gradient_of_the_expected_return(
    alpha: float,
) -> None:
    case = process(alpha)
    weighted = 64 * case.probabilities[:, None] * advantages_of(case.rewards, "none")
    expectation = ascent(case, torch.arange(64), weighted)
    torch.testing.assert_close(expectation, case.gradient, rtol=1e-6, atol=1e-7)
    assert float(case.gradient.abs().max()) > 0.1


def test_rewards_of_the_past_and_any_number_per_state_drop_out_of_the_expectation() -> None:
    case = process(0.6)
    whole = case.rewards.sum(dim=1, keepdim=True).expand(64, T)
    per_position = torch.tensor([3.0, -5.0, 11.0], dtype=torch.float64)
    for advantages in (whole, advantages_of(case.rewards, "none") - per_position):
        expectation = ascent(case, torch.arange(64), 64 * case.probabilities[:, None] * advantages)
        torch.testing.assert_close(expectation, case.gradient, rtol=1e-6, atol=1e-6)


def test_at_the_reference_the_gradient_with_alpha_1_is_0_and_without_alpha_it_is_not() -> None:
    reference = table(1)
    logprobs = all_logprobs(reference)
    jacobian = torch.autograd.functional.jacobian(all_logprobs, reference, vectorize=True)
    for alpha, is_zero in ((1.0, True), (0.0, False)):
        cfg = ReferenceRewardConfig(alpha=alpha)
        rewards = torch.from_numpy(np.asarray(token_reward(logprobs.numpy(), logprobs.numpy(), cfg)))
        case = Process(logprobs, jacobian, rewards, torch.zeros_like(reference))
        weighted = 64 * case.probabilities[:, None] * advantages_of(rewards, "none")
        largest = float(ascent(case, torch.arange(64), weighted).abs().max())
        assert (largest < 1e-12) if is_zero else (largest > 0.05), largest


# --- sampled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_sampled_estimate_is_within_its_error_of_the_exact_gradient(alpha: float, baseline: str) -> None:
    case = process(alpha)
    estimates = ascents(case, samples(case), lambda rows: advantages_of(case.rewards[rows], baseline))
    expected = expectation_with(case, baseline)
    assert sigmas(estimates, expected) < 5
    assert sigmas(-estimates, expected) > 10, "a wrong sign would go unseen"
    for other in set(BASELINES) - {baseline}:
        assert sigmas(estimates, expectation_with(case, other)) > 5, f"another baseline, {other}, would go unseen"


def test_wrong_estimates_are_far_outside_the_error() -> None:
    case = process(1.0)
    drawn = samples(case)
    without_alpha = process(0.0)
    wrong = {
        "rewards up to t instead of from t on": lambda rows: case.rewards[rows].cumsum(dim=1),
        "the immediate reward alone": lambda rows: case.rewards[rows],
        "returns shifted by one token": lambda rows: advantages_of(case.rewards[rows], "none").roll(1, dims=1),
        "the past with weight -1": lambda rows: (
            advantages_of(case.rewards[rows], "none") - case.rewards[rows].cumsum(dim=1)
        ),
        "the entropy term left out": lambda rows: advantages_of(without_alpha.rewards[rows], "none"),
    }
    right = ascents(case, drawn, lambda rows: advantages_of(case.rewards[rows], "none"))
    assert sigmas(right, case.gradient) < 5
    for name, advantages in wrong.items():
        estimates = ascents(case, drawn, advantages)
        assert sigmas(estimates, case.gradient) > 10, name


def test_the_position_mean_lowers_the_variance_of_an_estimate_of_the_same_expectation() -> None:
    case = process(0.0)
    variance = {}
    for baseline, scale in (("none", 1.0), ("position_mean", 1 - 1 / ROWS)):
        estimates = ascents(case, samples(case), lambda rows, of=baseline: advantages_of(case.rewards[rows], of))
        variance[baseline] = float((estimates / scale).var(dim=0).sum())
    assert variance["position_mean"] < 0.5 * variance["none"]


def outcome_advantages(rewards: Tensor, baseline: str) -> Tensor:
    """The whole return less the project's baseline of outcomes; the rows are one group."""
    mask, index = torch.ones_like(rewards, dtype=torch.bool), torch.zeros(len(rewards), dtype=torch.long)
    outcome = returns.outcomes(rewards, mask)
    whole = outcome[:, None].expand_as(rewards)
    return whole if baseline == "none" else whole - getattr(returns, baseline)(outcome, mask, index)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_leave_one_out_is_unbiased_and_the_group_mean_is_too_small_by_one_nth(alpha: float) -> None:
    case = process(alpha)
    drawn = samples(case)
    scales = {"none": 1.0, "leave_one_out": 1.0, "group_outcome_mean": 1 - 1 / ROWS}
    variance = {}
    for baseline, scale in scales.items():
        estimates = ascents(case, drawn, lambda rows, of=baseline: outcome_advantages(case.rewards[rows], of))
        assert sigmas(estimates, scale * case.gradient) < 5, baseline
        if baseline != "none":
            assert sigmas(estimates, (1.5 - scale) * case.gradient) > 5, f"{baseline}: the other scale would go unseen"
        variance[baseline] = float((estimates / scale).var(dim=0).sum())
    assert variance["leave_one_out"] == pytest.approx(variance["group_outcome_mean"])
    assert variance["leave_one_out"] < 0.75 * variance["none"]


def off_policy_expectation(case: Process, behavior: Tensor, level: str, bound: str, max_weight: float) -> Tensor:
    """The expectation under the behaviour of the weighted gradient on whole returns, by enumeration."""
    everything = torch.ones(64, T, dtype=torch.bool)
    weights, _ = corrections.importance_weights(
        case.logprobs, behavior, everything, level=level, bound=bound, max_weight=max_weight
    )
    probabilities = behavior.sum(dim=1, keepdim=True).exp()
    whole = case.rewards.sum(dim=1, keepdim=True)
    return ascent(case, torch.arange(64), 64 * probabilities * weights * whole)


def test_off_policy_only_the_exact_product_without_a_bound_is_unbiased() -> None:
    case, behavior = process(0.6), all_logprobs(table(2))
    exact = off_policy_expectation(case, behavior, "sequence_sum", "truncated", math.inf)
    torch.testing.assert_close(exact, case.gradient, rtol=1e-6, atol=1e-7)
    size = float(case.gradient.norm())
    biases = {
        (level, bound, limit): float(
            (off_policy_expectation(case, behavior, level, bound, limit) - case.gradient).norm()
        )
        for level, bound, limit in (
            ("sequence_sum", "truncated", 2.0),
            ("sequence_sum", "masked", 2.0),
            ("sequence_mean", "truncated", math.inf),
            ("token", "truncated", math.inf),
        )
    }
    assert min(biases.values()) > 0.05 * size, biases
    uncorrected = ascent(
        case, torch.arange(64), 64 * behavior.sum(1, keepdim=True).exp() * case.rewards.sum(1, keepdim=True)
    )
    assert biases["token", "truncated", math.inf] < float((uncorrected - case.gradient).norm())


# --- through the learner -----------------------------------------------------------------------------------------


def learner_gradient(policy: Policy, batch: Batch, aggregation: str, max_tokens: int = 10_000) -> Tensor:
    """The gradient of the table that the real learner hands to Adam."""
    learner = Learner(
        policy,
        AlgorithmConfig(aggregation=aggregation),
        OptimizerConfig(max_grad_norm=math.inf),
        LearnerConfig(max_tokens_per_micro_batch=max_tokens),
        num_steps=1,
    )
    seen: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(lambda *_: seen.append(policy.model.table.grad.clone()))
    learner.update(batch)
    (gradient,) = seen
    return gradient


def test_three_tokens_of_a_softmax_bandit_by_hand() -> None:
    """`p = (1/2, 1/3, 1/6)`, actions 2, 0, 2 with rewards 1, -3, 2, so `G = (0, -1, 2)`.

    `sum_t (onehot(a_t) - p) G_t = 0 - (1/2, -1/3, -1/6) + 2 (-1/2, -1/3, 5/6) = (-3/2, -1/3, 11/6)`.
    """
    p = torch.tensor([[1 / 2, 1 / 3, 1 / 6]])
    behavior = [math.log(1 / 6), math.log(1 / 2), math.log(1 / 6)]
    batch = collate([make_scored([make_trajectory([0], [2, 0, 2], behavior)], [[1.0, -3.0, 2.0]])])
    gradient = learner_gradient(Policy(TabularLM(p.log()), tokenizer=None), batch, "sum")
    torch.testing.assert_close(-gradient, torch.tensor([[-3 / 2, -1 / 3, 11 / 6]]))


@pytest.mark.parametrize("max_tokens", [10_000, 20])
def test_reference_reward_and_learner_together_give_the_exact_gradient_of_a_uniform_policy(max_tokens: int) -> None:
    """Under a uniform policy every trajectory has probability 1/64, so one batch of all 64 is the expectation itself."""
    ref_table, alpha = table(1), 0.6
    uniform = torch.zeros(NUM_STATES, V, dtype=torch.float64, requires_grad=True)
    logprobs = all_logprobs(uniform)
    total = (all_logprobs(ref_table) - alpha * logprobs).sum(dim=1)
    (exact,) = torch.autograd.grad((logprobs.sum(dim=1).exp() * total).sum(), uniform)

    behavior = [math.log(1 / V)] * T
    group = make_group([make_trajectory([0], actions, behavior) for actions in TRAJECTORIES.tolist()])
    reference = Policy(TabularLM(ref_table.float()), tokenizer=None)
    scores = ReferenceReward(reference, ReferenceRewardConfig(alpha=alpha), max_tokens)(group)
    policy = Policy(TabularLM(uniform.detach().float()), tokenizer=None)
    gradient = learner_gradient(policy, collate([ScoredGroup(group, scores)]), "trajectory_mean", max_tokens)
    torch.testing.assert_close(-gradient, exact.float(), rtol=1e-4, atol=1e-6)


def test_the_policy_of_a_table_gives_the_enumerated_logprobs() -> None:
    policy = Policy(TabularLM(table(0).float()), tokenizer=None)
    with torch.no_grad():
        logprobs = policy.token_logprobs(TOKEN_IDS).logprobs[:, 1:]
    torch.testing.assert_close(logprobs, all_logprobs(table(0)).float())
