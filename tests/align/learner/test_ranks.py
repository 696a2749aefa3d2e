"""The learner on several ranks: the step of one rank, whatever its share, and the same tensors on the way out and in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.distributed.tensor import DTensor

from align.learner.shares import passes
from align.model.policy import Policy
from align.model.ranks import Ranks
from tests.fakes.batches import batch_of
from tests.fakes.rank_learners import (
    PLAIN,
    STEPS,
    Result,
    adam_state,
    look,
    new_learner,
    shards,
    step,
    weights,
)
from tests.harness.rank_processes import on_ranks
from tests.oracles.equality import assert_bitwise, assert_near


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


FOUR = pytest.param("four", marks=pytest.mark.integration)
"""More ranks than a small machine has CPUs: `make test-fast` leaves them out."""


@pytest.fixture(params=["two", FOUR])
def several(request: pytest.FixtureRequest) -> list[Result]:
    """What two ranks found, and four."""
    found: list[Result] = request.getfixturevalue(request.param)
    return found


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "tied", "settings"), [("tied", True, PLAIN), ("untied", False, WHOLE_BATCH)])
def test_two_and_four_ranks_log_and_learn_what_one_does(
    several: list[Result], head: str, tied: bool, settings: dict[str, Any]
) -> None:
    alone = train(Ranks(), tied, settings)
    before = weights(new_learner(Ranks(), tied))
    assert max(logged["optimizer/grad_norm"] for logged in alone["logged"]) > 1, "the limit of the norm cuts some"
    assert min(np.abs(after - before[name]).max() for name, after in alone["weights"].items()) > 3e-3, "all moved"
    assert_near(several[0][head]["weights"], alone["weights"])
    for result in several:
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
    several: list[Result],
) -> None:
    expected = weights(new_learner(Ranks(), tied=False))
    num_weights = sum(weight.size for weight in expected.values())
    assert several[0]["publish"]["names"] == list(expected)[:3]
    assert_bitwise(several[0]["publish"]["weights"], expected)
    held = [result["publish"]["held"] for result in several]
    assert sum(held) == num_weights
    assert max(held) <= num_weights / len(several) * 1.1, "each holds its share"


@pytest.fixture(scope="module", params=["one", FOUR])
def loaded(request: pytest.FixtureRequest, two: list[Result], folder: Path) -> Result:
    """What one rank, and four, take up of what two saved."""
    if request.param == "one":
        return load(Ranks(), folder)
    found: Result = request.getfixturevalue("four")[0]["load"]
    return found


def test_what_two_ranks_save_one_and_four_take_up(
    two: list[Result], loaded: Result, folder: Path, tmp_path: Path
) -> None:
    saved = two[0]["save"]
    Policy.load(folder / "policy").save(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (folder / "policy" / name).read_bytes(), "as one rank writes it"
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
