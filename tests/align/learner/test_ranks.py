"""The learner on several ranks: the step of one rank, whatever its share, and the same tensors on the way out and in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.distributed.tensor import DTensor

from align import metrics
from align.algorithm.config import AlgorithmConfig
from align.data.batching import Batch, collate
from align.learner.learner import Learner, LearnerConfig
from align.learner.optimizer import OptimizerConfig
from align.learner.shares import passes
from align.model.policy import Policy
from align.model.ranks import Ranks, full_tensor
from tests.conftest import VOCAB_SIZE, character_tokenizer, random_qwen3
from tests.fakes.trajectories import make_scored, make_trajectory
from tests.harness.rank_processes import on_ranks

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]
TOLERANCE = 2e-6
"""What the order of float32 sums may change in five steps, relative to the largest entry of a tensor."""
STEPS = 5


def batch_of(step: int, num_groups: int = 4) -> Batch:
    """Groups of three ragged trajectories, 3 to 40 tokens; the behavior log-probs are of no policy in particular."""
    generator = torch.Generator().manual_seed(step)
    scored = []
    for number in range(num_groups):
        trajectories, rewards = [], []
        for _ in range(3):
            length = min(int(torch.empty(()).log_normal_(2.3, 0.8, generator=generator)) + 1, 35)
            ids = torch.randint(3, VOCAB_SIZE, (2 + number + length,), generator=generator).tolist()
            logprobs = (-4 * torch.rand(length, generator=generator)).tolist()
            trajectories.append(make_trajectory(ids[:-length], ids[-length:], logprobs, version=step))
            rewards.append(torch.randn(length, generator=generator).tolist())
        scored.append(make_scored(trajectories, rewards, number))
    return collate(scored)


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
    """What the first rank publishes while the others follow."""
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


def train(ranks: Ranks, tied: bool, settings: dict[str, Any]) -> Result:
    learner = new_learner(ranks, tied, **settings)
    logged = [step(learner, batch_of(number)) for number in range(STEPS)]
    return {"logged": logged, "weights": weights(learner)}


def skip(ranks: Ranks) -> Result:
    """One good update, one in which a single trajectory, hence a single rank, has a loss that is not finite, one more."""
    learner = new_learner(ranks, tied=True, **PLAIN)
    learner.update(batch_of(0))
    before = shards(learner)
    bad = batch_of(1)
    bad.rewards[5] = math.nan
    stats = learner.update(bad)
    after = shards(learner)
    cut = [one.rows for one in passes(ranks, bad.lengths.tolist(), learner.budget.cut) if one.counts]
    return {
        "had it": any(5 in rows for rows in cut),
        "skipped": stats.skipped,
        "counts": (learner.version, learner.skipped_updates),
        "before": before,
        "after": after,
        "logged then": step(learner, batch_of(2)),
    }


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


def publish(ranks: Ranks) -> Result:
    """The weights as they are published, after a publication that broke off."""
    learner = new_learner(ranks, tied=False)
    look(learner)
    if ranks.first:
        started = learner.policy.named_weights()
        names = [next(started)[0] for _ in range(3)]
        ranks.end_gathering()
    else:
        learner.policy.help_gather()
        names = []
    parameters = learner.policy.model.parameters()
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return {"names": names, "weights": weights(learner), "held": held}


def save(ranks: Ranks, folder: Path) -> Result:
    """Two updates, a checkpoint, and a third update."""
    learner = new_learner(ranks, tied=True)
    for number in (0, 1):
        learner.update(batch_of(number))
    look(learner)
    learner.policy.save(folder / "policy")
    learner.save_optimizer(folder / "optimizer.safetensors")
    return {"weights": weights(learner), "adam": adam_state(learner), "logged": step(learner, batch_of(2))}


def load(ranks: Ranks, folder: Path) -> Result:
    """The checkpoint of `save`, and the third update."""
    learner = new_learner(ranks, tied=True, policy=Policy.load(folder / "policy"))
    learner.load_optimizer(folder / "optimizer.safetensors", version=2)
    return {"weights": weights(learner), "adam": adam_state(learner), "logged": step(learner, batch_of(2))}


def sample(ranks: Ranks) -> list[list[int]]:
    policy = new_learner(ranks, tied=True).policy
    return policy.sample([[5, 6], [7, 8, 9], [10]], max_tokens=40, temperature=1.0, seed=3)


def listened_on() -> set[str]:
    """Addresses on which this process waits for connections."""
    return {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


PLAIN = {"aggregation": "sum", "importance": "none", "baseline": "none"}
WHOLE_BATCH = {"aggregation": "trajectory_mean", "baseline": "batch_mean", "whiten": True, "entropy_coefficient": 0.01}


def on_two(ranks: Ranks, folder: Path) -> Result:
    """All that the tests ask of two ranks, in one start of processes."""
    return {
        "tied": train(ranks, True, PLAIN),
        "untied": train(ranks, False, WHOLE_BATCH),
        "skip": skip(ranks),
        "publish": publish(ranks),
        "save": save(ranks, folder),
        "sample": sample(ranks),
        "listened on": listened_on(),
    }


def on_four(ranks: Ranks, folder: Path) -> Result:
    """All that the tests ask of four ranks; the folder holds what two ranks saved."""
    return {
        "tied": train(ranks, True, PLAIN),
        "untied": train(ranks, False, WHOLE_BATCH),
        "load": load(ranks, folder),
        "publish": publish(ranks),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Result]:
    """What two ranks found."""
    return on_ranks(2, on_two, folder)


@pytest.fixture(scope="module")
def four(two: list[Result], folder: Path) -> list[Result]:
    """What four ranks found."""
    return on_ranks(4, on_four, folder)


def assert_close(actual: Arrays, expected: Arrays, tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        atol = tolerance * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=atol, err_msg=name)


def assert_bitwise(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert np.array_equal(value, expected[name]), name


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "tied", "settings"), [("tied", True, PLAIN), ("untied", False, WHOLE_BATCH)])
def test_two_and_four_ranks_log_and_learn_what_one_does(
    two: list[Result], four: list[Result], head: str, tied: bool, settings: dict[str, Any]
) -> None:
    alone = train(Ranks(), tied, settings)
    before = weights(new_learner(Ranks(), tied))
    assert max(logged["optimizer/grad_norm"] for logged in alone["logged"]) > 1, "the limit of the norm cuts some"
    assert min(np.abs(after - before[name]).max() for name, after in alone["weights"].items()) > 3e-3, "all moved"
    for results in (two, four):
        assert_close(results[0][head]["weights"], alone["weights"])
        for result in results:
            for ours, theirs in zip(result[head]["logged"], alone["logged"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_ranks_train_in_as_many_passes_of_unequal_size() -> None:
    """The equalities above would say little if all ranks had the same work."""
    learner = new_learner(Ranks(), tied=True)
    lengths = batch_of(0).lengths.tolist()
    shares = [list(passes(Ranks(rank, 4), lengths, learner.budget.cut)) for rank in range(4)]
    assert len({len(of_rank) for of_rank in shares}) == 1
    assert len({sum(one.counts for one in of_rank) for of_rank in shares}) > 1, "some only keep step"
    assert len(set(lengths)) > 6


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all_with_every_shard_unchanged(
    two: list[Result],
) -> None:
    found = [result["skip"] for result in two]
    assert sorted(one["had it"] for one in found) == [False, True]
    for one in found:
        assert one["skipped"]
        assert one["counts"] == (2, 1)
        assert_bitwise(one["after"], one["before"])
        assert one["logged then"]["tokens/trained"] > 0
    assert found[0]["logged then"] == found[1]["logged then"]


# --- weights out and in --------------------------------------------------------------------------------------------


def test_what_ranks_publish_is_bit_for_bit_the_whole_model_also_after_a_publication_that_broke_off(
    two: list[Result], four: list[Result]
) -> None:
    expected = weights(new_learner(Ranks(), tied=False))
    num_weights = sum(weight.size for weight in expected.values())
    for results in (two, four):
        assert results[0]["publish"]["names"] == list(expected)[:3]
        assert_bitwise(results[0]["publish"]["weights"], expected)
        held = [result["publish"]["held"] for result in results]
        assert sum(held) == num_weights
        assert max(held) <= num_weights / len(results) * 1.1, "each holds its share"


def test_what_two_ranks_save_one_and_four_take_up(
    two: list[Result], four: list[Result], folder: Path, tmp_path: Path
) -> None:
    saved = two[0]["save"]
    Policy.load(folder / "policy").save(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / "policy" / name).read_bytes(), "as one rank writes it"
    for loaded in (load(Ranks(), folder), four[0]["load"]):
        assert_bitwise(loaded["weights"], saved["weights"])
        assert_bitwise(loaded["adam"], saved["adam"])
        assert loaded["logged"] == pytest.approx(saved["logged"], rel=1e-5, abs=1e-6)
    assert np.abs(saved["adam"]["model.embed_tokens.weight exp_avg"]).max() > 0


def test_all_ranks_sample_the_same_and_what_one_samples(two: list[Result]) -> None:
    alone = sample(Ranks())
    assert two[0]["sample"] == two[1]["sample"] == alone
    assert min(map(len, alone)) < max(map(len, alone)), "one ends before another"


# --- processes ----------------------------------------------------------------------------------------------------


def test_ranks_listen_on_the_address_that_they_were_given_alone(two: list[Result]) -> None:
    assert [result["listened on"] for result in two] == [{"127.0.0.1"}] * 2
