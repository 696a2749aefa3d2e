"""The demo with an adapter that engines have as such: what it computes, what is resumed, and what a new engine gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.model.adapters import AdapterConfig
from cluster.spec.shape import model_shape
from tests.harness.adapter_runs import (
    STEPS,
    assert_both_exports_are_the_policy,
    assert_engines_compute_what_the_learner_does,
    assert_resumes_bit_for_bit,
    command,
    rows,
    train,
)
from tests.harness.commands import AlignProcess, last_step, summary, trajectories, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.long]

SETTINGS = ["policy.adapter.publish=adapter", "policy.adapter.rslora=true", "policy.adapter.alpha=12"]


@pytest.fixture(scope="module")
def run(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run folder."""
    folder = tmp_path_factory.mktemp("adapters") / "run"
    assert "adapter      lora of rank 8, scale 4.24264; published as an adapter" in train(folder, *SETTINGS)
    return folder


def test_the_adapter_learns_and_engines_that_have_it_compute_what_the_learner_does(run: Path, tiny_task: Path) -> None:
    assert summary(run)["kl_per_token_after"] < 0.9 * summary(run)["kl_per_token_before"]
    assert_engines_compute_what_the_learner_does(run)
    shape = model_shape(tiny_task / "policy", AdapterConfig(rank=8))
    assert {row["weights/published_bytes"] for row in rows(run)} == {4 * shape.num_adapter_parameters}
    assert 5 * shape.num_adapter_parameters < shape.num_parameters


def test_both_exports_are_the_policy_that_was_trained(run: Path, tiny_task: Path) -> None:
    assert_both_exports_are_the_policy(run, tiny_task)


def test_a_run_that_is_resumed_in_the_middle_equals_the_one_that_was_not_bit_for_bit(run: Path, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(run, tmp_path, SETTINGS)


def test_an_engine_that_takes_the_place_of_a_dead_one_has_the_current_adapter_of_two_ranks(
    tiny_task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ranks = ("learner.num_ranks=2", "learner.num_cpus=0.5")
    process = AlignProcess(*command(folder, *SETTINGS, *ranks))
    wait_until(lambda: last_step(folder) >= 2, "step 2")
    process.kill_engine()
    code, console = process.wait(300)
    assert code == 0, console[-4000:]
    assert process.left_behind() == []
    assert rows(folder)[-1]["fleet/restarts"] == 1
    assert_engines_compute_what_the_learner_does(folder)
    assert_both_exports_are_the_policy(folder, tiny_task)
    assert len(trajectories(folder)) == STEPS
