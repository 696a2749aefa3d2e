"""The demo with an adapter: the engine computes what the learner does, and a resumed run equals one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.harness.adapter_runs import (
    STEPS,
    assert_both_exports_are_the_policy,
    assert_engines_compute_what_the_learner_does,
    assert_resumes_bit_for_bit,
    train,
)
from tests.harness.commands import summary

pytestmark = [pytest.mark.integration, pytest.mark.long]

DORA = ["policy.adapter.kind=dora"]


@pytest.fixture(scope="module")
def run(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run folder."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    console = train(folder, *DORA)
    assert "adapter      dora of rank 8, scale 4; published merged" in console
    assert f"{folder}/policy_adapter" in console
    return folder


def test_the_adapter_learns_and_engines_that_have_the_merged_weights_compute_what_the_learner_does(run: Path) -> None:
    assert summary(run)["kl_per_token_after"] < 0.9 * summary(run)["kl_per_token_before"]
    assert_engines_compute_what_the_learner_does(run)


def test_both_exports_are_the_policy_that_was_trained(run: Path, tiny_task: Path) -> None:
    assert_both_exports_are_the_policy(run, tiny_task)
    stored = load_file(run / "checkpoints" / f"step_{STEPS:05d}" / "optimizer.safetensors")
    assert {name.split(".")[-3] for name in stored if name != "owner"} == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_a_run_that_is_resumed_in_the_middle_equals_the_one_that_was_not_bit_for_bit(run: Path, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(run, tmp_path, DORA)
