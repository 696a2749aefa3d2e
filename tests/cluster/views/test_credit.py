"""Advantages and pulls that are computed again from the files are those that the learner used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from align.algorithm import losses, surrogates
from align.algorithm.bundles import BUNDLES
from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import collate
from align.data.types import ScoredGroup, TokenRewards
from align.learner.learner import UpdateStats
from cluster.record import transcripts
from cluster.views.credit import Credit, CreditUnknown, credits
from tests.fakes.models import character_tokenizer
from tests.fakes.trajectories import make_group, make_trajectory

LENGTHS = ((1, 4, 2), (3, 3, 5))


def groups(seed: int = 0, with_steps: bool = False) -> list[ScoredGroup]:
    """Ragged groups with random rewards, behaviour and reference, whose prompts differ in length."""
    rng = np.random.default_rng(seed)
    found = []
    for number, lengths in enumerate(LENGTHS):
        trajectories = [
            make_trajectory([3] * (2 + number), [5] * n, -rng.exponential(size=n).astype(np.float32), version=number)
            for n in lengths
        ]
        scores = []
        for t in trajectories:
            ends = np.where(np.arange(len(t.token_ids)) % 2 == 1, t.loss_mask, False)
            ends[-1] = True
            rewards = np.where(ends if with_steps else t.loss_mask, rng.normal(size=len(t.token_ids)), 0)
            ref = np.where(t.loss_mask, -rng.exponential(size=len(t.token_ids)), 0).astype(np.float32)
            scores.append(TokenRewards(rewards.astype(np.float32), ref, step_ends=ends if with_steps else None))
        found.append(ScoredGroup(make_group(trajectories, number), tuple(scores)))
    return found


def rows(path: Path, scored: list[ScoredGroup]) -> list[dict[str, Any]]:
    """What a run leaves of the groups, in another order."""
    transcripts.write(path, scored, character_tokenizer(), step=1)
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return found[::-1]


def algorithm(**parts: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(parts)


def by_key(scored: list[ScoredGroup], values: torch.Tensor) -> dict[tuple[int, int], list[float]]:
    """[B, T] by ticket and repeat, cut to the sampled tokens."""
    batch = collate(scored)
    keys = [(group.group.ticket.number, repeat) for group in scored for repeat in range(len(group.scores))]
    return {key: row[mask].tolist() for key, row, mask in zip(keys, values, batch.loss_mask, strict=True)}


@pytest.mark.parametrize("bundle", sorted(set(BUNDLES) - {"ppo"}))
def test_the_advantages_of_every_bundle_are_those_of_the_objective(bundle: str, tmp_path: Path) -> None:
    cfg, scored = algorithm(name=bundle, **{"loss_length": 8} if bundle == "dr_grpo" else {}), groups()
    wanted, _ = Objective(cfg).advantages(collate(scored))
    found = credits(rows(tmp_path / "step.parquet", scored), cfg)
    assert {key: credit.advantages for key, credit in found.items()} == by_key(scored, wanted)


def test_process_rewards_need_the_ends_of_steps_and_the_files_have_them(tmp_path: Path) -> None:
    cfg, scored = algorithm(rewards="process"), groups(with_steps=True)
    wanted, _ = Objective(cfg).advantages(collate(scored))
    found = credits(rows(tmp_path / "step.parquet", scored), cfg)
    assert {key: credit.advantages for key, credit in found.items()} == by_key(scored, wanted)


def test_a_coefficient_of_the_step_replaces_that_of_the_config(tmp_path: Path) -> None:
    scored = groups()
    cheap, dear = (algorithm(kl="reward", kl_coefficient=value) for value in (0.1, 0.7))
    found = rows(tmp_path / "step.parquet", scored)
    assert credits(found, cheap, kl_coefficient=0.7) == credits(found, dear)
    assert credits(found, cheap) != credits(found, dear)


@pytest.mark.parametrize(
    "aggregation", ["sum", "token_mean", "trajectory_mean", "trajectory_token_mean", "prompt_mean"]
)
def test_a_pull_is_what_the_gradient_does_to_the_logit_of_the_token(aggregation: str, tmp_path: Path) -> None:
    cfg, scored = algorithm(aggregation=aggregation), groups()
    batch, objective = collate(scored), Objective(cfg)
    # The sampled token's logit over one other token, which gives it its recorded probability.
    logits = batch.behavior_logprobs.double() - torch.log(-torch.expm1(batch.behavior_logprobs.double()))
    logits = logits.where(batch.loss_mask, 0.0).requires_grad_()
    advantages, _ = objective.advantages(batch)
    loss = losses.aggregate(
        surrogates.reinforce(torch.nn.functional.logsigmoid(logits), advantages),
        batch.loss_mask,
        objective.weights(batch),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = credits(rows(tmp_path / "step.parquet", scored), cfg)
    for key, wanted in by_key(scored, -logits.grad).items():
        assert found[key].pulls == pytest.approx(wanted, rel=1e-6)


def test_trajectories_without_loss_pull_at_nothing_and_count_nowhere(tmp_path: Path) -> None:
    found = rows(tmp_path / "step.parquet", groups())
    for row in found:
        row["finish_reason"] = "length" if row["repeat"] == 0 else "stop"
    pulls = credits(found, algorithm(mask_overlong=True, aggregation="trajectory_mean"))
    everything = credits(found, algorithm(aggregation="trajectory_mean"))
    assert [pulls[ticket, 0].pull for ticket in (0, 1)] == [0, 0]
    assert pulls[0, 1].pull == pytest.approx(everything[0, 1].pull * 6 / 4)
    assert pulls[0, 0].advantages == everything[0, 0].advantages != [0.0]


def test_what_the_update_recorded_goes_before_what_could_be_computed_again(tmp_path: Path) -> None:
    scored = groups()
    advantages = torch.randn(collate(scored).rewards.shape, generator=torch.Generator().manual_seed(0))
    stats = UpdateStats([], 0, False, advantages, torch.zeros_like(advantages))
    transcripts.write(tmp_path / "step.parquet", scored, character_tokenizer(), 1, stats)
    found = credits(pyarrow.parquet.read_table(tmp_path / "step.parquet").to_pylist()[::-1], algorithm(name="ppo"))
    assert {key: credit.advantages for key, credit in found.items()} == by_key(scored, advantages)


def test_the_pull_of_a_trajectory_is_the_sum_of_sizes() -> None:
    assert Credit([1.0, -1.0], [0.25, -0.5]).pull == 0.75


def test_what_the_files_do_not_hold_is_said(tmp_path: Path) -> None:
    found = rows(tmp_path / "step.parquet", groups())
    with pytest.raises(CreditUnknown, match="the update did not end, and a critic's values are not recorded"):
        credits(found, algorithm(name="ppo"))
    for row in found:
        row["ref_logprobs"] = None
    with pytest.raises(CreditUnknown, match="needs the reference's log-probabilities"):
        credits(found, algorithm(kl="reward", kl_coefficient=0.1))
