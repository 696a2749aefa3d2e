"""Adapters on several ranks: the steps, weights, publications and folders of one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.learner.learner import Learner
from align.model.adapters import Adapter, AdapterConfig
from align.model.folder import LOCAL
from align.model.policy import Policy
from align.model.ranks import Ranks
from tests.fakes.batches import batch_of
from tests.fakes.models import character_tokenizer, random_qwen3
from tests.fakes.rank_learners import PLAIN, STEPS, Arrays, Result, adam_state, gathered, look, new_learner, step
from tests.harness.rank_processes import on_ranks
from tests.oracles.equality import assert_bitwise, assert_near

pytestmark = pytest.mark.integration

KINDS = ("lora", "dora")
FACTOR_TOLERANCE = 1e-5
"""As `TOLERANCE` for B, which starts at 0: five steps are all of it. The merged weights keep to `TOLERANCE`."""


def adapted_learner(ranks: Ranks, kind: str) -> Learner:
    policy = Policy(random_qwen3(seed=0, tied=True), character_tokenizer())
    policy.adapter = Adapter(policy.model, AdapterConfig(kind=kind, rank=3, alpha=4.0, rslora=True), seed=1)
    return new_learner(ranks, tied=True, policy=policy, **PLAIN)


def sent(learner: Learner, kind: str) -> Arrays:
    """What engines get that have the adapter itself; nothing for DoRA, which none has."""
    return gathered(learner, learner.policy.named_factors) if kind == "lora" else {}


def work(ranks: Ranks, folder: Path) -> dict[str, Result]:
    """For each kind: steps, what is published in both ways, the folders, and a last step."""
    return {kind: train(ranks, kind, folder / kind) for kind in KINDS}


def train(ranks: Ranks, kind: str, folder: Path) -> Result:
    learner = adapted_learner(ranks, kind)
    logged = [step(learner, batch_of(number)) for number in range(STEPS)]
    look(learner)
    save(learner, folder)
    return {
        "logged": logged,
        "merged": gathered(learner, learner.policy.named_weights),
        "sent": sent(learner, kind),
        "adam": adam_state(learner),
        "next": step(learner, batch_of(STEPS)),
    }


def save(learner: Learner, folder: Path) -> None:
    policy = learner.policy
    assert policy.adapter is not None
    policy.save(folder / "policy")
    policy.adapter.save(folder / "policy_adapter", write=policy.ranks.first)
    learner.save_optimizer(folder / "optimizer.safetensors")


def resume(ranks: Ranks, folder: Path) -> dict[str, Result]:
    """What another number of ranks saved, and the step after it."""
    found = {}
    for kind in KINDS:
        learner = adapted_learner(ranks, kind)
        assert learner.policy.adapter is not None
        learner.policy.adapter.load(folder / kind / "policy_adapter")
        learner.load_optimizer(folder / kind / "optimizer.safetensors", version=STEPS)
        found[kind] = {
            "merged": gathered(learner, learner.policy.named_weights),
            "adam": adam_state(learner),
            "next": step(learner, batch_of(STEPS)),
        }
    return found


def on_four(ranks: Ranks, folder: Path, of_two: Path) -> tuple[dict[str, Result], dict[str, Result]]:
    return work(ranks, folder), resume(ranks, of_two)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {num: tmp_path_factory.mktemp(f"ranks_{num}") for num in (1, 2, 4)}
    for folder in found.values():
        for kind in KINDS:
            (folder / kind).mkdir()
    return found


@pytest.fixture(scope="module")
def one(folders: dict[int, Path]) -> dict[str, Result]:
    return work(Ranks(), folders[1])


@pytest.fixture(scope="module")
def two(folders: dict[int, Path]) -> dict[str, Result]:
    first: dict[str, Result] = on_ranks(2, work, folders[2])[0]
    return first


@pytest.fixture(scope="module")
def four(folders: dict[int, Path], two: dict[str, Result]) -> tuple[dict[str, Result], dict[str, Result]]:
    first: tuple[dict[str, Result], dict[str, Result]] = on_ranks(4, on_four, folders[4], folders[2])[0]
    return first


@pytest.fixture(params=["two", "four"])
def several(request: pytest.FixtureRequest) -> dict[str, Result]:
    """What two ranks found, and four."""
    found = request.getfixturevalue(request.param)
    return found if request.param == "two" else found[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["one", "four"])
def resumed(request: pytest.FixtureRequest, two: dict[str, Result], folders: dict[int, Path]) -> dict[str, Result]:
    """What one rank, and four, go on with that two saved."""
    return resume(Ranks(), folders[2]) if request.param == "one" else request.getfixturevalue("four")[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_on_many_ranks_what_it_learns_on_one(
    kind: str, one: dict[str, Result], several: dict[str, Result]
) -> None:
    found, expected = several[kind], one[kind]
    for these, those in zip(found["logged"], expected["logged"], strict=True):
        assert these == pytest.approx(those, rel=1e-5, abs=1e-6)
    assert_near(found["merged"], expected["merged"])
    start = dict(random_qwen3(seed=0, tied=True).named_parameters())
    moved = {
        name for name, value in expected["merged"].items() if np.abs(value - start[name].detach().numpy()).max() > 1e-3
    }
    assert moved and all("proj" in name for name in moved), "the comparison is of weights that have learned"


def test_engines_get_the_factors_that_one_rank_sends(one: dict[str, Result], several: dict[str, Result]) -> None:
    found, expected = several["lora"]["sent"], one["lora"]["sent"]
    assert_near(found, expected, FACTOR_TOLERANCE)
    assert list(found) == list(expected)
    assert {name.split(".")[-2] for name in found} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("kind", KINDS)
def test_both_folders_of_two_ranks_are_the_policy_that_they_publish(
    kind: str, two: dict[str, Result], folders: dict[int, Path]
) -> None:
    from peft import PeftModel

    folder = folders[2] / kind
    published = two[kind]["merged"]
    assert_bitwise({n: w.detach().numpy() for n, w in Policy.load(folder / "policy").named_weights()}, published)
    first = random_qwen3(seed=0, tied=True)
    first.save_pretrained(folder / "first")
    plain = AutoModelForCausalLM.from_pretrained(folder / "first", dtype=torch.float32, **LOCAL)
    merged = PeftModel.from_pretrained(plain, folder / "policy_adapter").merge_and_unload()
    assert_near({n: w.detach().numpy() for n, w in merged.named_parameters()}, published)
    assert len(load_file(folder / "policy_adapter" / "adapter_model.safetensors")) == (2 if kind == "lora" else 3) * 14


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_ranks_saved_one_and_four_go_on_with(
    kind: str, two: dict[str, Result], resumed: dict[str, Result]
) -> None:
    saved, found = two[kind], resumed[kind]
    assert_bitwise(found["merged"], saved["merged"])
    assert_bitwise(found["adam"], saved["adam"])
    assert found["next"] == pytest.approx(saved["next"], rel=1e-5, abs=1e-6)
