"""The demo with an adapter: the engine computes what the learner does, and a resumed run equals one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.model.policy import Policy
from tests.harness.commands import DEMO, align, summary, trajectories

pytestmark = [pytest.mark.integration, pytest.mark.long]

STEPS = 6
SETTINGS = [
    *("policy.adapter.rank=8", "optimizer.schedule=constant", "checkpoint.every=3"),
    *(f"run.steps={STEPS}", "run.prompts_per_step=16", "evaluation.every=100", "evaluation.max_prompts=16"),
]
DORA = ["policy.adapter.kind=dora"]


def command(folder: Path, *settings: str) -> list[str | Path]:
    return ["train", DEMO, *(part for s in (*SETTINGS, *settings, f"run.dir={folder}") for part in ("--set", s))]


def train(folder: Path, *settings: str) -> str:
    code, console = align(*command(folder, *settings))
    assert code == 0, console[-4000:]
    return console


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_engines_compute_what_the_learner_does(run: Path) -> None:
    mismatches = [row["mismatch/abs_mean"] for row in rows(run) if "mismatch/abs_mean" in row]
    assert len(mismatches) == STEPS
    assert max(mismatches) <= 1e-5
    assert max(row["weights/canary_gap"] for row in rows(run)) <= 1e-4
    assert rows(run)[-1]["weights/version"] == STEPS


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


@torch.no_grad()
def assert_both_exports_are_the_policy(run: Path, tiny_task: Path) -> None:
    from peft import PeftModel

    merged, first = Policy.load(run / "policy"), Policy.load(tiny_task / "policy")
    ids = torch.arange(3, 23)[None]
    before = first.model(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(first.model, run / "policy_adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged.model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
    assert (adapted - before).abs().max() > 0.1


def test_a_run_that_is_resumed_in_the_middle_equals_the_one_that_was_not_bit_for_bit(run: Path, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(run, tmp_path, DORA)


def assert_resumes_bit_for_bit(run: Path, tmp_path: Path, settings: list[str]) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:05d}")
    (again / "summary.json").unlink()
    assert "resuming     after step 3" in train(again, *settings)
    assert trajectories(again) == trajectories(run)
    for file in ("policy/model.safetensors", "policy_adapter/adapter_model.safetensors"):
        one, other = load_file(run / file), load_file(again / file)
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
